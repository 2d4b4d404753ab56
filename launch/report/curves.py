"""What a run shows at its end: its curves, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text
from trialign.algorithms.metrics import Estimate
from trialign.engine.logging import read_metrics


class Line(NamedTuple):
    """One metric in a panel."""

    metric: str
    color: str
    label: str = ""  # where a panel has several
    exact: bool = False  # drawn as it is: not noise, or measured too rarely to be smoothed


class Panel(NamedTuple):
    """One plot over the steps."""

    title: str
    unit: str
    lines: tuple[Line, ...]


PPO_PANELS = (
    Panel("Reward", "mean over the batch", (Line("reward", "#0f766e"),)),
    Panel("KL to the reference", "nats an answer", (Line("kl", "#b45309"),)),
    Panel("Entropy", "nats a token", (Line("entropy", "#4338ca"),)),
    Panel("Value loss", "half squared error, clipped", (Line("value_loss", "#be123c"),)),
)
GRPO_PANELS = (
    Panel("Reward", "mean over the answers", (Line("reward", "#0f766e"),)),
    Panel("KL to the reference", "nats an answer", (Line("kl", "#b45309"),)),
    Panel("Entropy", "nats a token", (Line("entropy", "#4338ca"),)),
    Panel("Groups with a spread of rewards", "share", (Line("groups_with_spread", "#be123c"),)),
)
SFT_PANELS = (
    Panel(
        "Loss",
        "nats a target token",
        (Line("loss", "#0f766e", "training"), Line("eval_loss", "#be123c", "held out", exact=True)),
    ),
    Panel("Entropy", "nats a token", (Line("entropy", "#4338ca"),)),
    Panel("Gradient norm", "before clipping", (Line("grad_norm", "#b45309"),)),
    Panel("Learning rate", "of the step", (Line("lr", "#475569", exact=True),)),
)


SPAN = 5  # steps in a mean
FAINT: Any = {"alpha": 0.35, "linewidth": 1.2, "marker": "o", "markersize": 2}
BOLD: Any = {"linewidth": 2.2, "solid_capstyle": "round"}

Answer = tuple[str, str, float]
"""(prompt, completion, reward)."""


def plot(metrics: Path, picture: Path, panels: Sequence[Panel], title: str = "") -> Path:
    """Draws the panels that have data, two in a row, over the steps of a metrics.jsonl as a PNG; returns its path.

    A step may lack a metric (the actor's, while only the critic learns).
    """
    steps = read_metrics(metrics)
    panels = [panel for panel in panels if any(line.metric in step for line in panel.lines for step in steps)]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

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
            axes.flat[0].text(0, 1, "no step has been made")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, color="#475569")
        figure.savefig(picture, dpi=150)
        plt.close(figure)
    return picture


def draw(axis: Any, line: Line, points: Sequence[tuple[float, float]]) -> None:
    """A metric's points, the curve through them or through their means, and the last value beside the last point."""
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


def response_text(text: str, finish: str) -> str:
    """A response as a table shows it: with an ellipsis where `max_new_tokens` cut it."""
    return text if finish == "stop" else f"{text.rstrip()} …"


def reward_text(reward: float | None) -> str:
    """A reward as a table shows it, a long one without the digits that would leave no room for words; "" for none."""
    if reward is None or reward != reward:
        return ""
    return f"{reward:+.2f}" if abs(reward) < 1e6 else f"{reward:+.3g}"


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
        table.add_row(words[0], words[1], reward_text(low), words[2], f"[{change}]{reward_text(high)}[/]")
    return table


def answer_table(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> Table:
    """Answers before and after the run beside what the data has. Rows are [prompt, wanted, answer]."""
    table = Table(box=ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", expand=True)
    for name in ("prompt", "in the data", "before", "after"):
        table.add_column(name, ratio=1, style="cyan" if name == "prompt" else None)
    for (prompt, wanted, old), (_, _, new) in zip(before, after, strict=False):  # a resume may ask for more
        table.add_row(*(Text(text.strip()) for text in (prompt, wanted, old, new)))
    return table


def estimate_table(results: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """Measures of one or more models side by side, each with its interval where it has one."""
    table = Table(box=ROUNDED, header_style="bold", border_style="bright_black")
    table.add_column("measure", style="cyan")
    for model in results:
        table.add_column(Text(model), justify="right")
    for name in dict.fromkeys(name for numbers in results.values() for name in numbers):
        table.add_row(name, *(_interval(numbers[name]) if name in numbers else "" for numbers in results.values()))
    return table


def _interval(number: Estimate) -> str:
    value, low, high = number
    return f"{value:.4g}" if low != low else f"{value:.4g}  ({low:.4g} to {high:.4g})"


def sample_table(answers: Sequence[Mapping[str, Any]]) -> Table:
    """Completions, each with its model and reward, as completions.jsonl has them."""
    table = Table(box=ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", expand=True)
    table.add_column("model", ratio=2)
    table.add_column("prompt", ratio=3, style="cyan")
    table.add_column("completion", ratio=6)
    table.add_column("reward", justify="right", no_wrap=True)
    for answer in answers:
        reward = reward_text(answer["reward"])
        completion = response_text(answer["completion"], answer["finish"])
        table.add_row(*(Text(text.strip()) for text in (answer["model"], answer["prompt"], completion)), reward)
    return table
