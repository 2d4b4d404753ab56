"""Live display of a run: a bar over its steps, and one for every other task that takes seconds.

    progress.start(total)                                # the steps
    with progress.task("eval rows"):                     # anything else; tasks may be nested
        ...                                              # report_progress(done, total), at any depth
    progress.update(step, metrics)

Without a terminal a step is a line, and a long task is a line now and then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, Timer
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .heartbeat import HEARTBEAT

REWARD_AND_KL = {"reward": "reward {:+.3f}", "kl": "KL {:.3f}"}
BAR_AFTER = 1.0  # seconds until a task has a bar: shorter ones would only flicker
LINE_AFTER = 5.0  # seconds until a task has a line, without a terminal
LINE_EVERY = 60.0  # seconds between its lines
_tasks: list[TaskDisplay] = []  # of this process, the innermost last


def report_progress(done: int, total: int) -> None:
    """Updates the innermost task of this process, if any, and the heartbeat."""
    HEARTBEAT.tick()
    if _tasks:
        _tasks[-1].show(done, total)


class Pace:
    """Elapsed and remaining time of work in parts, of which `done` were finished before it started."""

    def __init__(self, total: int | None = None, done: int = 0):
        self.total, self.done, self._before = total, done, done
        self._start = self._last = time.monotonic()

    def show(self, done: int, total: int | None) -> None:
        """Updates the number of finished parts."""
        self.done, self.total, self._last = done, total, time.monotonic()

    def left(self) -> float | None:
        """Seconds until all parts are done, at the mean pace so far; None before the first part."""
        finished = self.done - self._before
        if self.total is None or finished <= 0:
            return None
        seconds = (self._last - self._start) / finished * (self.total - self.done)
        return max(0.0, seconds - (time.monotonic() - self._last))

    def __str__(self) -> str:
        left = self.left()
        elapsed = f"{clock(time.monotonic() - self._start)} elapsed"
        return elapsed if left is None else f"{elapsed}, {clock(left)} left"


class TaskDisplay(Pace):
    """Bar or lines of a task; see `Progress.task`. Its timer runs in a thread of its own."""

    def __init__(self, name: str, display: Progress, line_after: float):
        super().__init__()
        self.name, self._display = name, display
        self._lock, self._ended = Lock(), False
        self._bar: TaskID | None = None
        self._schedule(BAR_AFTER if display.live else line_after)

    def show(self, done: int, total: int | None) -> None:
        with self._lock:
            super().show(done, total)
            if self._bar is not None:
                self._display.bar.update(self._bar, completed=done, total=total)

    def end(self) -> None:
        """Removes the bar, or stops the lines."""
        with self._lock:
            self._ended = True
            self._timer.cancel()
            if self._bar is not None:
                self._display.bar.remove_task(self._bar)

    def _schedule(self, seconds: float) -> None:
        self._timer = Timer(seconds, self._appear)
        self._timer.daemon = True
        self._timer.start()

    def _appear(self) -> None:
        with self._lock:
            if self._ended:
                return
            if self._display.live:
                fields: Any = {"label": self.name, "pace": self}
                self._bar = self._display.bar.add_task("", total=self.total, completed=self.done, **fields)
            else:
                parts = f" {self.done}/{self.total}" if self.total else ""
                self._display.print(f"{self.name}{parts}: {self}")
                self._schedule(LINE_EVERY)


class _Clock(ProgressColumn):
    """Elapsed and remaining time. Rich's own estimate drops parts that took more than 30 s."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["pace"]), style="bright_black")


class Progress:
    """Display of one process; enabled on the main rank alone."""

    def __init__(self, *, enabled: bool = True, console: Console | None = None):
        self.console = console or Console(highlight=False, quiet=not enabled)
        self._enabled, self.live = enabled, enabled and self.console.is_terminal
        self._bar: RichProgress | None = None
        self._steps, self._task = Pace(), None
        self._formats: dict[str, str] = {}
        self._curve: list[float] = []
        self._last = time.monotonic()

    @property
    def bar(self) -> RichProgress:
        """The live display, started when first used."""
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("[bold]{task.fields[label]}"),
                BarColumn(bar_width=18),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                _Clock(),
                console=self.console,
            )
            self._bar.start()
        return self._bar

    def start(self, total: int, *, done: int = 0, formats: Mapping[str, str] | None = None) -> None:
        """Starts the display of the steps.

        Args:
            done: steps made before a resume.
            formats: metric -> format; the first one's curve is shown too. None for reward and KL.
        """
        self._steps, self._last = Pace(total, done), time.monotonic()
        self._formats = {**(formats or REWARD_AND_KL), "tokens_per_s": "{:,.0f} tokens/s"}
        if self.live:
            first = f"step {done + 1} is on its way" if done < total else ""
            self._task = self.bar.add_task(first, total=total, completed=done, label="step", pace=self._steps)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step; steps count from 1."""
        if not self._enabled:
            return
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        self._steps.show(step, self._steps.total)
        value = metrics.get(next(iter(self._formats)), math.nan)
        if math.isfinite(value):  # absent or NaN in a skipped step
            self._curve.append(value)
        text = "  ".join(text.format(metrics[name]) for name, text in self._formats.items() if name in metrics)
        if self._task is not None:
            curve = sparkline(self._curve[-16:]) if self._curve else ""
            self.bar.update(self._task, completed=step, description=f"[cyan]{curve}[/] {text}")
        else:
            width, total = len(str(self._steps.total)), self._steps.total
            self.console.print(f"step {step:{width}}/{total}  {text}  {seconds:.1f} s, {self._steps}", soft_wrap=True)

    @contextmanager
    def task(self, name: str, *, line_after: float = LINE_AFTER) -> Iterator[None]:
        """Displays the block under a name such as "eval rows", if it takes long.

        Args:
            line_after: seconds until its first line, without a terminal.
        """
        if not self._enabled:
            yield
            return
        task = TaskDisplay(name, self, line_after)
        _tasks.append(task)
        try:
            yield
        finally:
            _tasks.remove(task)
            task.end()

    def print(self, text: Any) -> None:
        """Prints text or a rich table above the bars."""
        self.console.print(text, soft_wrap=isinstance(text, str))

    def close(self) -> None:
        """Stops the live display; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def sparkline(values: list[float]) -> str:
    """Values as a row of bars between their least and largest: [0, 1, 2] is ▁▅█."""
    low, high = min(values), max(values)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) * scale)] for value in values)
