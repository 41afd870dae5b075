"""What the fields of a settings dataclass may hold, declared beside their types:

    top_p: Annotated[float, above(0), at_most(1)]

The limits of an optional field are those of its value, if there is one. No float may be NaN or infinite.
"""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Annotated

from srlm_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Limit:
    """A condition on a value. `words` end the sentence "it must ..."."""

    words: str
    allows: Callable[[object], bool]


def at_least(bound: float) -> Limit:
    """The smallest value that is allowed."""
    return Limit(f"be at least {bound}", lambda value: value >= bound)


def above(bound: float) -> Limit:
    """A number below all values that are allowed."""
    return Limit(f"be above {bound}", lambda value: value > bound)


def at_most(bound: float) -> Limit:
    """The largest value that is allowed."""
    return Limit(f"be at most {bound}", lambda value: value <= bound)


def below(bound: float) -> Limit:
    """A number above all values that are allowed."""
    return Limit(f"be below {bound}", lambda value: value < bound)


def one_of(*options: str) -> Limit:
    """The values that are allowed."""
    return Limit(f"be {' or '.join(map(repr, options))}", lambda value: value in options)


# The types of many fields.
Count = Annotated[int, at_least(1), below(2**31)]  # an axis of an array is shorter than 2^31
Share = Annotated[float, at_least(0), at_most(1)]
Text = Annotated[str, Limit("not be blank", lambda value: bool(value.strip()))]


def refusal(kind: object, value: object, name: str) -> str | None:
    """Why the field `name`, declared as `kind`, must not hold `value`; None if it may.

    Args:
      kind: as `typing.get_type_hints(..., include_extras=True)` gives it.
      value: of that type.
    """
    if value is None or dataclasses.is_dataclass(value):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}: it must be a finite number"
    if isinstance(value, tuple):
        inner = [part for part in typing.get_args(kind) if part is not ...]
        kinds = inner * len(value) if len(inner) == 1 else inner
        reasons = (refusal(part, item, f"{name}[{i}]") for i, (part, item) in enumerate(zip(kinds, value, strict=True)))
        return next((reason for reason in reasons if reason), None)
    conditions = limits_of(kind)
    if all(limit.allows(value) for limit in conditions):
        return None
    return f"{name} is {value!r:.60}: it must {' and '.join(limit.words for limit in conditions)}"


def limits_of(kind: object) -> tuple[Limit, ...]:
    """The limits that a field is declared with: those of `Count` too in `Count | None`."""
    if typing.get_origin(kind) is Annotated:
        return kind.__metadata__
    return tuple(limit for option in typing.get_args(kind) for limit in limits_of(option))


def check(settings: object) -> None:
    """Refuses a value outside the limits of its field.

    Raises:
      BadInput: the message holds the field, its value and what is allowed.
    """
    kinds = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        if reason := refusal(kinds[field.name], getattr(settings, field.name), field.name):
            raise BadInput(reason)
