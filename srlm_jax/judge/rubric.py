"""The judge's prompt (paper section 2.2, figure 2): additive five points, one instruction, one response."""

import dataclasses
import functools
import re
from importlib import resources

from etils import epath

from srlm_jax.errors import BadInput
from srlm_jax.storage import texts

INSTRUCTION = "<INSTRUCTION_HERE>"
RESPONSE = "<RESPONSE_HERE>"

_PLACEHOLDER = re.compile(f"{re.escape(INSTRUCTION)}|{re.escape(RESPONSE)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rubric:
    """A judge's prompt with one place for the instruction and one for the response.

    `stop` holds the strings after which a judgement ends, for a judge that does not end its turn by itself.
    """

    template: str
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        for placeholder in (INSTRUCTION, RESPONSE):
            count = self.template.count(placeholder)
            if count != 1:
                raise BadInput(
                    f"the rubric's template must hold {placeholder} once, it holds it {count} times; "
                    "correct the template"
                )


def paper_rubric() -> Rubric:
    """The paper's prompt, word for word. No stop string: a trained judge ends its turn after the score."""
    text = resources.files("srlm_jax.judge").joinpath("rubric.txt").read_text(encoding="utf-8")
    return Rubric(template=text.removesuffix("\n"), stop=())


def read_rubric(path: epath.PathLike) -> Rubric:
    """A rubric from a UTF-8 text file that holds <INSTRUCTION_HERE> and <RESPONSE_HERE> once each. It must mention
    "Score:", in upper or lower case, because `judge.parse` looks for that in the verdict. It has no stop string.

    Raises:
      BadInput, naming the file: it is no such text.
      OSError: it cannot be read.
    """
    text = texts.read(path)
    if not text.strip():
        raise BadInput(f"{path}: the file is blank; give a judge's prompt with {INSTRUCTION} and {RESPONSE} in it")
    try:
        rubric = Rubric(template=text, stop=())
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    if not re.search("score:", text, re.IGNORECASE):
        raise BadInput(
            f'{path}: the rubric does not mention "Score:", by which the score is found in a verdict; ask for it, for '
            'instance: Conclude with the score using the format: "Score: <total points>"'
        )
    return rubric


def fill(rubric: Rubric, instruction: str, response: str) -> str:
    """The prompt for one judgement. Both places are filled in one pass: a response that quotes a placeholder keeps
    it as text.

    A text cannot close the marks that the template puts around it. A mark is a text in angle or square brackets that
    stands directly before or after a place, with or without white space between: <response> and </response> in the
    paper's prompt. Where the instruction or the response holds such a mark, opening or closing, in any case and
    spacing, its brackets are replaced: "</response>" becomes "[/response]", and "[END OF ANSWER]" becomes
    "(END OF ANSWER)". Everything else stays as it is.
    """
    inside = {
        INSTRUCTION: _inside_marks(rubric.template, instruction),
        RESPONSE: _inside_marks(rubric.template, response),
    }
    return _PLACEHOLDER.sub(lambda place: inside[place[0]], rubric.template)


_MARK = r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,80}\]"
_UNSEEN = r"[\s\u200b-\u200d\u2060\ufeff]"
_ROUND = {"<": "[", ">": "]", "[": "(", "]": ")"}


def _inside_marks(template: str, text: str) -> str:
    pattern = _marks(template)
    return text if pattern is None else pattern.sub(_in_other_brackets, text)


def _in_other_brackets(match: re.Match) -> str:
    mark = _ROUND[match[0][0]] + match[0][1:]
    return mark[:-1] + _ROUND[mark[-1]] if mark[-1] in ">]" else mark


@functools.lru_cache(maxsize=8)
def _marks(template: str) -> re.Pattern | None:
    """Finds, in a text, the marks that stand beside the template's places; None where none do."""
    marks = set()
    for place in _PLACEHOLDER.finditer(template):
        before = re.search(rf"({_MARK})\s*\Z", template[: place.start()])
        after = re.compile(rf"\s*({_MARK})").match(template, place.end())
        marks |= {match[1] for match in (before, after) if match} - {INSTRUCTION, RESPONSE}
    patterns = []
    for mark in sorted(marks):
        words = re.findall(r"[^\s/<>\[\]]+", mark)
        if mark[0] == "<" and words:  # a tag: its name alone counts, with any attributes, opening or closing
            patterns.append(rf"<{_UNSEEN}*+/?{_UNSEEN}*+{re.escape(words[0])}(?![\w-])[^<>]*+>?")
        elif words:
            named = "".join(rf"{_UNSEEN}*+{re.escape(word)}" for word in words)
            patterns.append(rf"\[{_UNSEEN}*+/?{named}(?![\w-]){_UNSEEN}*+\]?")
    return re.compile("|".join(patterns), re.IGNORECASE) if patterns else None
