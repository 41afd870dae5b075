"""From a judgement's text to its score (paper section 2.2: the judge concludes with "Score: <total points>").

The paper does not give its expression; the rules here are ours. They prefer no vote to a wrong one.
"""

import dataclasses
import enum
import re
import unicodedata

from srlm_jax.judge.quotations import quotations
from srlm_jax.records import NoVote, Vote

# Typographic quotes, blanks, minus sign and dashes are spelled as escapes: they look like their plain kin.
_BLANK = " \\t\\f\\v\u00a0\u3000"
_MARKS = "*_`\"'\u2018\u2019\u201c\u201d"
_DRESS = _BLANK + _MARKS
BEFORE_SCORE = _MARKS + "<[("  # what may stand between "Score:" and its number, white space aside
_GAP = rf"[{_BLANK}\n{re.escape(BEFORE_SCORE)}]*+"
_DASH = "\\-\u2212\u2013\u2014"
_DIGITS = r"[0-9]+(?:\.[0-9]+)?"
_UNIT = r"(?:points?|pts?\b|stars?|marks?)"

# "Score:" and its dressed forms (**Score:**, "Score": ..., Score (out of 5):, The score is:), not the end of
# "underscore:". Quantifiers are possessive (*+) wherever two of them could share a run of characters.
_HEAD = re.compile(
    rf"(?<![^\W_])score[{_DRESS}]*+"
    rf"(?:[(\[](?:(?:total[ ])?points|(?:(?:out[ ])?of|max\.?|maximum(?:[ ]of)?|from|/)?[ ]?"
    rf"(?:[0-9]{{1,3}}[ ]?(?:[{_DASH}]|to)[ ]?)?(?P<scale>[0-9]{{1,3}}|five)(?:[ ]{_UNIT})?)[)\]]"
    rf"|(?:out[ ]of[ ]|/[ ]?)(?P<bare_scale>[0-9]{{1,3}}))?"
    rf"[{_DRESS}]*+(?P<is>is|would[ ]be)?[{_DRESS}]*+[:\uff1a]",
    re.IGNORECASE,
)
# What stands between a head and the beginning of its line, or of its sentence.
_NAME = rf"(?P<the>(?:the|my|this)[{_DRESS}]+)?(?P<total>(?:(?:total|final|overall)[{_DRESS}{_DASH}]+)*)\Z"
_LINE = re.compile(rf"(?:^|\n)[{_DRESS}#{{\[<]*+{_NAME}", re.IGNORECASE)
_SENTENCE = re.compile(
    rf"(?:(?:^|\n)[{_DRESS}#|+\u2022{_DASH}]*+(?:[0-9]{{1,2}}[.)])?|[.!?:;]|[(\[])[{_DRESS}(\[]*+{_NAME}",
    re.IGNORECASE,
)
_BEFORE = 80  # characters that are looked at for them
_REPORTED = re.compile(
    rf"\b(?:says?|said|claims?|claimed|contains?|contained|states?|stated|writes?|wrote|text|words?|phrase"
    rf"|string|demands?|asks[ ]for)[{_DRESS}:(\[]*\Z",
    re.IGNORECASE,
)

_NUMBER = re.compile(rf"(?P<gap>{_GAP})(?P<sign>[+{_DASH}]?)(?P<digits>{_DIGITS}|\.[0-9]+)")
_NOTHING_YET = re.compile(rf"{_GAP}\Z")
_MAYBE_CUT = re.compile(r"[0-9./,]*")
# After a number: its unit, and its scale ("/5", "out of 5", "(out of a possible 5)", "on a scale of 1 to 5").
_UNIT_AFTER = re.compile(rf"[{_DRESS}]*+{_UNIT}", re.IGNORECASE)
_SCALE = re.compile(
    rf"(?:[{_DRESS}(\[,.]*+out[{_BLANK}]++of|[{_DRESS}(\[,]*+(?:/|\uff0f|(?:of|over|from)\b"
    rf"|on[ ](?:a|the)[ ]scale[ ](?:of|from)(?:[ ][0-9]{{1,3}}[ ]?(?:[{_DASH}]|to)\b)?))"
    rf"[{_DRESS}]*+(?:(?:a|an|the)[ ])?(?:(?:possible|maximum|max|total)[ ])?(?:of[ ])?"
    rf"(?P<scale>{_DIGITS}|(?:one|two|three|four|five|six|seven|eight|nine|ten|twenty|hundred)\b)",
    re.IGNORECASE,
)
# The end of the sentence that a number stands in.
_END = re.compile(rf"\n|(?<!\.)[.!](?=[\s{_DRESS})\]}}>]|\Z)|\u3002|\Z")
# What gives the number a second reading: "4 and a half", "4 or five" ...
_SECOND = re.compile(
    r"%|\b(?:and\s+(?:a\s+|one\s+)?(?:half|quarter|third|three\s+quarters)|point\s+\w+"
    r"|(?:or|to|plus|minus|maybe|perhaps)\s+(?:zero|one|two|three|four|five|six|seven|eight|nine|ten))\b",
    re.IGNORECASE,
)
_OPERATOR = re.compile(rf"(?:(?:[+=~/\u2192\u21d2]|[=-]>)[{_DRESS}]*|\A[{_DRESS}]*[{_DASH}][{_DRESS}]*)\Z")
# ... or, after the end of its sentence, a number, or a line that goes on with a sum or holds one number more.
_ANOTHER = re.compile(
    rf"[.!\u3002][{_DRESS}()\[\]]*+[0-9]|\n[\s{_DRESS}]*+(?:[+=\u2192]|{_DIGITS}[{_DRESS}.]*+(?:{_UNIT})?(?:\n|\Z))"
)
_LINE_ENDS = re.compile(rf"[{_DRESS}.!)\]}}>]*+(?:\n|\Z)")
# In a cut text: the sentence had got as far as its reasons, past all that belongs to the number.
_EXPLAINS = re.compile(
    rf"\b(?:because|since|as)\b|(?:[,;:]|[{_DASH}])[{_BLANK}]+(?:the|it|its|this|that)\b", re.IGNORECASE
)
_PROSE = re.compile(rf"[{_DRESS}]*+[^\W\d_]")


