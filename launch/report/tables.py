"""Tables at the end of a run: responses before and after, evaluation metrics, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text
from trialign.algorithms.metrics import Estimate

ScoredResponse = tuple[str, str, float]
"""(prompt, response, reward)."""


def response_text(text: str, finish: str) -> str:
    """A response as a table shows it: with an ellipsis where `max_new_tokens` cut it."""
    return text if finish == "stop" else f"{text.rstrip()} …"


def reward_text(reward: float | None) -> str:
    """A reward as a table shows it, a long one with fewer digits to leave room for words; "" for none."""
    if reward is None or reward != reward:
        return ""
    return f"{reward:+.2f}" if abs(reward) < 1e6 else f"{reward:+.3g}"


def reward_table(before: Sequence[ScoredResponse], after: Sequence[ScoredResponse]) -> Table:
    """Responses to the same prompts before and after the run, side by side, each with its reward."""
    table = _wide_table()
    table.add_column("prompt", ratio=2, style="cyan")
    table.add_column("before", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("after", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    for (prompt, old, low), (_, new, high) in zip(before, after, strict=True):
        change = "green" if high > low else "red" if high < low else "default"
        table.add_row(*_plain(prompt, old), reward_text(low), *_plain(new), f"[{change}]{reward_text(high)}[/]")
    return table


def response_table(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> Table:
    """Responses before and after the run beside those in the data, of rows [prompt, in the data, response]."""
    table = _wide_table()
    for name in ("prompt", "in the data", "before", "after"):
        table.add_column(name, ratio=1, style="cyan" if name == "prompt" else None)
    for (prompt, target, old), (_, _, new) in zip(before, after, strict=False):  # a resume may show more
        table.add_row(*_plain(prompt, target, old, new))
    return table


def estimate_table(results: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """Metrics of one or more models side by side, each with its interval where it has one."""
    table = Table(box=ROUNDED, header_style="bold", border_style="bright_black")
    table.add_column("measure", style="cyan")
    for model in results:
        table.add_column(Text(model), justify="right")
    for name in dict.fromkeys(name for numbers in results.values() for name in numbers):
        table.add_row(name, *(_interval(numbers[name]) if name in numbers else "" for numbers in results.values()))
    return table


def sample_table(completions: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of completions.jsonl, each with its model and reward."""
    table = _wide_table()
    table.add_column("model", ratio=2)
    table.add_column("prompt", ratio=3, style="cyan")
    table.add_column("completion", ratio=6)
    table.add_column("reward", justify="right", no_wrap=True)
    for row in completions:
        text = response_text(row["completion"], row["finish"])
        table.add_row(*_plain(row["model"], row["prompt"], text), reward_text(row["reward"]))
    return table


def _wide_table() -> Table:
    return Table(box=ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", expand=True)


def _plain(*texts: str) -> list[Text]:
    """Cells of text that is not read as markup: a model may have written it."""
    return [Text(text.strip()) for text in texts]


def _interval(number: Estimate) -> str:
    value, low, high = number
    return f"{value:.4g}" if low != low else f"{value:.4g}  ({low:.4g} to {high:.4g})"
