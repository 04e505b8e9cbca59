"""Charts of a comparison as SVG, written by hand: intervals, scattered runs with their means, curves over steps.

They take their colours from the page's style sheet, report.css (classes `c0` to `c7`, `ink`, `faint`, `grid`), so that
they follow its light and dark scheme, and are drawn 440 units wide, to be read on a phone without scrolling. Every
chart has a title and a description for those who do not see it; every series is named beside its points, not by its
colour alone.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, FONT = 440, 12
LETTER = 0.62 * FONT
"""Mean width of a letter in the widest of the usual fonts."""
PALETTE = 8
"""Colours of the style sheet."""


class Series(NamedTuple):
    """Points of one name: runs of a scatter, or steps of a curve."""

    name: str
    color: int
    points: Sequence[tuple[float, float]]


class IntervalRow(NamedTuple):
    """One mark of an interval chart; its shape, the learner's number, tells learners apart."""

    name: str
    color: int
    value: float
    low: float
    high: float
    shape: int
    tooltip: str


class _Frame(NamedTuple):
    """The plotting area in units, and the values at its edges; a logarithmic x axis has `log`."""

    left: float
    top: float
    right: float
    bottom: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    log: bool = False

    def x(self, value: float) -> float:
        low, high = map(math.log, self.xs) if self.log else self.xs
        share = ((math.log(value) if self.log else value) - low) / ((high - low) or 1)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.ys
        return self.bottom - (value - low) / ((high - low) or 1) * (self.bottom - self.top)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between two, about so many: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if span / (s * power) <= count)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    if len(inside) < 2:
        return ticks(low, high, 4)
    return inside if len(inside) <= 6 else [value for value in inside if f"{value:e}"[0] == "1"]