class _Place(enum.Enum):
    LINE = enum.auto()  # begins a line
    SENTENCE = enum.auto()  # begins a sentence, an item of a list or a bracket
    INSIDE = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    start: int
    end: int
    place: _Place
    quoted: bool
    total: bool  # "Total score:"
    sentence: bool  # "The score is:", which may go on in words
    scale: str | None


def parse_vote(text: str, finished: bool) -> Vote:
    """The vote of one judgement. `text` is the completion alone, never the prompt with it: the prompt quotes
    "Score: <total points>" and the response, which may hold anything.

    A head is "Score:" in upper or lower case, also dressed ("**Score:**", "Total score:", "The score is:",
    "Score (out of 5):"). Which head concludes:

    - The last one that begins a line. A "Total score:" that says something else makes it no vote; and so does one that
      stands alone, where the last one goes on in words ("Score: 5 would need more").
    - Where none does: the only one with a number that begins a sentence or an item of a list; where none does either,
      the only one inside a sentence, if nothing follows its number but punctuation.
    - One in a quotation never does; but the last line may be in quotation marks as a whole.
    - In a text that the length limit cut: only heads that begin a line, and all of them must give one number.

    What follows must be one number in [0, 5]: an integer or a decimal, also "4/5", "4 points out of 5". On a line below
    the head the number must have that line to itself, so that the "1." of a list is none.

    Otherwise the vote has no score:

    - NOT_A_NUMBER: no number follows ("four", "<total points>"), or the same sentence or the line below holds a second
      one ("4-5", "3 -> 4", "1 point + 1 point = 2", "4 and a half"); or heads contradict each other.
    - OUT_OF_RANGE: a number below 0 or above 5, or one on another scale ("4/10").
    - NO_SCORE, or UNFINISHED where `finished` is False: there is no head that could conclude.
    - UNFINISHED also where the length limit cut the text in the number, in what could still belong to it, or between
      two scores. A stop string ends a text with `finished` True, and the number then counts.

    Takes time linear in the text. Source: paper section 2.2; the handling of malformed scores is ours.
    """
    plain = _plain(text)
    head = _concluding(plain, finished)
    reading = head if isinstance(head, NoVote) else _number(plain, head, finished)
    if isinstance(reading, NoVote):
        return Vote(text=text, finished=finished, score=None, no_vote=reading)
    return Vote(text=text, finished=finished, score=reading, no_vote=None)


def after_head(text: str, finished: bool) -> int | None:
    """Where in `text` the score of its concluding head is to begin, dressing before it included, whether a number
    stands there or not; None where no head concludes. See `parse_vote`."""
    head = _concluding(_plain(text), finished)
    return None if isinstance(head, NoVote) else head.end


def _plain(text: str) -> str:
    """The text with one kind of line end, each character in its old place."""
    return text.replace("\r\n", " \n").replace("\r", "\n")


