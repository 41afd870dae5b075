"""New instructions from a language model: Self-Instruct's prompt and filters (paper section 2.2, after Wang et al.,
arXiv 2212.10560, in the form for tasks that are not classification).

A completion becomes a task, the task passes `check`, and a `NoveltyPool` admits it if it is unlike all before it.
"""

import dataclasses
import enum
import random
import re
import string
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction

from rapidfuzz import process
from rapidfuzz.distance import Indel

from srlm_jax import limits
from srlm_jax.errors import BadInput
from srlm_jax.limits import Count, Share, Text
from srlm_jax.records import Completion

# What announces tasks and is none: "Sure! Here are some tasks:", "Here is another one for you to try:".
_ASSENT = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|great|no problem)\s*(?:[!,.:]\s*|\n+|\Z)",
    re.IGNORECASE,
)
_ANNOUNCEMENT = re.compile(
    r"(?:here(?:'s|\u2019s| is| are)|below (?:is|are))\s+"
    r"(?:[\w-]+\s+){0,6}?(?:tasks?|instructions?|prompts?|ones?(?=\s*(?:[:\n]|\Z)|\s+(?:for\s+you|that|you|to)\b))"
    r"\b[^\n:.!?]{0,60}(?::\s*|\n+|\Z)",
    re.IGNORECASE,
)
# What a list puts before each task: "9.", "9)", "-", "Task 9:", "**Task 9:**", "### Instruction".
_NAME = r"(?:new\s+)?(?:task|instruction|prompt)(?:\s+(?:no\.?\s*|number\s*|#\s*)?[0-9]+)?"
_MARKUP = r"(?:\*\*|__|\#{1,6}\s)?"
_LABEL = rf"{_MARKUP}\s*{_NAME}\s*(?:\*\*|__)?\s*(?::\s*(?:\*\*|__)?|\n)\s*"
_MARKERS = tuple(
    re.compile(marker, re.IGNORECASE) for marker in (_LABEL, r"\(?[0-9]+\s?[.):](?:\s+|\Z)", r"[-*+\u2022](?:\s+|\Z)")
)
_NUMBERED = re.compile(rf"\n\s*(?:[0-9]+\s?\.(?:\s|\Z)|{_LABEL})", re.IGNORECASE)
_PARENTHESIS = re.compile(r"\n\s*\(?[0-9]+\s?\)(?:\s|\Z)")
_BULLET = re.compile(r"\n\s*[-*+\u2022](?:\s|\Z)")
_QUOTES = (("**", "**"), ("__", "__"), ('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("\u00ab", "\u00bb"), ("`", "`"))
_END_OF_TASK = re.compile(r"\n[^\S\n]*(?:\n|[-=*#_~]{3}|(?:answer|output|response|solution)[^\S\n]*:)", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9]+")


class Rejection(enum.StrEnum):
    """Why a completion gives no new instruction."""

    UNFINISHED = "unfinished"  # the length limit cut the completion, and perhaps its first task
    EMPTY = "empty"
    INCOMPLETE = "incomplete"  # ends in a colon: it announces a text that is not there
    TOO_SHORT = "too_short"  # in words
    TOO_LONG = "too_long"  # in words
    BANNED_WORD = "banned_word"  # asks for what a language model cannot see or do: an image, a file, to draw
    BANNED_START = "banned_start"
    PUNCTUATION_START = "punctuation_start"
    NON_ASCII_START = "non_ascii_start"
    SIMILAR = "similar"  # to a seed or to an accepted instruction, by ROUGE-L
    TOO_MANY_TOKENS = "too_many_tokens"  # prompt and answer would not fit the model's context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What became of one completion: an instruction, or the text that was refused and why."""

    id: str
    text: str
    rejection: Rejection | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """What an instruction must be like to be kept.

    Words are counted between white space; `min_words` and `max_words` themselves are allowed. `banned_words` match
    whole words, `banned_starts` the first words, both in any case. An instruction is too similar where its ROUGE-L F1
    to a known one is above `max_rouge_l`; equal is allowed.
    """

    min_words: Count
    max_words: Count
    banned_words: tuple[Text, ...]  # an empty one would ban everything
    banned_starts: tuple[Text, ...]
    max_rouge_l: Share

    def __post_init__(self) -> None:
        limits.check(self)
        if self.min_words > self.max_words:
            raise BadInput(f"min_words is {self.min_words}: it must not be above max_words, which is {self.max_words}")


def creation_prompt(demonstrations: Sequence[str]) -> str:
    """The text a base or chat model continues with a new task: the demonstrations as a numbered list, and the next
    number. Each demonstration is put on one line, without the colon it may end in.

    Raises ValueError where there are none. Source: Self-Instruct's template, which the paper uses with 8.
    """
    if not demonstrations:
        raise BadInput("the prompt for new tasks needs at least one demonstration")
    lines = [f"{number}. {_one_line(text).rstrip(':')}" for number, text in enumerate(demonstrations, start=1)]
    return "\n".join(["Come up with a series of tasks:", *lines, f"{len(lines) + 1}."])


def choose_demonstrations(
    rng: random.Random, seeds: Sequence[str], generated: Sequence[str], *, from_seeds: int, from_generated: int
) -> list[str]:
    """`from_seeds` + `from_generated` distinct texts in random order: 6 + 2 in the paper (section 3.1.3).

    Until there are `from_generated` generated instructions, seeds stand in for those that lack. What is drawn depends
    on `rng` and the order of the two sequences. Raises ValueError where the seeds are too few.
    """
    human = list(dict.fromkeys(seeds))
    known = set(human)
    machine = [text for text in dict.fromkeys(generated) if text not in known]
    machine_count = min(from_generated, len(machine))
    human_count = from_seeds + from_generated - machine_count
    if human_count > len(human):
        raise BadInput(
            f"{human_count} different seed prompts are needed to demonstrate tasks and there are {len(human)}; "
            "lower from_seeds or from_generated, or give more seed prompts"
        )
    chosen = rng.sample(machine, machine_count) + rng.sample(human, human_count)
    rng.shuffle(chosen)
    return chosen


def first_task(completion: Completion) -> str | Rejection:
    """The task the model wrote after the last number of `creation_prompt`, white space collapsed to single spaces.

    The text ends where the next number, a blank line, a separator ("---") or an answer ("Output:") begins: models
    write several tasks in a row and start to answer them (paper appendix A.5). A completion the length limit cut is
    refused whole, as in Self-Instruct. Unlike there, only the first task is taken and its capitals stay as they are.

    What chat models write before a task is left out: an announcement ("Sure! Here are some tasks:"), a number, a bullet
    or a label of its own ("9)", "-", "**Task 9:**"), and quotation marks or asterisks around the whole.
    """
    if not completion.finished:
        return Rejection.UNFINISHED
    text = _without_announcement(completion.text.strip())
    ends = [_NUMBERED]
    for marker in _MARKERS * 2:  # "- **Task 9:**" has two
        if own := marker.match(text):
            # Only where the list has this form do its marks end the task; elsewhere they may be part of it.
            ends += [end for end in (_PARENTHESIS, _BULLET) if end.match(f"\n{own[0]}")]
            text = text[own.end() :]
    for end in (*ends, _END_OF_TASK):
        text = end.split(text, maxsplit=1)[0]
    return _without_quotes(_one_line(text)) or Rejection.EMPTY


def _without_announcement(text: str) -> str:
    while found := _ASSENT.match(text) or _ANNOUNCEMENT.match(text):
        text = text[found.end() :].lstrip()
    return text


def _without_quotes(task: str) -> str:
    for opening, closing in _QUOTES:
        inner = task[len(opening) : -len(closing)]
        if inner and task.startswith(opening) and task.endswith(closing) and opening not in inner:
            return _without_quotes(inner.strip())
    return task


def check(task: str, filters: Filters) -> Rejection | None:
    """Why the task is refused by itself, None where it is not: how it ends, length, banned words, how it starts.

    Source: Self-Instruct's keyword and length filters. The checks run in the order of `Rejection`.
    """
    words = task.split()
    if not words:
        return Rejection.EMPTY
    if words[-1].endswith((":", "\uff1a")):
        return Rejection.INCOMPLETE
    if len(words) < filters.min_words:
        return Rejection.TOO_SHORT
    if len(words) > filters.max_words:
        return Rejection.TOO_LONG
    text = " ".join(words)
    if any(_has_word(text, word) for word in filters.banned_words):
        return Rejection.BANNED_WORD
    if any(re.match(rf"{re.escape(start)}(?!\w)", text, re.IGNORECASE) for start in filters.banned_starts):
        return Rejection.BANNED_START
    if text[0] in string.punctuation:
        return Rejection.PUNCTUATION_START
    if not text[0].isascii():
        return Rejection.NON_ASCII_START
    return None


class NoveltyPool:
    """All known instructions, to measure a new one against: the seeds and what was admitted since.

    ROUGE-L F1 as the rouge-score package defines it, without stemming: with L the longest common subsequence of the
    words of two texts of a and b words, F1 = 2 L / (a + b). Words are runs of a-z and 0-9 in the lower-cased text; a
    text without any is similar to nothing. To stay fast at tens of thousands of texts, each distinct word becomes one
    character, and 2 L / (a + b) is then rapidfuzz's normalised Indel similarity.
    """

    def __init__(self, known: Iterable[str], max_rouge_l: float) -> None:
        """`max_rouge_l` as in `Filters`. A run resumes with the seeds and the instructions it had accepted."""
        self._characters: dict[str, str] = {}
        # repr gives the decimal that was configured: 0.7 means 7/10 and not the nearest binary fraction below it,
        # so that a pair of exactly 7/10 is allowed.
        self._max = Fraction(repr(max_rouge_l))
        # A margin for rapidfuzz's rounding: what lies this close to the limit is settled in exact numbers.
        self._cutoff = max(0.0, max_rouge_l - 1e-9)
        self._known = [self._encode(text) for text in known]

    def admit(self, task: str) -> Rejection | None:
        """Adds the task and returns None, or returns SIMILAR and adds nothing.

        Call it last: a task admitted and then refused for another reason would keep others out.
        """
        encoded = self._encode(task)
        closest = process.extractOne(
            encoded, self._known, scorer=Indel.normalized_similarity, processor=None, score_cutoff=self._cutoff
        )
        if closest is not None:
            known = closest[0]
            length = len(encoded) + len(known)
            twice_common = length - Indel.distance(encoded, known)
            if twice_common > self._max * length:
                return Rejection.SIMILAR
        self._known.append(encoded)
        return None

    def _encode(self, text: str) -> str:
        return "".join(self._character(word) for word in _WORD.findall(text.lower()))

    def _character(self, word: str) -> str:
        if word not in self._characters:
            code = len(self._characters)
            if code > sys.maxunicode:
                raise BadInput("the instructions hold over a million different words: they are not natural text")
            self._characters[word] = chr(code)
        return self._characters[word]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
