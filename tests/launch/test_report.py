"""The plot and the tables at the end of a run."""

import io
import struct

from rich.console import Console
from samples import write_jsonl


def test_plot_of_steps_that_lack_metrics(launched, tmp_path):
    curves, panels = launched("report.curves"), launched("report.panels").PPO_PANELS
    steps = [{"step": i, "reward": i / 10, "kl": 0.1 * i, "value_loss": 1 / (i + 1)} for i in range(9)]
    steps[3]["entropy"] = 2.0
    metrics = write_jsonl(tmp_path / "metrics.jsonl", steps)
    header = curves.plot(metrics, tmp_path / "run.png", panels, "a title").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:24]) == (1440, 900)


def test_reward_table_escapes_markup_and_shortens_rewards(launched):
    console, tables = Console(width=140, file=io.StringIO(), record=True), launched("report.tables")
    before, after = ("How was it?", "It was [bold]bad[/bold].", -0.5), ("How was it?", "Great!\n", 0.75)
    console.print(tables.reward_table([before, (*before[:2], 3.3e38)], [after, (*after[:2], float("nan"))]))
    text = console.export_text()
    parts = ("How was it?", "It was [bold]bad[/bold].", "-0.50", "Great!", "+0.75", "+3.3e+38")
    assert all(part in text for part in parts) and "nan" not in text
