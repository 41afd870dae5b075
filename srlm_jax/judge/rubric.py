"""The judge's prompt (paper section 2.2, figure 2): additive five points, one instruction, one response."""

import dataclasses
import re
from importlib import resources

from srlm_jax.errors import BadInput

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


def fill(rubric: Rubric, instruction: str, response: str) -> str:
    """The prompt for one judgement. Both places are filled in one pass: a response that quotes a placeholder keeps
    it as text."""
    texts = {INSTRUCTION: instruction, RESPONSE: response}
    return _PLACEHOLDER.sub(lambda match: texts[match[0]], rubric.template)
