"""Small charts as shapes in pixels: everything a template needs to write an SVG, and nothing about style.

Each function takes data and gives a `Panel`. Colours are CSS classes ("s0", "s1", ... for series), so that the page
decides how they look in light and in dark mode.
"""

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 10, 40  # the left holds ticks like "−0.0005" and the axis' name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """One SVG element: its name, its geometry, its CSS classes and the text shown under the pointer ("" for none)."""

    element: str
    geometry: dict[str, float | str]
    style: str
    tip: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart. Ticks are (pixel, text); `legend` is (CSS class, text); left, right, top and bottom frame the plot."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    legend: list[tuple[str, str]]
    caption: str
    height: int
    left: int
    right: int
    top: int
    bottom: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A named curve through (x, y) points, in rising x."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A named distribution: its 5, 25, 50, 75 and 95 % quantiles, its mean and its size."""

    label: str
    style: str
    quantiles: Sequence[float]
    mean: float
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The straight map from data between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About `count` round values within the scale, as (pixel, text)."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(index * step), _text(index * step)) for index in range(first, last + 1)]


def _text(value: float) -> str:
    return f"{value / 1000:.6g}k" if abs(value) >= 10_000 else f"{value:.6g}".replace("-", "\N{MINUS SIGN}", 1)


def _across(low: float, high: float) -> Scale:
    return Scale(low=low, high=high, start=_LEFT, end=WIDTH - _RIGHT)


def _upward(low: float, high: float) -> Scale:
    return Scale(low=low, high=high, start=HEIGHT - _BOTTOM, end=_TOP)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def _slots(labels: Sequence[str]) -> list[tuple[float, str]]:
    width = (WIDTH - _LEFT - _RIGHT) / len(labels)
    return [(round(_LEFT + (index + 0.5) * width, 2), label) for index, label in enumerate(labels)]


def _mark(element: str, style: str, tip: str, **geometry: float | str) -> Mark:
    return Mark(element=element, geometry=geometry, style=style, tip=tip)


def _panel(
    *,
    title: str,
    labels: tuple[str, str],
    ticks: tuple[list[tuple[float, str]], list[tuple[float, str]]],
    marks: list[Mark],
    legend: list[tuple[str, str]],
    caption: str,
) -> Panel:
    return Panel(
        title=title,
        x_label=labels[0],
        y_label=labels[1],
        x_ticks=ticks[0],
        y_ticks=ticks[1],
        marks=marks,
        legend=legend,
        caption=caption,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
    )


def curves(title: str, y_label: str, lines: Sequence[Line]) -> Panel:
    """Lines over training steps. A line of one point is drawn as a dot."""
    x = _across(*_padded([step for line in lines for step, _ in line.points]))
    y = _upward(*_padded([value for line in lines for _, value in line.points]))
    marks = []
    for line in lines:
        path = " ".join(f"{x(step):g},{y(value):g}" for step, value in line.points)
        last = line.points[-1]
        tip = f"{line.label}: {line.points[0][1]:.4g} to {last[1]:.4g} at step {last[0]:g}"
        marks.append(_mark("polyline", f"line {line.style}", tip, points=path))
        marks.append(_mark("circle", f"dot {line.style}", tip, cx=x(last[0]), cy=y(last[1]), r=2.5))
    ticks = (x.ticks(5), y.ticks(5))
    legend = [(line.style, line.label) for line in lines]
    return _panel(title=title, labels=("step", y_label), ticks=ticks, marks=marks, legend=legend, caption="")


def estimates(title: str, y_label: str, values: Sequence[tuple[str, str, float, float]], caption: str) -> Panel:
    """Points with bars of one standard error: values are (label, style, value, standard error)."""
    y = _upward(*_padded([value + sign * error for _, _, value, error in values for sign in (-1, 1)]))
    slots = _slots([label for label, *_ in values])
    path = " ".join(f"{at:g},{y(value):g}" for (at, _), (_, _, value, _) in zip(slots, values, strict=True))
    marks = [_mark("polyline", "thread", "", points=path)]
    for (at, _), (label, style, value, error) in zip(slots, values, strict=True):
        tip = f"{label}: {value:.4g} ± {error:.2g}"
        marks.append(_mark("line", f"line {style}", tip, x1=at, x2=at, y1=y(value - error), y2=y(value + error)))
        marks.append(_mark("circle", f"dot {style}", tip, cx=at, cy=y(value), r=5))
    return _panel(
        title=title, labels=("model", y_label), ticks=(slots, y.ticks(5)), marks=marks, legend=[], caption=caption
    )


def histogram(
    title: str, labels: tuple[str, str], style: str, shares: Sequence[float], top: float, mean: float, caption: str
) -> Panel:
    """Bars of `shares` (in percent) centred on equally spaced values from 0 to 5; a line marks the mean.

    `top` is the highest share on the y axis, so that panels side by side can be compared.
    """
    gap = 5 / (len(shares) - 1)
    x, y = _across(-0.6 * gap, 5 + 0.6 * gap), _upward(0, 1.08 * top)
    width = 0.84 * (x(gap) - x(0))
    marks = [
        _mark(
            "rect",
            f"bar {style}",
            f"score {index * gap:.3g}: {share:.1f} %",
            x=round(x(index * gap) - width / 2, 2),
            y=y(share),
            width=round(width, 2),
            height=round(y(0) - y(share), 2),
        )
        for index, share in enumerate(shares)
        if share
    ]
    marks.append(_mark("line", "mean", f"mean {mean:.2f}", x1=x(mean), x2=x(mean), y1=y(0), y2=_TOP))
    ticks = ([(x(score), str(score)) for score in range(6)], y.ticks(5))
    return _panel(title=title, labels=labels, ticks=ticks, marks=marks, legend=[], caption=caption)


