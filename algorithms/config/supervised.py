"""Sections of scripts that learn from rows: one optimizer step a batch of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import LoRAConfig, OptimizerConfig, require
from .run import EpochRun, ScriptConfig


@dataclass(frozen=True)
class UpdateConfig:
    """How a batch of rows becomes one optimizer step."""

    batch_size: int = 128
    """rows of a step, over all ranks [O]"""
    micro_batch_size: int = 8
    """rows in one forward and backward of a DP rank; changes speed and memory only"""
    micro_batch_tokens: int = 0
    """instead of a number of rows, at most this many tokens in a micro-batch (0: by rows)"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off)"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.micro_batch_tokens >= 0, "micro_batch_tokens", self.micro_batch_tokens, "0 (off) or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")

    def check(self, dp: int, longest: int, option: str, *, even: bool = True) -> None:
        """Refuse a batch that does not fit to the layout, or to the longest row.

        Args:
            longest: tokens of a row, which `option` limits.
            even: every DP rank is to have equally many rows.

        Raises:
            ValueError: with the options and numbers that do not fit.
        """
        if even and self.batch_size % dp:
            raise ValueError(f"update.batch_size={self.batch_size} rows do not divide by dp={dp}")
        if self.batch_size < dp:
            raise ValueError(f"update.batch_size={self.batch_size} rows are fewer than dp={dp}: one a rank at least")
        if 0 < self.micro_batch_tokens < longest:
            raise ValueError(
                f"update.micro_batch_tokens={self.micro_batch_tokens} is less than one row may have: {option}={longest}"
            )


@dataclass(frozen=True)
class SupervisedConfig(ScriptConfig):
    """Sections of a script that learns from rows."""

    run: EpochRun = field(default_factory=EpochRun)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    update: UpdateConfig = field(default_factory=UpdateConfig)
