"""From a judgement's text to its score (paper section 2.2: the judge concludes with "Score: <total points>").

The paper does not give its expression; the rules here are ours, and strict where a guess could be wrong.
"""

import re

from srlm_jax.records import NoVote, Vote

# Typographic quotes, no-break space, minus sign and dashes are spelled as escapes: they look like their plain kin.
_DRESS = "\\s\u00a0*_`\"'\u2018\u2019\u201c\u201d"
_DASH = "\\-\u2212\u2013\u2014"

# "Score:" and its dressed forms (**Score:**, "Score": ...), but not the end of "underscore:".
_HEAD = re.compile(rf"(?<![A-Za-z0-9])score[{_DRESS}]*:", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(
    rf"(?P<gap>[{_DRESS}<\[(]*)(?P<sign>[+{_DASH}]?)(?P<digits>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII
)
# What may follow a number. A scale: "/5", "out of 5". More of the number: "4.5.6", "4,5", "1e3", "80%", "4th".
# Another number: "4-5", "4 to 5", "1+1+1".
_SCALE = re.compile(rf"[{_DRESS}]*(?:/|out of)[{_DRESS}]*(?P<scale>[0-9]+(?:\.[0-9]+)?)", re.IGNORECASE | re.ASCII)
_MORE = re.compile(rf"[A-Za-z%]|[.,:][0-9]|[ \t]*(?:[+~{_DASH}]|to |or )[ \t]*[0-9]", re.IGNORECASE | re.ASCII)
_LINE_END = re.compile(
    rf"(?:[{_DRESS}>\])]*/[{_DRESS}]*5)?[ \t\r\u00a0*_`\"'\u2018\u2019\u201c\u201d.>\])]*(?:\n|\Z)", re.ASCII
)
_MAYBE_CUT = re.compile(r"[0-9./,]*")


def parse_vote(text: str, finished: bool) -> Vote:
    """The vote of one judgement. `text` is the completion alone, never the prompt with it: the prompt quotes
    "Score: <total points>" and the response, which may hold anything.

    The last "Score:" counts (upper or lower case; quotes, asterisks or spaces around it), and a number in [0, 5]
    after it: integers and decimals, also "4/5" and "4 out of 5". Otherwise the vote has no score:

    - NOT_A_NUMBER: what follows the last "Score:" is no single plain number ("four", "<total points>", "4-5", "1e3"),
      even where an earlier "Score:" has one. A number on a line below "Score:" must have that line to itself, so that
      the "1." of a list is none.
    - OUT_OF_RANGE: a number below 0 or above 5, or one on another scale ("4/10").
    - NO_SCORE, or UNFINISHED where `finished` is False: there is no "Score:".
    - UNFINISHED also where the length limit cut the text in or right after the number: the "4" may have been the
      start of "4.5". A stop string ends a text with `finished` True, and the number then counts.

    Takes time linear in the text. Source: paper section 2.2; the handling of malformed scores is ours.
    """
    heads = list(_HEAD.finditer(text))
    if not heads:
        return _no_vote(text, finished, NoVote.NO_SCORE if finished else NoVote.UNFINISHED)
    end = heads[-1].end()
    number = _NUMBER.match(text, end)
    if number is None:
        nothing_yet = not finished and not text[end:].strip("*_`\"'\u2018\u2019\u201c\u201d \t\n")
        return _no_vote(text, finished, NoVote.UNFINISHED if nothing_yet else NoVote.NOT_A_NUMBER)
    if not finished and _MAYBE_CUT.fullmatch(text, number.end()):
        return _no_vote(text, finished, NoVote.UNFINISHED)
    if "\n" in number["gap"] and not _LINE_END.match(text, number.end()):
        return _no_vote(text, finished, NoVote.NOT_A_NUMBER)
    scale = _SCALE.match(text, number.end())
    if scale is None and _MORE.match(text, number.end()):
        return _no_vote(text, finished, NoVote.NOT_A_NUMBER)
    value = float(number["digits"])  # a float, not an int: a million digits are infinity at once
    negative = number["sign"] not in ("", "+") and value > 0
    if negative or value > 5 or (scale is not None and float(scale["scale"]) != 5):
        return _no_vote(text, finished, NoVote.OUT_OF_RANGE)
    return Vote(text=text, finished=finished, score=value, no_vote=None)


def after_head(text: str) -> int | None:
    """Where in `text` the score of its concluding "Score:" is to begin, dressing before it included; None where no head
    concludes."""
    heads = list(_HEAD.finditer(text))
    return heads[-1].end() if heads else None


def _no_vote(text: str, finished: bool, reason: NoVote) -> Vote:
    return Vote(text=text, finished=finished, score=None, no_vote=reason)
