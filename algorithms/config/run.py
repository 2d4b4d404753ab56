"""The `run` section, and the sections that every script which trains a model has."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...engine.config import AUTO, NEW
from ...engine.mesh import check_layout
from .common import ModelPaths, ParallelConfig, require
from .data import DataConfig


def require_seconds(timeout: float, grace: float = 0.0) -> None:
    """Refuse a `run.timeout` or `run.grace` that is no length of time."""
    require(0 < timeout < math.inf, "timeout", timeout, "above 0 (seconds)")
    require(0 <= grace < math.inf, "grace", grace, "0 (a step is dropped at once) or more (seconds)")


@dataclass(frozen=True)
class FolderConfig:
    """The folder of a run. One that already holds a run is refused, unless an option decides what becomes of that."""

    output: str = "runs/trialign"
    """folder for logs, results, checkpoints and the exported model"""
    resume: str = NEW
    """auto: go on with the run in run.output from its newest whole checkpoint, or begin it where there is none; a
    folder: go on with the run in it, whose config.toml gives the defaults ("": begin a run)"""
    overwrite: bool = False
    """delete the run that run.output holds, and begin anew"""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", repr(self.output), "a folder")
        if self.overwrite and self.resume not in (NEW, AUTO):
            raise ValueError(f"overwrite=True: deletes a run, and resume={self.resume} goes on with one")

    @property
    def folder(self) -> str:
        """The run's folder: a resumed run stays in its own."""
        return self.output if self.resume in (NEW, AUTO) else self.resume


@dataclass(frozen=True)
class RunConfig(FolderConfig):
    """Run: folder, checkpoints, logs, seed, time limits."""

    save_every: int = 50
    """steps between checkpoints (0: only at the end)"""
    keep: int = 2
    """newest checkpoints that stay"""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """where metrics go beside the JSONL file"""
    seed: int = 0
    """seeds shuffling, sampling and new heads"""
    timeout: float = 1800.0
    """seconds that a rank may keep the others waiting before the run ends with a message that names the late rank"""
    grace: float = 15.0
    """seconds after a request to stop in which the current step may still end; a longer one is dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seconds(self.timeout, self.grace)
        require(self.keep >= 1, "keep", self.keep, "at least 1")
        for name in ("save_every", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True)
class EpochRun(RunConfig):
    """Run over rows in epochs: folder, length, checkpoints, logs, seed, time limits."""

    epochs: int = 1
    """passes over the rows; the last step fills up with rows of one more"""
    steps: int = 0
    """optimizer steps of the run, whatever the epochs (0: the epochs decide)"""
    eval_every: int = 50
    """steps between measurements on the eval split (0: only before the first step and after the last)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        for name in ("steps", "eval_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    def total(self, rows: int, batch_size: int) -> int:
        """Optimizer steps over `rows` rows."""
        return self.steps or -(-self.epochs * rows // batch_size)


@dataclass(frozen=True)
class ScriptConfig:
    """Sections of every script that trains a model."""

    noun: ClassVar[str] = "rows"  # of data.sources, as messages name them

    model: ModelPaths = field(default_factory=ModelPaths)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def rows(self) -> DataConfig:
        """The section of the rows to learn from."""
        return self.data

    def check(self, world: int) -> int:
        """Refuse options that do not fit together or to the world size, before any model is loaded.

        Returns:
            The size of the DP axis.

        Raises:
            ValueError: with the options and numbers that do not fit.
        """
        return check_given(self.model, self.rows, self.parallel, world, self.noun)


def check_given(model: ModelPaths, data: DataConfig, parallel: ParallelConfig, world: int, rows: str) -> int:
    """Refuse a config without a model or rows, or whose layout does not make up the world; the size of the DP axis."""
    if not model.path:
        raise ValueError("model.path is not given: the folder of the model to start from, in Hugging Face format")
    data.check(rows)
    return check_layout(world, tp=parallel.tp, pp=parallel.pp, dp=parallel.dp or None, ep=parallel.ep)
