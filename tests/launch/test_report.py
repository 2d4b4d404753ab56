"""The picture and the table at the end of a run."""

import importlib.util
import io
import json
import struct
from pathlib import Path

import pytest
from rich.console import Console
from samples import write_jsonl

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("curves", LAUNCH / "report" / "curves.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_curves_are_drawn_even_where_steps_lack_a_metric(report, tmp_path):
    steps = [{"step": i, "reward": i / 10, "kl": 0.1 * i, "value_loss": 1 / (i + 1)} for i in range(9)]
    steps[3]["entropy"] = 2.0
    metrics = write_jsonl(tmp_path / "metrics.jsonl", steps)
    picture = report.plot(metrics, tmp_path / "run.png", report.PPO_PANELS, "a title")
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:24]) == (1440, 900)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [])
    assert report.plot(nothing, tmp_path / "empty.png", report.PPO_PANELS).stat().st_size > 1000


def test_smoothing_is_a_centered_mean(report):
    assert report.smooth([0.0, 3.0, 6.0, 0.0], span=3) == [1.5, 3.0, 3.0, 3.0]


def test_the_table_shows_answers_as_they_are(report):
    before, after = ("How was it?", "It was [bold]bad[/bold].", -0.5), ("How was it?", "Great!\n", 0.75)
    table = report.completion_table([before], [after])
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    for part in ("How was it?", "It was [bold]bad[/bold].", "-0.50", "Great!", "+0.75"):
        assert part in text


def test_rewards_of_any_size_and_none_leave_room_for_words(report):
    before, after = ("How was it?", "It was bad.", 3.3e38), ("How was it?", "Great!", float("nan"))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(report.completion_table([before], [after]))
    text = console.export_text()
    assert "+3.3e+38" in text and "nan" not in text and "Great!" in text
    assert [report.reward_text(value) for value in (None, -0.5, 1e6)] == ["", "-0.50", "+1e+06"]


def test_the_demo_s_prompts_are_many_short_and_distinct():
    rows = [json.loads(line) for line in (LAUNCH / "examples" / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 300
    assert all(set(row) == {"prompt", "topic"} and len(row["prompt"].split()) <= 20 for row in rows)
    assert len({row["topic"] for row in rows}) >= 10
