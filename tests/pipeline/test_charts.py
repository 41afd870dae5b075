"""Charts: where data lands in pixels. A plot is 340 wide and 210 high, framed at x 48 to 328 and y 10 to 170."""

import pytest

from srlm_jax.pipeline import charts


def test_a_scale_is_a_straight_map_and_may_point_up():
    scale = charts.Scale(low=0.0, high=4.0, start=170.0, end=10.0)
    assert [scale(value) for value in (0.0, 1.0, 4.0)] == [170.0, 130.0, 10.0]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (-0.03, 1.02, ["0", "0.5", "1"]),
        (
            -61,
            -38,
            ["\N{MINUS SIGN}60", "\N{MINUS SIGN}55", "\N{MINUS SIGN}50", "\N{MINUS SIGN}45", "\N{MINUS SIGN}40"],
        ),
        (0, 48_000, ["0", "10k", "20k", "30k", "40k"]),
        (0, 3e-4, ["0", "0.0001", "0.0002", "0.0003"]),
    ],
)
def test_ticks_are_round_numbers_within_the_scale(low, high, texts):
    assert [text for _, text in charts.Scale(low=low, high=high, start=0, end=1).ticks(5)] == texts


def test_a_constant_curve_of_one_point_has_a_place():
    panel = charts.curves("loss", "nats", [charts.Line(label="M1", style="s2", points=[(10.0, 0.5)])])
    dot = panel.marks[-1]
    assert (dot.element, dot.geometry["cx"], dot.geometry["cy"]) == ("circle", 194.0, 90.0)  # the middle of the plot


def test_an_error_bar_spans_one_standard_error_either_way():
    panel = charts.estimates("score", "points", [("M1", "s2", 2.0, 0.5), ("M2", "s3", 3.0, 0.25)], "")
    _, bar, dot, *_ = panel.marks
    assert bar.geometry["y1"] - dot.geometry["cy"] == pytest.approx(dot.geometry["cy"] - bar.geometry["y2"], abs=0.02)
    assert dot.tip == "M1: 2 ± 0.5"


def test_bars_of_a_histogram_are_as_high_as_their_share():
    panel = charts.histogram("M1", ("score", "%"), "s2", [0.0, 25.0, 0.0, 50.0, 25.0, 0.0], 50.0, 2.5, "")
    bars = [mark for mark in panel.marks if mark.element == "rect"]
    assert [mark.tip for mark in bars] == ["score 1: 25.0 %", "score 3: 50.0 %", "score 4: 25.0 %"]
    assert bars[1].geometry["height"] == pytest.approx(2 * bars[0].geometry["height"], abs=0.02)
    assert bars[1].geometry["height"] == pytest.approx(160 / 1.08, abs=0.02)


def test_a_stack_fills_its_row_whatever_the_counts():
    panel = charts.stacks("pairs", "%", [("M2", [("r0", "kept", 3), ("r1", "tie", 0), ("r2", "same text", 1)])], [])
    kept, same = panel.marks
    assert kept.geometry["width"] == pytest.approx(3 * same.geometry["width"], abs=0.02)
    assert same.geometry["x"] + same.geometry["width"] == pytest.approx(panel.right)
    assert kept.tip == "M2, kept: 3 of 4 (75.0 %)"


def test_a_box_lies_between_its_quartiles():
    spread = charts.Spread(label="M1", style="s2", quantiles=(10, 20, 30, 40, 100), mean=35.0, n=5)
    whisker, box, median, ring = charts.spreads("length", "tokens", [spread], "").marks
    pixels = 160 / 108  # of one token: the axis ends 8 % above the highest whisker
    assert whisker.geometry["y1"] - whisker.geometry["y2"] == pytest.approx(90 * pixels, abs=0.02)
    assert box.geometry["height"] == pytest.approx(20 * pixels, abs=0.02)
    assert median.geometry["y1"] == pytest.approx(170 - 30 * pixels, abs=0.02)
    assert ring.geometry["cy"] == pytest.approx(170 - 35 * pixels, abs=0.02)


def test_the_area_of_a_heat_square_is_its_count():
    panel = charts.heat("M2", ("oracle", "judge"), "s3", [(4.0, 4.0)] * 4 + [(1.0, 2.0)], "")
    rare, often, means = panel.marks
    assert often.geometry["width"] == 2 * rare.geometry["width"]
    assert often.tip == "oracle 4, judge about 4: 4 responses"
    assert len(str(means.geometry["points"]).split()) == 2