def _padded(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.07 * (high - low) or 0.07 * abs(high) or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def _svg(height: float, title: str, description: str, parts: Sequence[str]) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _write(x: float, y: float, text: str, css: str = "ink", anchor: str = "start") -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{place}>{escape(text)}</text>'


def shorten(name: str, limit: int = 22) -> str:
    """A name of at most so many letters, its middle left out."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit - limit // 2) :]}"


def _axes(frame: _Frame, x_title: str, y_title: str, x_form: Callable, y_form: Callable) -> list[str]:
    """Grid, labels of the ticks, and the titles: y's above the chart, where it is read without turning the head."""
    parts = []
    for value in ticks(*frame.ys):
        y = frame.y(value)
        parts.append(_line(frame.left, y, frame.right, y, "grid"))
        parts.append(_write(frame.left - 6, y + 4, y_form(value), "faint", "end"))
    for value in _log_ticks(*frame.xs) if frame.log else ticks(*frame.xs):
        parts.append(_line(frame.x(value), frame.top, frame.x(value), frame.bottom, "grid"))
        parts.append(_write(frame.x(value), frame.bottom + 16, x_form(value), "faint", "middle"))
    parts.append(_write(4, frame.top - 10, y_title, "ink"))
    parts.append(_write(frame.right, frame.bottom + 34, x_title, "ink", "end"))
    return parts


def intervals(
    title: str, rows: Sequence[IntervalRow], references: Sequence[tuple[str, float]], learners: Sequence[str]
) -> str:
    """Means with intervals, one line a recipe and on it one mark a learner; references are upright lines.

    Args:
        rows: in the order to draw; those of one name share a line.
        references: (name, value), such as what the untrained base answers.
        learners: names of the shapes.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    height_of = 34.0 if len(learners) > 1 else 26.0
    left = 16 + LETTER * max(len(shorten(name)) for name in names)
    top = 36 + 15 * len(references)
    frame = _Frame(left, top, WIDTH - 12, top + height_of * len(names), (0, 0), (0, 0))
    highest = max([row.high for row in rows] + [value for _, value in references])
    frame = frame._replace(xs=(0.0, min(1.0, 1.08 * highest) or 1.0))
    parts = []
    for number, learner in enumerate(learners):
        x = 8 + number * (26 + LETTER * max(map(len, learners)))
        parts += [_mark(x, 12, 0, number, "ink-mark"), _write(x + 11, 16, learner)]
    for value in ticks(*frame.xs):
        parts.append(_line(frame.x(value), frame.top, frame.x(value), frame.bottom, "grid"))
        anchor = "end" if frame.x(value) > WIDTH - 2 * LETTER else "middle"
        parts.append(_write(frame.x(value), frame.bottom + 16, f"{100 * value:g} %", "faint", anchor))
    for number, (name, value) in enumerate(references):
        x, y = frame.x(value), 42 + 15 * number
        right = x + 8 + LETTER * len(name) > WIDTH
        parts.append(_line(x, y - 8, x, frame.bottom, "reference"))
        parts.append(_write(x - 5 if right else x + 5, y, name, "faint", "end" if right else "start"))
    for row in rows:
        line, same = names.index(row.name), [other for other in rows if other.name == row.name]
        offset = (same.index(row) - (len(same) - 1) / 2) * 12
        y = frame.top + height_of * (line + 0.5) + offset
        css = f"c{row.color % PALETTE}"
        parts.append(f"<g><title>{escape(row.tooltip)}</title>")
        parts.append(_line(frame.x(max(row.low, 0)), y, frame.x(row.high), y, f"whisker {css}"))
        parts.append(_mark(frame.x(row.value), y, row.color, row.shape) + "</g>")
    for number, name in enumerate(names):
        y = frame.top + height_of * (number + 0.5) + 4
        parts.append(_write(frame.left - 10, y, shorten(name), "ink", "end"))
    description = "; ".join(row.tooltip for row in rows)
    return _svg(frame.bottom + 24, title, description, parts)


def _mark(x: float, y: float, color: int, shape: int = 0, css: str = "") -> str:
    """A filled circle, a hollow square, diamond, triangle or circle."""
    css = css or f"c{color % PALETTE}"
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="mark {css}"/>'
    if shape == 3:
        corners = f"{x - 5:.1f},{y + 4:.1f} {x + 5:.1f},{y + 4:.1f} {x:.1f},{y - 5:.1f}"
        return f'<polygon points="{corners}" class="hollow {css}"/>'
    if shape > 3:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="hollow {css}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == 2 else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" class="hollow {css}"{turn}/>'


def scatter(
    title: str,
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    x_form: Callable[[float], str],
    y_form: Callable[[float], str],
    xs: Sequence[float],
    ys: Sequence[float],
    log: bool = False,
) -> str:
    """One small point a run, joined to the mean of its series, which bears the name.

    Args:
        xs, ys: values that the axes cover; charts given the same ones can be compared. x's of a logarithmic axis are
            positive.
    """
    limits = (min(xs) / 1.15, max(xs) * 1.15) if log else _padded(xs)
    frame = _Frame(54, 32, WIDTH - 14, 310, limits, _padded(ys, zero=True), log)
    parts = _axes(frame, x_title, y_title, x_form, y_form)
    if frame.ys[0] < 0 < frame.ys[1]:
        parts.append(_line(frame.left, frame.y(0), frame.right, frame.y(0), "reference"))
    means, runs = [], []
    for one in series:
        mean = np.mean(one.points, axis=0)
        x, y = frame.x(float(mean[0])), frame.y(float(mean[1]))
        means.append((x, y))
        for point in one.points:
            place = frame.x(point[0]), frame.y(point[1])
            runs.append(place)
            parts.append(_line(x, y, *place, f"thin c{one.color % PALETTE}"))
            parts.append(
                f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="2.5" class="run c{one.color % PALETTE}"/>'
            )
    for (x, y), one in zip(means, series, strict=True):
        parts.append(_mark(x, y, one.color))
    parts += _labels(frame, means, runs, series)
    description = "; ".join(
        f"{one.name}: {x_form(float(np.mean([x for x, _ in one.points])))},"
        f" {y_form(float(np.mean([y for _, y in one.points])))}"
        for one in series
    )
    return _svg(frame.bottom + 42, title, f"Means. {description}", parts)


def _labels(
    frame: _Frame, means: Sequence[tuple[float, float]], runs: Sequence[tuple[float, float]], series: Sequence[Series]
) -> list[str]:
    """Names beside the means: each at the nearest place, of a widening ring, where it covers no mean and no other name.

    Of such places at one distance, the one that covers the fewest points of runs.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in means]
    parts = []
    for (x, y), one in sorted(zip(means, series, strict=True), key=lambda pair: pair[0][1]):
        text = shorten(one.name)
        width, height = LETTER * len(text), FONT + 1.0
        found = None
        for distance in (10, 18, 28, 40, 54, 70, 90, 115, 145):
            free = []
            for angle in (0, 180, -35, 35, -145, 145, -90, 90, -62, 62, -118, 118):
                dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
                left = x + dx - (0 if dx > 1 else width if dx < -1 else width / 2)
                box = (left, y + dy - height / 2, left + width, y + dy + height / 2)
                inside = box[0] > frame.left and box[2] < WIDTH and box[1] > frame.top - 4 and box[3] < frame.bottom
                if inside and not any(_overlap(box, other) for other in taken):
                    covered = sum(_overlap(box, (a - 2, b - 2, a + 2, b + 2)) for a, b in runs)
                    free.append((covered, len(free), box, (x + dx, y + dy)))
            if free:
                found = min(free)
                break
        if found is None:  # the mean keeps its tooltip, and the table its row
            continue
        _, _, box, end = found
        taken.append(box)
        if distance > 10:
            parts.append(_line(x, y, *end, f"leader c{one.color % PALETTE}"))
        parts.append(_write(box[0], box[3] - 3, text, f"label c{one.color % PALETTE}"))
    return parts


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def curves(
    title: str, series: Sequence[Series], x_title: str, x_form: Callable[[float], str], y_form: Callable[[float], str]
) -> str:
    """Lines over steps, named at their right ends."""
    points = [point for one in series for point in one.points]
    names = [shorten(one.name, 18) for one in series]
    right = WIDTH - 16 - LETTER * max(map(len, names))
    bottom = max(230.0, 34 + 15.0 * len(series))
    xs = (min(x for x, _ in points), max(x for x, _ in points))
    frame = _Frame(50, 12, right, bottom, xs, _padded([y for _, y in points]))
    parts = _axes(frame, x_title, "", x_form, y_form)
    order = sorted(range(len(series)), key=lambda number: -series[number].points[-1][1])
    heights = _spread([frame.y(series[number].points[-1][1]) for number in order], 15, frame.top, frame.bottom)
    for number, height in zip(order, heights, strict=True):
        one, css = series[number], f"c{series[number].color % PALETTE}"
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in one.points)
        dash = " dashed" if one.color >= PALETTE else ""
        parts.append(
            f'<polyline points="{line}" class="curve {css}{dash}"><title>{escape(one.name)}</title></polyline>'
        )
        x, y = frame.x(one.points[-1][0]), frame.y(one.points[-1][1])
        parts.append(_line(x, y, right + 9, height, f"leader {css}"))
        parts.append(_write(right + 11, height + 4, names[number], f"label {css}"))
    ends = "; ".join(f"{one.name} ends at {y_form(one.points[-1][1])}" for one in series)
    return _svg(frame.bottom + 42, title, ends, parts)


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights, moved to lie at least `gap` apart, and between `low` and `high` where they fit."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else max(height, low))
    last = len(moved) - 1
    return [min(height, high - gap * (last - number)) for number, height in enumerate(moved)]
