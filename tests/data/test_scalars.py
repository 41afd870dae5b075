import math

import pytest

from srlm_jax.data.scalars import Misfit, identity, mark, text, whole


@pytest.mark.parametrize(
    ("value", "number"), [(3, 3), (3.0, 3), (-1.0, -1), ("3", 3), (" 3.0 ", 3), ("3.", 3), (-0.0, 0)]
)
def test_whole_numbers(value, number):
    assert whole(value, "x") == number and type(whole(value, "x")) is int


@pytest.mark.parametrize("value", [1.5, "1.5", "", "one", "1e3", True, None, [1], math.nan, math.inf])
def test_what_is_no_whole_number_is_refused_with_its_field(value):
    with pytest.raises(Misfit, match=r"field 'a\.b': expected int, found "):
        whole(value, "a.b")


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(True, True), (None, False), ("True", True), ("false", False), (1.0, True), (0, False), ("0", False)],
)
def test_marks(value, meaning):
    assert mark(value, "x") is meaning


@pytest.mark.parametrize("value", ["no", 2, [], ""])
def test_what_is_no_mark_is_refused(value):
    with pytest.raises(Misfit, match="field 'x': expected bool"):
        mark(value, "x")


@pytest.mark.parametrize(
    ("value", "name"), [("a", "a"), (7, "7"), (7.0, "7"), ("7.0", "7.0"), (None, None), (" ", None), ("", None)]
)
def test_ids_are_text(value, name):
    assert identity(value, "id") == name


@pytest.mark.parametrize("value", [True, 7.5, ["a"], "\ud83d"])
def test_what_is_no_id_is_refused(value):
    with pytest.raises(Misfit, match="field 'id'"):
        identity(value, "id")


def test_texts():
    assert text("ü", "x") == "ü" and text(None, "x") == ""
    with pytest.raises(Misfit, match="field 'x': expected str, found 3"):
        text(3, "x")
    with pytest.raises(Misfit, match="a lone surrogate"):
        text("\ud83d", "x")