def _concluding(text: str, finished: bool) -> _Head | NoVote:
    heads = _heads(text, finished)
    free = [head for head in heads if not head.quoted]
    lines = [h for h in free if h.place is _Place.LINE and (_NUMBER.match(text, h.end) or not h.sentence)]
    if lines:
        *others, last = lines
        value = _number(text, last, finished)
        if finished:
            loose = not _stands_alone(text, last)
            others = [head for head in others if head.total or (loose and _stands_alone(text, head))][-1:]
        others = {_number(text, head, finished) for head in others}
        if isinstance(value, NoVote) or others <= {value, NoVote.NOT_A_NUMBER, NoVote.UNFINISHED}:
            return last
        return NoVote.NOT_A_NUMBER if finished else NoVote.UNFINISHED
    if not finished:
        return NoVote.UNFINISHED
    numbered = [h for h in free if _NUMBER.match(text, h.end) and not _REPORTED.search(text, *_before(h.start))]
    first = [head for head in numbered if head.place is _Place.SENTENCE]
    if len(first) == 1:
        return first[0]
    if len(numbered) > 1:
        return NoVote.NOT_A_NUMBER
    if numbered and _stands_alone(text, numbered[0]):
        return numbered[0]
    if not numbered and heads and _is_last_line(text, heads[-1]):
        return heads[-1]
    return NoVote.NOT_A_NUMBER if any(head.place is not _Place.INSIDE for head in free) else NoVote.NO_SCORE


def _heads(text: str, finished: bool) -> list[_Head]:
    waiting, quoted_to, heads = sorted(quotations(text, finished), reverse=True), 0, []
    for match in _HEAD.finditer(text):
        while waiting and waiting[-1][0] <= match.start():
            quoted_to = max(quoted_to, waiting.pop()[1])
        place, name = _Place.LINE, _LINE.search(text, *_before(match.start()))
        if name is None:
            place, name = _Place.SENTENCE, _SENTENCE.search(text, *_before(match.start()))
        head = _Head(
            start=match.start(),
            end=match.end(),
            place=_Place.INSIDE if name is None else place,
            quoted=match.end() <= quoted_to,
            total=name is not None and bool(name["total"]),
            sentence=bool(match["is"] or (name is not None and name["the"])),
            scale=match["scale"] or match["bare_scale"],
        )
        heads.append(head)
    return heads


def _before(start: int) -> tuple[int, int]:
    return max(0, start - _BEFORE), start


def _number(text: str, head: _Head, finished: bool) -> float | NoVote:
    """The number that follows a head."""
    number = _NUMBER.match(text, head.end)
    if number is None:
        nothing_yet = not finished and _NOTHING_YET.match(text, head.end)
        return NoVote.UNFINISHED if nothing_yet else NoVote.NOT_A_NUMBER
    if not finished and _MAYBE_CUT.fullmatch(text, number.end()):
        return NoVote.UNFINISHED
    after, scale = _after(text, number.end())
    end = _END.search(text, after)
    rest = text[after : end.start()]  # of the sentence
    second = (
        text[after : after + 1].isalnum()
        or any(unicodedata.category(character)[0] == "N" for character in rest)
        or _SECOND.search(rest)
        or _OPERATOR.search(rest)
        or _ANOTHER.match(text, end.start())
    )
    if second or ("\n" in number["gap"] and not _LINE_ENDS.match(text, after)):
        return NoVote.NOT_A_NUMBER
    value = float(number["digits"])  # a float, not an int: a million digits are infinity at once
    negative = number["sign"] not in ("", "+") and value > 0
    if negative or value > 5 or any(_is_not_five(given) for given in (head.scale, scale) if given):
        return NoVote.OUT_OF_RANGE
    if not finished and end.end() == len(text) and not end[0] and not _EXPLAINS.search(rest):
        return NoVote.UNFINISHED
    return value


def _after(text: str, position: int) -> tuple[int, str | None]:
    """The end of the unit and the scale that follow a number, and the scale."""
    if unit := _UNIT_AFTER.match(text, position):
        position = unit.end()
    scale = _SCALE.match(text, position)
    if scale is None:
        return position, None
    unit = _UNIT_AFTER.match(text, scale.end())
    return (unit or scale).end(), scale["scale"]


def _is_not_five(scale: str) -> bool:
    return scale.lower() != "five" and (not scale[0].isdigit() or float(scale) != 5)


def _stands_alone(text: str, head: _Head) -> bool:
    """Whether a number follows the head, and the sentence does not go on in words after it."""
    number = _NUMBER.match(text, head.end)
    return number is not None and _PROSE.match(text, _after(text, number.end())[0]) is None


def _is_last_line(text: str, head: _Head) -> bool:
    """Whether the text ends in a line that begins with the head, and no colon before it announces a quotation."""
    text = text.rstrip()
    start = text.rfind("\n") + 1
    if head.place is not _Place.LINE or head.start < start:
        return False
    return _stands_alone(text, head) and not text[:start].rstrip().endswith((":", "\uff1a"))
