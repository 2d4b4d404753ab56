"""SVG charts: curves over the steps of a run, and histograms of two sets of numbers; values are tooltips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from .curves import smooth
from .panels import Line, Panel

WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 54, 10, 24
GRID, TEXT = "#e7e5e4", "#78716c"
BEFORE, AFTER = "#94a3b8", "#0f766e"


class Scale(NamedTuple):
    """A linear map from `low`..`high` to the coordinates `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + fraction * (self.end - self.start), 1)


def curves(panel: Panel, steps: Sequence[Mapping[str, float]]) -> Markup:
    """A panel's metrics over the steps; a step may lack a metric."""
    lines = [
        (line, [(s["step"], s[line.metric]) for s in steps if math.isfinite(s.get(line.metric, math.nan))])
        for line in panel.lines
    ]
    lines = [(line, points) for line, points in lines if points]
    if not lines:
        return Markup("")
    every = [point for _, points in lines for point in points]
    xs, ys = zip(*every, strict=True)
    low, high = min(ys), max(ys)
    pad = 0.08 * (high - low) or 0.5
    across = Scale(0, max(xs) or 1, LEFT, WIDTH - RIGHT)
    up = Scale(low - pad, high + pad, HEIGHT - BOTTOM, TOP)
    parts = [axes(across, up, whole=True)]
    ends: list[tuple[float, str]] = []
    for line, points in lines:
        parts.append(curve(line, points, across, up))
        last = points[-1][1]
        at = apart(up(last), [place for place, _ in ends])
        ends.append((at, line.color))
        place = f'x="{across(points[-1][0]) + 7}" y="{at + 3.5}"'
        parts.append(f'<text {place} fill="{line.color}" font-weight="600">{short(last)}</text>')
    return svg(parts, f"{panel.title}, {panel.unit}")


def mean(line: Line, points: Sequence[tuple[float, float]]) -> list[float]:
    """The values a line is drawn through: measurements as they are, a step's noisy metric smoothed."""
    values = [value for _, value in points]
    return values if line.exact else smooth(values)


def curve(line: Line, points: Sequence[tuple[float, float]], across: Scale, up: Scale) -> str:
    """One metric: a dot a step and the line through them."""
    smoothed = zip((x for x, _ in points), mean(line, points), strict=True)
    path = " ".join(f"{across(x)},{up(y)}" for x, y in smoothed)
    strong, radius = (1, 3) if line.exact else (0.35, 2)
    dots = "".join(
        f'<circle cx="{across(x)}" cy="{up(y)}" r="{radius}"><title>step {x:g}: {y:.4g}</title></circle>'
        for x, y in points
    )
    return (
        f'<g fill="{line.color}" fill-opacity="{strong}">{dots}</g>'
        f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2" stroke-linejoin="round"/>'
    )


def histogram(before: Sequence[float], after: Sequence[float], name: str) -> Markup:
    """Histograms of two sets of numbers over the same bins, each with its mean."""
    low, high = min(*before, *after), max(*before, *after)
    if high == low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 25)
    heights = [np.histogram(values, edges)[0] / len(values) for values in (before, after)]
    across = Scale(low, high, LEFT, WIDTH - RIGHT)
    up = Scale(0, 1.12 * float(max(map(max, heights))), HEIGHT - BOTTOM, TOP)
    parts = [axes(across, up, percent=True)]
    for fractions, color in zip(heights, (BEFORE, AFTER), strict=True):
        corners = [(edges[0], 0.0)]
        for i, height in enumerate(fractions):
            corners += [(edges[i], height), (edges[i + 1], height)]
        path = " ".join(f"{across(x)},{up(y)}" for x, y in [*corners, (edges[-1], 0.0)])
        parts.append(
            f'<polygon points="{path}" fill="{color}" fill-opacity="0.3" stroke="{color}" stroke-width="1.5"/>'
        )
    for values, color in zip((before, after), (BEFORE, AFTER), strict=True):
        middle = across(math.fsum(values) / len(values))
        parts.append(
            f'<line x1="{middle}" x2="{middle}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{color}" stroke-width="1.5"'
            f' stroke-dasharray="4 3"><title>mean {math.fsum(values) / len(values):.4g}</title></line>'
        )
    return svg(parts, f"distribution of {name}, fraction of the responses")


def axes(across: Scale, up: Scale, *, whole: bool = False, percent: bool = False) -> str:
    """Grid lines with their numbers.

    Args:
        whole: x is a number of steps.
        percent: y is a fraction.
    """
    rows = ticks(up.low, up.high, 4)
    columns = ticks(across.low, across.high, 6, whole=whole)
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y)}" y2="{up(y)}" stroke="{GRID}"/>'
        f'<text x="{LEFT - 7}" y="{up(y) + 3.5}" text-anchor="end">{f"{y:.0%}" if percent else text}</text>'
        for y, text in rows
    )
    return grid + "".join(
        f'<text x="{across(x)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{text}</text>' for x, text in columns
    )


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[tuple[float, str]]:
    """At most `count` round numbers between two, each with its text: with as many digits as distinguish them."""
    places = [float(place) for place in MaxNLocator(count, integer=whole).tick_values(low, high)]
    step, size = places[1] - places[0], max(abs(low), abs(high))
    digits = next((d for d in range(9) if abs(round(step, d) - step) < step / 1e3), 9)
    write = "{:.1e}" if size < 1e-3 or size >= 1e5 else f"{{:.{digits}f}}"
    return [(place, tidy(write.format(place))) for place in places if low <= place <= high]


def svg(parts: Sequence[str], label: str) -> Markup:
    """One SVG of the parts, which hold numbers and fixed names, never a model's text: nothing is escaped."""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" font-size="11" fill="{TEXT}">'
        f"{''.join(parts)}</svg>"
    )


def apart(place: float, taken: Sequence[float], least: float = 12) -> float:
    """The nearest place to `place` that is at least `least` from those taken."""
    choices = [place, *(t + side * least for t in taken for side in (-1, 1))]
    free = [c for c in choices if all(abs(c - t) >= least for t in taken)]
    return min(free, key=lambda c: abs(c - place))


def short(value: float) -> str:
    """A number of three digits."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else tidy(f"{value:.1e}")


def tidy(text: str) -> str:
    """A number without the padding of its exponent and the sign of a zero."""
    text = text.replace("e-0", "e-").replace("e+0", "e")
    return text.removeprefix("-") if not text.strip("-0.") else text
