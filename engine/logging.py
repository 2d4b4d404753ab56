"""Where a run's numbers go: a JSONL file always, TensorBoard and Weights & Biases when asked, and one live line.

All of it is for one rank; the others build the same objects with `enabled=False`, and nothing happens.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Backend = Literal["tensorboard", "wandb"]
REWARD_AND_KL = {"reward": "reward {:+.3f}", "kl": "KL {:.3f}"}


class MetricLog:
    """Writes metrics to `folder`/metrics.jsonl, one JSON object a step, flushed at once, and to the backends.

    A run that is resumed goes on in the same file: lines from `start_step` on, written after the checkpoint it resumes
    from, are taken out first.

    Args:
        start_step: the first step that will be logged.
        config: flat, for the backends to show.
        enabled: False on every rank but one.

    Raises:
        ValueError: Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        backends: Collection[Backend] = (),
        start_step: int = 0,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self._file = self._tensorboard = self._wandb = None
        if not enabled:
            return
        if "wandb" in backends:
            self._wandb = _start_wandb(Path(folder), start_step, config or {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut(self.path, start_step)
        self._file = open(self.path, "a", encoding="utf-8")
        if "tensorboard" in backends:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=start_step or None)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Closes all of them; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The steps in a metrics.jsonl. A last line cut short by a kill is left out."""
    steps = []
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        steps.append(json.loads(line))
    return steps


def _cut(path: Path, start_step: int) -> None:
    """Takes the steps from `start_step` on out of a metrics.jsonl, if there is one."""
    if not path.exists():
        return
    kept = [json.dumps(step) + "\n" for step in read_metrics(path) if step["step"] < start_step]
    aside = path.with_suffix(".new")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def _start_wandb(folder: Path, start_step: int, config: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")  # an optional dependency
    except ImportError:
        raise ValueError("run.log asks for wandb, which is not installed: pip install wandb") from None
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "wandb_id"  # a resumed run goes on in the same chart
    if not (start_step and mark.exists()):
        mark.write_text(wandb.util.generate_id())
    return wandb.init(
        project="trialign", name=folder.name, dir=str(folder), id=mark.read_text(), resume="allow", config=dict(config)
    )


class Progress:
    """How the run goes, in one place: a live bar on a terminal, a line a step elsewhere.

    Shows some of each step's metrics, those that it has, and "tokens_per_s"; and how the first of them went.

    Args:
        done: steps made before a resume.
        facts: metric -> how it is written; reward and KL when not given.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        facts: Mapping[str, str] | None = None,
        enabled: bool = True,
        console: Console | None = None,
    ):
        self.console = console or Console(highlight=False, quiet=not enabled)
        self._total, self._enabled = total, enabled
        self._facts = {**(facts or REWARD_AND_KL), "tokens_per_s": "{:,.0f} tokens/s"}
        self._curve: list[float] = []
        self._last = time.monotonic()
        self._bar = None
        if enabled and self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("[bold]step"),
                BarColumn(bar_width=18),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("the first step is on its way", total=total, completed=done)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step that is done; `step` counts from 1 here."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if not self._enabled:
            return
        self._curve.append(metrics[next(iter(self._facts))])
        facts = "  ".join(text.format(metrics[name]) for name, text in self._facts.items() if name in metrics)
        if self._bar is not None:
            curve = sparkline(self._curve[-16:])
            self._bar.update(self._task, completed=step, description=f"[cyan]{curve}[/] {facts}")
        else:
            width = len(str(self._total))
            self.console.print(f"step {step:{width}}/{self._total}  {facts}  {seconds:.1f} s", soft_wrap=True)

    def say(self, text: Any) -> None:
        """Prints something (text or a rich table) above the bar."""
        self.console.print(text, soft_wrap=isinstance(text, str))

    def close(self) -> None:
        """Leaves the bar as it stands; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sparkline(values: list[float]) -> str:
    """Values as a row of bars between their least and largest: [0, 1, 2] is ▁▅█."""
    low, high = min(values), max(values)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) * scale)] for value in values)