def spreads(title: str, y_label: str, groups: Sequence[Spread], caption: str) -> Panel:
    """A box per group over its middle half, whiskers to 5 and 95 %, a bar at the median, a ring at the mean."""
    y = _upward(0, 1.08 * max(max(group.quantiles[-1], group.mean) for group in groups) or 1.0)
    slots = _slots([group.label for group in groups])
    half = min(22.0, 0.3 * (WIDTH - _LEFT - _RIGHT) / len(groups))
    marks = []
    for (at, _), group in zip(slots, groups, strict=True):
        low, quarter, median, three, high = map(y, group.quantiles)
        tip = (
            f"{group.label}: mean {group.mean:.1f}, median {group.quantiles[2]:g}, 5 to 95 % "
            f"{group.quantiles[0]:g} to {group.quantiles[4]:g}, {group.n} responses"
        )
        box = {"x": round(at - half, 2), "y": three, "width": 2 * half, "height": round(max(quarter - three, 1), 2)}
        marks.append(_mark("line", f"line {group.style}", tip, x1=at, x2=at, y1=low, y2=high))
        marks.append(_mark("rect", f"box {group.style}", tip, **box))
        marks.append(_mark("line", f"line {group.style}", tip, x1=at - half, x2=at + half, y1=median, y2=median))
        marks.append(_mark("circle", f"ring {group.style}", tip, cx=at, cy=y(group.mean), r=3.5))
    return _panel(title=title, labels=("", y_label), ticks=(slots, y.ticks(5)), marks=marks, legend=[], caption=caption)


def stacks(
    title: str,
    x_label: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, str, int]]]],
    legend: list[tuple[str, str]],
) -> Panel:
    """One bar of 100 % a row, split by count: a row is (label, [(style, name, count), ...]), its counts not all 0.

    The legend is the caller's: (style, name) of each part, or none.
    """
    step, left, top = 30, 20 + 7 * max(len(label) for label, _ in rows), 4
    bottom = top + step * len(rows)
    x = Scale(low=0, high=100, start=left, end=WIDTH - _RIGHT)
    marks, names = [], []
    for index, (label, parts) in enumerate(rows):
        names.append((top + step * (index + 0.5), label))
        total, done = sum(count for *_, count in parts), 0
        for style, name, count in parts:
            share = 100 / total
            box = {"x": x(done * share), "width": round(x((done + count) * share) - x(done * share), 2)}
            tip = f"{label}, {name}: {count} of {total} ({count * share:.1f} %)"
            if count:
                marks.append(_mark("rect", f"part {style}", tip, y=top + step * index + 5, height=step - 10, **box))
            done += count
    return Panel(
        title=title,
        x_label=x_label,
        y_label="",
        x_ticks=x.ticks(4),
        y_ticks=names,
        marks=marks,
        legend=legend,
        caption="",
        height=bottom + 40,
        left=left,
        right=WIDTH - _RIGHT,
        top=top,
        bottom=bottom,
    )


def heat(title: str, labels: tuple[str, str], style: str, points: Sequence[tuple[float, float]], caption: str) -> Panel:
    """How often each (x, y) of two scores between 0 and 5 occurs, in cells of 1 by 1/2; a line joins the mean y of
    each x. The area of a square is proportional to its count."""
    x, y = _across(-0.5, 5.5), _upward(-0.35, 5.35)
    counts: dict[tuple[int, float], int] = {}
    columns: dict[int, list[float]] = {}
    for first, second in points:
        cell = (math.floor(first + 0.5), math.floor(2 * second + 0.5) / 2)
        counts[cell] = counts.get(cell, 0) + 1
        columns.setdefault(cell[0], []).append(second)
    most, marks = max(counts.values()), []
    for (column, row), count in sorted(counts.items()):
        side = round(max(13 * math.sqrt(count / most), 1.5), 2)
        at = {"x": round(x(column) - side / 2, 2), "y": round(y(row) - side / 2, 2)}
        tip = f"{labels[0]} {column}, {labels[1]} about {row:g}: {count} responses"
        marks.append(_mark("rect", f"bar {style}", tip, width=side, height=side, **at))
    means = [(column, sum(values) / len(values)) for column, values in sorted(columns.items())]
    path = " ".join(f"{x(column):g},{y(value):g}" for column, value in means)
    marks.append(_mark("polyline", "mean", "mean of the judge's score at each oracle score", points=path))
    ticks = ([(x(score), str(score)) for score in range(6)], [(y(score), str(score)) for score in range(6)])
    return _panel(title=title, labels=labels, ticks=ticks, marks=marks, legend=[], caption=caption)
