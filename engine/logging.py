"""Metric logging: metrics.jsonl, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from .storage.atomic import write_text

Backend = Literal["tensorboard", "wandb"]


class MetricLog:
    """Writes metrics to `folder`/metrics.jsonl, one JSON object a step, flushed at once, and to the backends.

    Steps count from 1; step 0 is measured before training. A resumed run appends to the same file, after removing the
    steps later than `done`, the checkpoint it resumes from.

    Args:
        done: steps made before a resume; 0 starts a new file.
        config: flat, for the backends to show.
        enabled: False on every rank but one: nothing is written.

    Raises:
        ValueError: Weights & Biases is selected but not installed.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        backends: Collection[Backend] = (),
        done: int = 0,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self._file = self._tensorboard = self._wandb = None
        if not enabled:
            return
        if "wandb" in backends:
            self._wandb = _start_wandb(Path(folder), done, config or {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(self.path, done)
        self._file = open(self.path, "a", encoding="utf-8")
        if "tensorboard" in backends:
            from torch.utils.tensorboard import SummaryWriter  # an optional backend, slow to import

            if not done:  # curves of an earlier run
                shutil.rmtree(Path(folder) / "tensorboard", ignore_errors=True)
            self._tensorboard = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=done + 1 if done else None)

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
        """Closes file and backends; may be called twice."""
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
    """Steps of a metrics.jsonl, without a last line that a kill left incomplete."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _truncate(path: Path, done: int) -> None:
    """Removes the steps later than `done` from a metrics.jsonl, if it exists; all lines where `done` is 0."""
    if not path.exists():
        return
    kept = [json.dumps(step) + "\n" for step in read_metrics(path) if done and step["step"] <= done]
    write_text(path, "".join(kept))


def _start_wandb(folder: Path, done: int, config: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")  # an optional dependency
    except ImportError:
        raise ValueError("run.log=wandb: not installed; pip install wandb") from None
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "wandb_id"  # a resumed run continues the same chart
    if not (done and mark.exists()):
        write_text(mark, wandb.util.generate_id())
    return wandb.init(
        project="trialign", name=folder.name, dir=str(folder), id=mark.read_text(), resume="allow", config=dict(config)
    )
