"""Config sections of scripts that learn from rows: one optimizer step for each batch of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .common import LoRAConfig, MicroBatchConfig, OptimizerConfig, require_at_least, require_fraction
from .data import RowData
from .run import EpochRun, ScriptConfig


@dataclass(frozen=True)
class UpdateConfig(MicroBatchConfig):
    """Batch of an optimizer step."""

    batch_size: int = 128
    """global batch size: rows per optimizer step, over all ranks [O]"""
    ema_decay: float = 0.0
    """decay of an exponential moving average of the weights, exported too (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_size")
        require_fraction(self, "ema_decay", below_1=True)

    def check(self, dp: int, longest: int, options: str, *, even: bool = True) -> None:
        """Refuse a batch that does not fit the layout or the longest row.

        Args:
            longest: tokens of a row, which `options` limit.
            even: every DP rank needs equally many rows.

        Raises:
            ValueError: with the options and numbers that do not fit.
        """
        if even and self.batch_size % dp:
            raise ValueError(f"update.batch_size={self.batch_size} rows do not divide by dp={dp}")
        if self.batch_size < dp:
            raise ValueError(f"update.batch_size={self.batch_size} rows are fewer than dp={dp}: at least one a rank")
        self.check_longest("update", longest, options)


@dataclass(frozen=True)
class SupervisedConfig(ScriptConfig):
    """Sections of a script that learns from rows."""

    even: ClassVar[bool] = True  # DP ranks need equally many rows

    data: RowData = field(default_factory=RowData)
    run: EpochRun = field(default_factory=EpochRun)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    update: UpdateConfig = field(default_factory=UpdateConfig)

    @property
    def rows(self) -> RowData:
        """The section of the training rows."""
        return self.data

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp, rows = super().check(world), self.rows
        options = (
            f"{rows.row_samples} x {rows.section}.max_tokens" if rows.row_samples > 1 else f"{rows.section}.max_tokens"
        )
        self.update.check(dp, rows.row_samples * rows.max_tokens, options, even=self.even)
        return dp
