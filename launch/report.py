"""What a run shows at its end: the curves of reward, KL, entropy and value loss, and answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text
from trialign.engine.logging import read_metrics

CURVES = (
    ("reward", "Reward", "mean over the batch", "#0f766e"),
    ("kl", "KL to the reference", "nats an answer", "#b45309"),
    ("entropy", "Entropy", "nats a token", "#4338ca"),
    ("value_loss", "Value loss", "half squared error, clipped", "#be123c"),
)
"""(metric, title, unit, colour)."""


Answer = tuple[str, str, float]
"""(prompt, completion, reward)."""


def plot(metrics: Path, picture: Path, title: str = "") -> Path:
    """Draws the curves over the steps of a metrics.jsonl as a PNG, and returns its path.

    A step may lack a metric (the actor's, while only the critic learns).
    """
    steps = read_metrics(metrics)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
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
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 6), sharex=True, layout="constrained")
        for axis, (name, heading, unit, colour) in zip(axes.flat, CURVES, strict=True):
            points = [(step["step"], step[name]) for step in steps if name in step]
            axis.set_title(heading)
            axis.set_ylabel(unit)
            if not points:
                continue
            x, y = zip(*points, strict=True)
            mean = smooth(y)
            axis.plot(x, y, color=colour, alpha=0.28, linewidth=1.2, marker="o", markersize=2)
            axis.plot(x, mean, color=colour, linewidth=2.2, solid_capstyle="round")
            axis.annotate(
                f"{mean[-1]:.3g}",
                (x[-1], mean[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
                annotation_clip=False,
            )
            axis.margins(x=0.03, y=0.12)
        for axis in axes[1]:
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, color="#475569")
        figure.savefig(picture, dpi=150)
        plt.close(figure)
    return picture


def smooth(values: Sequence[float], span: int = 5) -> list[float]:
    """Mean of each value and those up to `span` // 2 before and after it."""
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def completion_table(before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """Answers to the same prompts before and after the run, side by side, each with its reward."""
    table = Table(box=ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", expand=True)
    table.add_column("prompt", ratio=2, style="cyan")
    table.add_column("before", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("after", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    for (prompt, old, low), (_, new, high) in zip(before, after, strict=True):
        change = "green" if high > low else "red" if high < low else "default"
        # Text: what a model writes is not to be read as markup.
        words = [Text(text.strip()) for text in (prompt, old, new)]
        table.add_row(words[0], words[1], f"{low:+.2f}", words[2], f"[{change}]{high:+.2f}[/]")
    return table
