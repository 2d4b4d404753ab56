"""The plot and the tables at the end of a run."""

import importlib
import io
import json
import struct
from typing import Any

import pytest
from conftest import ROOT
from rich.console import Console
from samples import write_jsonl


@pytest.fixture
def report(monkeypatch) -> Any:
    """Imports modules of launch/report."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    return lambda name: importlib.import_module(f"report.{name}")


def test_curves_are_drawn_even_where_steps_lack_a_metric(report, tmp_path):
    curves, panels = report("curves"), report("panels").PPO_PANELS
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


def test_the_table_shows_responses_as_they_are_and_rewards_of_any_size_leave_room(report):
    tables = report("tables")
    before, after = ("How was it?", "It was [bold]bad[/bold].", -0.5), ("How was it?", "Great!\n", 0.75)
    text = printed(tables.reward_table([before], [after]), 140)
    assert all(part in text for part in ("How was it?", "It was [bold]bad[/bold].", "-0.50", "Great!", "+0.75"))
    before, after = ("How was it?", "It was bad.", 3.3e38), ("How was it?", "Great!", float("nan"))
    text = printed(tables.reward_table([before], [after]), 80)
    assert "+3.3e+38" in text and "nan" not in text and "Great!" in text
    assert [tables.reward_text(value) for value in (None, -0.5, 1e6)] == ["", "-0.50", "+1e+06"]


def test_the_demo_prompts_are_many_short_and_distinct():
    rows = [json.loads(line) for line in (ROOT / "launch" / "examples" / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 300
    assert all(set(row) == {"prompt", "topic"} and len(row["prompt"].split()) <= 20 for row in rows)
    assert len({row["topic"] for row in rows}) >= 10
