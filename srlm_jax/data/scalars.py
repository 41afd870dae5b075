"""Texts, whole numbers and marks as files have them: pandas writes 0 as 0.0, CSV writes everything as text."""

import math
import re
from fractions import Fraction

_WHOLE = re.compile(r"\s*[+-]?\d{1,18}(\.0*)?\s*")


class Misfit(ValueError):
    """A value of the wrong type; the message names its field and says what was expected."""


def text(value: object, field: str) -> str:
    """A text; "" for null. Raises Misfit for anything else, and for text that UTF-8 cannot hold."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _misfit(field, "str", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Misfit(f"field '{field}': not text that UTF-8 can hold (a lone surrogate)") from None
    return value


def whole(value: object, field: str) -> int:
    """A whole number: 3, 3.0, "3" or "3.0". Raises Misfit for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(Fraction(value.strip().removesuffix(".")))
    raise _misfit(field, "int", value)


def mark(value: object, field: str) -> bool:
    """True or false, also as text or as 0 or 1; false for null. Raises Misfit for anything else."""
    if value is None or isinstance(value, bool):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else value
    for meaning, words in ((False, ("false", "0", 0)), (True, ("true", "1", 1))):
        if word in words:
            return meaning
    raise _misfit(field, "bool", value)


def identity(value: object, field: str) -> str | None:
    """An id as text: that of 7 and of 7.0 is "7"; None for null and for a blank. Raises Misfit for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(whole(value, field))
    if isinstance(value, bool):
        raise _misfit(field, "str", value)
    return text(value, field) if text(value, field).strip() else None


def _misfit(field: str, expected: str, value: object) -> Misfit:
    return Misfit(f"field '{field}': expected {expected}, found {value!r:.60}")
