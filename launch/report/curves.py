"""Plots of a run's metrics over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trialign.engine.logging import read_metrics
from trialign.engine.storage.atomic import atomic_file

from .panels import Line, Panel

SPAN = 5  # steps in a mean
FAINT: Any = {"alpha": 0.35, "linewidth": 1.2, "marker": "o", "markersize": 2}
BOLD: Any = {"linewidth": 2.2, "solid_capstyle": "round"}
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "text.color": "#0f172a",
    "axes.labelcolor": "#475569",
}


def plot(metrics: Path, picture: Path, panels: Sequence[Panel], title: str = "") -> Path:
    """Draws the panels that have data, two in a row, over the steps of a metrics.jsonl as a PNG; returns its path.

    A step may lack a metric (the actor's, while only the critic learns).
    """
    steps = read_metrics(metrics)
    panels = [panel for panel in panels if any(line.metric in step for line in panel.lines for step in steps)]
    import matplotlib  # here: it takes a second to import, and only the main rank draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # after the backend is chosen
    from matplotlib.lines import Line2D

    with plt.rc_context(STYLE):
        rows = max(1, -(-len(panels) // 2))
        figure, axes = plt.subplots(rows, 2, figsize=(9.6, 3 * rows), sharex=True, layout="constrained", squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            axis.set_title(panel.title)
            axis.set_ylabel(panel.unit)
            for line in panel.lines:
                draw(axis, line, [(step["step"], step[line.metric]) for step in steps if line.metric in step])
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False)
            axis.margins(x=0.03, y=0.12)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis in axes.flat[max(0, len(panels) - 2) : len(panels)]:  # the lowest of each column
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
            axis.xaxis.get_major_locator().set_params(integer=True)
        if any(not line.exact for panel in panels for line in panel.lines):
            handles = [Line2D([], [], color="#475569", **look) for look in (FAINT, BOLD)]
            labels = ["each step, with the last value", f"mean of {SPAN} steps"]
            figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
        elif not panels:
            axes.flat[0].text(0, 1, "no steps")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, color="#475569")
        with atomic_file(picture) as aside:
            figure.savefig(aside, dpi=150, format="png")
        plt.close(figure)
    return picture


def draw(axis: Any, line: Line, points: Sequence[tuple[float, float]]) -> None:
    """Draws a metric's points, the curve through them or their means, and the last value."""
    if not points:
        return
    x, y = zip(*points, strict=True)
    if line.exact:
        marks = {"marker": "o", "markersize": 4} if len(points) <= 50 else {}
        axis.plot(x, y, color=line.color, **BOLD, **marks, label=line.label or None)
    else:
        axis.plot(x, y, color=line.color, **FAINT)
        axis.plot(x, smooth(y), color=line.color, **BOLD, label=line.label or None)
    axis.annotate(
        f"{y[-1]:.3g}",
        (x[-1], y[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=line.color,
        fontweight="bold",
        annotation_clip=False,
    )


def smooth(values: Sequence[float], span: int = SPAN) -> list[float]:
    """Mean of each value and those up to `span` // 2 before and after it."""
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
