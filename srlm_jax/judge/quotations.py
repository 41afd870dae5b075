"""Which parts of a text are quotations: in quotation marks, in code marks, or on lines that begin with ">"."""

import re

# Typographic marks are spelled as escapes: they look like their plain kin.
_DOUBLE = re.compile('["\u201c\u201d\u201e\u00ab\u00bb]')
_SINGLE = re.compile("['\u2018\u2019]")
_CODE = re.compile("`+")
_BLOCK = re.compile(r"^ {0,3}>.*", re.MULTILINE)

_OPENERS = "\u201c\u201e\u00ab\u2018"
_CLOSERS = "\u201d\u00bb"  # the single one is an apostrophe too


def quotations(text: str, finished: bool) -> list[tuple[int, int]]:
    """The (start, end) of each quotation, its marks included, in no order.

    A mark opens where no letter or digit stands before it and no space after it, and closes where it is the other way
    round, so that an apostrophe or the sign for inches is neither. A double mark that is never closed quotes the rest
    of its line, and the rest of the text where `finished` is False. Marks around the whole text quote nothing.

    Takes time linear in the text.
    """
    spans = _between(text, _DOUBLE, finished) + _between(text, _SINGLE, None) + _between(text, _CODE, None)
    spans += [match.span() for match in _BLOCK.finditer(text)]
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    return [(start, end) for start, end in spans if start > first or end < last]


def _between(text: str, marks: re.Pattern, finished: bool | None) -> list[tuple[int, int]]:
    """`finished` None: what is not closed is no quotation."""
    spans, opened = [], None
    for mark in marks.finditer(text):
        before, after = text[mark.start() - 1 : mark.start()], text[mark.end() : mark.end() + 1]
        opens = mark[0] in _OPENERS or not (before.isalnum() or after.isspace() or not after)
        closes = mark[0] in _CLOSERS or not (after.isalnum() or before.isspace() or not before)
        if mark[0] in _OPENERS or mark[0] in _CLOSERS:
            opens, closes = mark[0] in _OPENERS, mark[0] in _CLOSERS
        if marks is _CODE:
            opens = closes = True
        if closes and opened is not None:
            spans.append((opened, mark.end()))
            opened = None
        elif opens:
            if opened is not None and finished is not None:
                line_end = text.find("\n", opened, mark.start())
                spans += [(opened, line_end)] if line_end != -1 else []
            opened = mark.start()
    if opened is not None and finished is not None:
        line_end = text.find("\n", opened) if finished else -1
        spans.append((opened, len(text) if line_end == -1 else line_end))
    return spans
