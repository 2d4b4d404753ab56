"""The live display: steps, other works, elapsed and remaining time."""

import io
import time

import pytest
from rich.console import Console
from trialign.engine import progress as module
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import Profiler
from trialign.engine.progress import Pace, Progress, clock, report_progress, sparkline

METRICS = {"reward": 0.5, "kl": 1.25, "tokens_per_s": 1234.0}


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=140, highlight=False), out


@pytest.fixture
def time_at(monkeypatch):
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = 1000.0 + seconds

    return set_to


def test_without_a_terminal_each_step_is_a_plain_line_with_elapsed_and_remaining_time(time_at):
    target, out = console(terminal=False)
    with Progress(console=target) as progress:
        progress.start(20)
        time_at(90)
        progress.update(1, METRICS)
        time_at(180)
        progress.update(2, METRICS)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1] == "step  2/20  reward +0.500  KL 1.250  1,234 tokens/s  90.0 s, 0:03:00 elapsed, 0:27:00 left"
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_a_bar_shows_reward_kl_speed_and_time():
    target, out = console(terminal=True)
    with Progress(console=target) as progress:
        progress.start(20, done=4)
        assert "step 5 is on its way" in out.getvalue() or progress.bar.tasks[0].description == "step 5 is on its way"
        progress.update(5, METRICS)
        progress.print("something above")
        progress.update(6, {**METRICS, "reward": 0.75})
    text = out.getvalue()
    assert "6/20" in text and "reward +0.750" in text and "KL 1.250" in text and "1,234 tokens/s" in text
    assert "▁█" in text and "something above" in text and "elapsed" in text and "left" in text


def test_remaining_time_counts_the_parts_that_this_process_made_and_runs_down(time_at):
    pace = Pace(total=10, done=4)
    assert pace.left() is None
    time_at(100)
    pace.show(6, 10)
    assert pace.left() == 200  # two parts took 100 s, four are left
    time_at(150)
    assert pace.left() == 150
    time_at(1000)
    assert pace.left() == 0


def wait_for(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_long_work_has_a_bar_with_what_is_done_of_it(monkeypatch):
    monkeypatch.setattr(module, "BAR_AFTER", 0.01)
    target, out = console(terminal=True)
    with Progress(console=target) as progress:
        progress.start(3)
        with progress.task("held-out rows"):
            wait_for(lambda: len(progress.bar.tasks) == 2)
            report_progress(3, 8)
            assert (progress.bar.tasks[1].completed, progress.bar.tasks[1].total) == (3, 8)
            progress.bar.refresh()
            assert "held-out rows" in out.getvalue() and "3/8" in out.getvalue()
        assert len(progress.bar.tasks) == 1


def test_without_a_terminal_a_long_work_is_a_line_and_a_short_one_is_none():
    target, out = console(terminal=False)
    with Progress(console=target) as progress:
        with progress.task("rows"):
            pass
        with progress.task("phase"), progress.task("log-probabilities", line_after=0.01):
            report_progress(2, 4)
            wait_for(out.getvalue)
    assert out.getvalue().startswith("log-probabilities 2/4: 0:00:0") and len(out.getvalue().splitlines()) == 1


def test_a_work_that_fails_is_not_shown_any_longer(monkeypatch):
    monkeypatch.setattr(module, "BAR_AFTER", 0.01)
    target, _ = console(terminal=True)
    with Progress(console=target) as progress:
        with pytest.raises(ValueError, match="broken"), progress.task("rows"):
            wait_for(lambda: progress.bar.tasks)
            raise ValueError("broken")
        assert not progress.bar.tasks
    report_progress(1, 2)  # outside of any work


def test_phases_are_works():
    seen = []
    progress = Progress(enabled=False)

    def around(name: str):
        seen.append(name)
        return progress.task(name)

    phases = Profiler(build_mesh(), around=around)
    with phases("rollout"):
        pass
    assert seen == ["rollout"]


def test_other_ranks_print_nothing(capsys):
    with Progress(enabled=False) as progress:
        progress.start(2)
        with progress.task("rows", line_after=0):
            report_progress(1, 2)
        progress.update(1, METRICS)
        progress.print("x")
    assert capsys.readouterr().out == ""


def test_sparkline_spans_the_values():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█" and sparkline([3.0, 3.0]) == "▁▁"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90000, "25:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
