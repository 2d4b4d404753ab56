"""The plot and the tables at the end of a run."""

import io
import struct
from typing import Any

from rich.console import Console
from samples import write_jsonl


def test_plot_of_steps_that_lack_metrics(launched, tmp_path):
    curves, panels = launched("report.curves"), launched("report.panels").PPO_PANELS
    steps = [{"step": i, "reward": i / 10, "kl": 0.1 * i, "value_loss": 1 / (i + 1)} for i in range(9)]
    steps[3]["entropy"] = 2.0
    metrics = write_jsonl(tmp_path / "metrics.jsonl", steps)
    header = curves.plot(metrics, tmp_path / "run.png", panels, "a title").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:24]) == (1440, 900)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [])
    assert curves.plot(nothing, tmp_path / "empty.png", panels).stat().st_size > 1000
    assert curves.smooth([0.0, 3.0, 6.0, 0.0], span=3) == [1.5, 3.0, 3.0, 3.0]


def printed(table: Any, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_reward_table_escapes_markup_and_shortens_rewards(launched):
    tables = launched("report.tables")
    before, after = ("How was it?", "It was [bold]bad[/bold].", -0.5), ("How was it?", "Great!\n", 0.75)
    text = printed(tables.reward_table([before], [after]), 140)
    assert all(part in text for part in ("How was it?", "It was [bold]bad[/bold].", "-0.50", "Great!", "+0.75"))
    text = printed(tables.reward_table([(*before[:2], 3.3e38)], [(*after[:2], float("nan"))]), 80)
    assert "+3.3e+38" in text and "nan" not in text and "Great!" in text
