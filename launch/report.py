"""What a run shows at its end: the curves of reward, KL, entropy and value loss, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

CURVES = (
    ("reward", "Reward", "mean over the batch", "#0f766e"),
    ("kl", "KL to the reference", "nats an answer", "#b45309"),
    ("entropy", "Entropy", "nats a token", "#4338ca"),
    ("value_loss", "Value loss", "half squared error, clipped", "#be123c"),
)
"""(metric, title, unit, colour)."""


class Answer(NamedTuple):
    """A completion and its reward."""

    text: str
    reward: float


def plot(steps: Sequence[Mapping[str, float]], path: Path | str, title: str = "") -> None:
    """Draws the curves over steps as a PNG.

    Args:
        steps: metrics of each step, as engine.logging.read_metrics gives them; a step may lack some (the actor's while
            only the critic learns).
    """
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
        figure.savefig(path, dpi=150)
        plt.close(figure)


def smooth(values: Sequence[float], span: int = 5) -> list[float]:
    """Mean of each value and those up to `span` // 2 before and after it."""
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def completions_table(prompts: Sequence[str], before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """Answers of the model before and after the run, side by side, each with its reward."""
    table = Table(box=ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", expand=True)
    table.add_column("prompt", ratio=2, style="cyan")
    table.add_column("before", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("after", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        change = "green" if new.reward > old.reward else "red" if new.reward < old.reward else "default"
        table.add_row(
            Text(prompt.strip()),  # Text: what a model writes is not to be read as markup
            Text(old.text.strip()),
            f"{old.reward:+.2f}",
            Text(new.text.strip()),
            f"[{change}]{new.reward:+.2f}[/]",
        )
    return table
