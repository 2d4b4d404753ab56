"""Live display of a run: a bar over its steps, and one for every other work that takes seconds.

    progress.start(total)                                # the steps
    with progress.task("held-out rows"):                 # anything else; works may be nested
        ...                                              # report_progress(done, total) from what does it, however deep
    progress.update(step, metrics)

On a terminal these are bars; elsewhere a step is a line, and a work that takes long is a line now and then.
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

REWARD_AND_KL = {"reward": "reward {:+.3f}", "kl": "KL {:.3f}"}
BAR_AFTER = 1.0  # seconds: what is over before is not shown, for its bar would only flicker
LINE_AFTER = 5.0  # seconds until a work is named where there is no terminal
LINE_EVERY = 60.0  # seconds between such lines
_works: list[Work] = []  # of this process, the innermost last


def report_progress(done: int, total: int) -> None:
    """Tells the innermost work of this process how far it is; without one nothing happens."""
    if _works:
        _works[-1].show(done, total)


class Pace:
    """Elapsed and remaining time of something that is done in parts.

    Args:
        done: parts that were done before it began.
    """

    def __init__(self, total: int | None = None, done: int = 0):
        self.total, self.done, self._before = total, done, done
        self._began = self._last = time.monotonic()

    def show(self, done: int, total: int | None) -> None:
        """Takes in how far it is."""
        self.done, self.total, self._last = done, total, time.monotonic()

    def left(self) -> float | None:
        """Seconds until all parts are done, if they go on as they went; None before the first part is."""
        made = self.done - self._before
        if self.total is None or made <= 0:
            return None
        seconds = (self._last - self._began) / made * (self.total - self.done)
        return max(0.0, seconds - (time.monotonic() - self._last))

    def __str__(self) -> str:
        left = self.left()
        elapsed = f"{clock(time.monotonic() - self._began)} elapsed"
        return elapsed if left is None else f"{elapsed}, {clock(left)} left"


class Work(Pace):
    """Something other than a step that takes time; see `Progress.work`."""

    def __init__(self, name: str, display: Progress):
        super().__init__()
        self.name, self._display = name, display
        self._lock, self._over = Lock(), False  # the timer's thread and the one that works
        self._task: TaskID | None = None

    def show(self, done: int, total: int | None) -> None:
        with self._lock:
            super().show(done, total)
            if self._task is not None:
                self._display.bar.update(self._task, completed=done, total=total)

    def begin(self, line_after: float) -> None:
        """Becomes visible after a while: once as a bar, or again and again as a line."""
        self._wait(BAR_AFTER if self._display.live else line_after)

    def end(self) -> None:
        """Is not visible any more."""
        with self._lock:
            self._over = True
            self._timer.cancel()
            if self._task is not None:
                self._display.bar.remove_task(self._task)

    def _wait(self, seconds: float) -> None:
        self._timer = Timer(seconds, self._appear)
        self._timer.daemon = True
        self._timer.start()

    def _appear(self) -> None:
        with self._lock:
            if self._over:
                return
            if self._display.live:
                fields: Any = {"label": self.name, "pace": self}
                self._task = self._display.bar.add_task("", total=self.total, completed=self.done, **fields)
            else:
                parts = f" {self.done}/{self.total}" if self.total else ""
                self._display.print(f"{self.name}{parts}: {self}")
                self._wait(LINE_EVERY)


class _Clock(ProgressColumn):
    """Elapsed and remaining time. Rich's own estimate forgets parts that took more than 30 s."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["pace"]), style="bright_black")


class Progress:
    """The display of one process; the main rank's alone is enabled.

    A step's line or bar has some of its metrics, those that it has, and "tokens_per_s"; and how the first of them went.
    """

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
        """The live display, started when it is first needed."""
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
        """Begins with the steps.

        Args:
            done: steps made before a resume.
            formats: metric -> how it is written; reward and KL when not given.
        """
        self._steps, self._last = Pace(total, done), time.monotonic()
        self._formats = {**(formats or REWARD_AND_KL), "tokens_per_s": "{:,.0f} tokens/s"}
        if self.live:
            first = f"step {done + 1} is on its way" if done < total else ""
            self._task = self.bar.add_task(first, total=total, completed=done, label="step", pace=self._steps)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step that is done; steps count from 1."""
        if not self._enabled:
            return
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        self._steps.show(step, self._steps.total)
        value = metrics.get(next(iter(self._formats)), math.nan)
        if math.isfinite(value):  # a step that was left out has none
            self._curve.append(value)
        formats = "  ".join(text.format(metrics[name]) for name, text in self._formats.items() if name in metrics)
        if self._task is not None:
            curve = sparkline(self._curve[-16:]) if self._curve else ""
            self.bar.update(self._task, completed=step, description=f"[cyan]{curve}[/] {formats}")
        else:
            width, total = len(str(self._steps.total)), self._steps.total
            self.console.print(
                f"step {step:{width}}/{total}  {formats}  {seconds:.1f} s, {self._steps}", soft_wrap=True
            )

    @contextmanager
    def task(self, name: str, *, line_after: float = LINE_AFTER) -> Iterator[None]:
        """Shows what goes on within, as soon as it has gone on for a while.

        Args:
            name: as "held-out rows".
            line_after: seconds until it is named where there is no terminal.
        """
        if not self._enabled:
            yield
            return
        work = Work(name, self)
        work.begin(line_after)
        _works.append(work)
        try:
            yield
        finally:
            _works.remove(work)
            work.end()

    def print(self, text: Any) -> None:
        """Prints something (text or a rich table) above the bars."""
        self.console.print(text, soft_wrap=isinstance(text, str))

    def close(self) -> None:
        """Leaves the bar as it stands; may be called twice."""
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
