"""The `run` section, and the sections of every script that trains a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...engine.config import AUTO, NEW
from ...engine.mesh import check_layout
from .common import ModelPaths, ParallelConfig, require, require_at_least
from .data import DataConfig


@dataclass(frozen=True)
class FolderConfig:
    """Run: folder, seed, timeout."""

    output: str = "runs/trialign"
    """folder of logs, results, checkpoints and the exported model; refused if it holds a run, see resume, overwrite"""
    resume: str = NEW
    """auto: resume the run in run.output from its latest complete checkpoint, or start it; a folder: resume the run in
    it, with the defaults of its config.toml (empty: start a new run)"""
    overwrite: bool = False
    """delete an existing run in run.output and start anew"""
    seed: int = 0
    """random seed of shuffling, sampling, splits and new weights"""
    timeout: float = 1800.0
    """seconds that ranks wait for a late one before the run stops with an error that names it"""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", repr(self.output), "a folder")
        if self.overwrite and self.resume not in (NEW, AUTO):
            raise ValueError(f"overwrite=True: deletes a run, and resume={self.resume} continues one")
        require_at_least(self, 0, "seed")
        require(0 < self.timeout < math.inf, "timeout", self.timeout, "above 0 (seconds)")

    @property
    def folder(self) -> str:
        """The run's folder: a resumed run stays in its own."""
        return self.output if self.resume in (NEW, AUTO) else self.resume


@dataclass(frozen=True)
class LoggedRun(FolderConfig):
    """Run: folder, loggers, seed, timeouts."""

    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """loggers of the metrics, besides metrics.jsonl"""
    grace: float = 15.0
    """grace period in seconds: after a stop signal the current step may finish within it, or is dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "grace")


@dataclass(frozen=True)
class RunConfig(LoggedRun):
    """Run: folder, checkpoints, loggers, seed, timeouts."""

    save_every: int = 50
    """steps between checkpoints (0: only at the end)"""
    keep: int = 2
    """number of latest checkpoints to keep"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "keep")
        require_at_least(self, 0, "save_every")


@dataclass(frozen=True)
class PolicyRun(RunConfig):
    """Run of a policy that samples responses: folder, checkpoints, loggers, seed, timeouts."""

    show: int = 4
    """number of prompts with greedy responses before and after training in the final table"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "show")


@dataclass(frozen=True)
class EpochRun(RunConfig):
    """Run over rows in epochs: folder, length, checkpoints, loggers, seed, timeouts."""

    epochs: int = 1
    """passes over the rows; the last batch is filled with rows of one more"""
    steps: int = 0
    """number of optimizer steps, in place of epochs (0: off)"""
    eval_every: int = 50
    """steps between evaluations on the eval split (0: only before the first step and after the last)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "epochs")
        require_at_least(self, 0, "steps", "eval_every")

    def total(self, rows: int, batch_size: int) -> int:
        """Optimizer steps over `rows` rows."""
        return self.steps or -(-self.epochs * rows // batch_size)


@dataclass(frozen=True)
class ScriptConfig:
    """Sections of every script that trains a model."""

    noun: ClassVar[str] = "rows"  # of data.sources, in messages

    model: ModelPaths = field(default_factory=ModelPaths)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def rows(self) -> DataConfig:
        """The section of the training rows."""
        return self.data

    def check(self, world: int) -> int:
        """Refuse options that do not fit together or the world size, before any model is loaded.

        Returns:
            The size of the DP axis.

        Raises:
            ValueError: with the options and numbers that do not fit.
        """
        return check_given(self.model, self.rows, self.parallel, world, self.noun)


def check_given(model: ModelPaths, data: DataConfig, parallel: ParallelConfig, world: int, rows: str) -> int:
    """Refuse a config without a model or rows, or with a layout of another world size; the size of the DP axis."""
    if not model.path:
        raise ValueError("model.path is not given: the folder of the initial weights, in Hugging Face format")
    data.check(rows)
    return check_world(parallel, world)


def check_world(parallel: ParallelConfig, world: int) -> int:
    """Refuse a layout of another world size; the size of the DP axis."""
    return check_layout(world, tp=parallel.tp, pp=parallel.pp, dp=parallel.dp or None, ep=parallel.ep)
