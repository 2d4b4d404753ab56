"""Live display: steps, tasks, elapsed and remaining time."""

import io
import time

import pytest
from rich.console import Console
from trialign.engine import progress as module
from trialign.engine.progress import Pace, Progress, clock, report_progress

METRICS = {"reward": 0.5, "kl": 1.25, "tokens_per_s": 1234.0}


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    return Console(file=(out := io.StringIO()), force_terminal=terminal, width=140, highlight=False), out


@pytest.fixture
def time_at(monkeypatch):
    """Sets the clock, which stands still otherwise."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_steps_are_plain_lines_without_a_terminal(time_at):
    """The remaining time follows the mean pace."""
    target, out = console(terminal=False)
    with Progress(console=target) as progress:
        progress.start(20)
        time_at(90)
        progress.update(1, METRICS)
        time_at(180)
        progress.update(2, METRICS)
    assert out.getvalue().splitlines()[1:] == [
        "step  2/20  reward +0.500  KL 1.250  1,234 tokens/s  90.0 s, 0:03:00 elapsed, 0:27:00 left"
    ]
    pace = Pace(total=10, done=4)
    assert pace.left() is None
    time_at(280)
    pace.show(6, 10)  # two parts took 100 s, four are left
    time_at(330)
    assert pace.left() == 150
    time_at(1000)
    assert pace.left() == 0
    assert [clock(seconds) for seconds in (59.6, 3723, 90000)] == ["0:01:00", "1:02:03", "25:00:00"]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_steps_and_long_tasks_have_bars_on_a_terminal(monkeypatch):
    monkeypatch.setattr(module, "BAR_AFTER", 0.01)
    target, out = console(terminal=True)
    with Progress(console=target) as progress:
        progress.start(3)
        with pytest.raises(ValueError, match="broken"), progress.task("eval rows"):
            wait_for(lambda: len(progress.bar.tasks) == 2)
            report_progress(3, 8)
            assert (progress.bar.tasks[1].completed, progress.bar.tasks[1].total) == (3, 8)
            progress.bar.refresh()
            assert "eval rows" in out.getvalue() and "3/8" in out.getvalue()
            raise ValueError("broken")
        assert len(progress.bar.tasks) == 1
        progress.update(2, METRICS)
    assert all(part in out.getvalue() for part in ("2/3", "reward +0.500", "KL 1.250", "1,234 tokens/s", "elapsed"))
    report_progress(1, 2)  # outside of any task
