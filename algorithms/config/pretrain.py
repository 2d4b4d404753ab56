"""Config of launch/pretrain.py. [O] OpenRLHF, [T] TRL, [V] verl."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...engine.config import FilePath
from .common import OptimizerConfig, require
from .data import RowData
from .run import EpochRun
from .supervised import SupervisedConfig, UpdateConfig


@dataclass(frozen=True)
class TextData(RowData):
    """Documents, how they are cut and packed, and what is held out."""

    sources: tuple[FilePath, ...] = ()
    """files (.txt and .md, a document each; .jsonl, .json, .csv, .tsv, .parquet), folders, or names on the hub"""
    chat_template: bool = False
    """must be false: text is learned as it stands"""
    max_tokens: int = 2048
    """tokens of a row: documents are packed into rows of at most so many, longer ones are cut into pieces"""
    text_key: str = "text"
    """column that holds a document"""
    min_tokens: int = 2
    """documents with fewer tokens, end of sequence included, are counted and dropped"""
    eval_fraction: float = 0.0
    """instead of that, this share of the documents is held out, chosen by the seed (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.chat_template, "chat_template", self.chat_template, "false: text is learned as it stands")
        require(not self.system_prompt, "system_prompt", repr(self.system_prompt), "empty: text has none")
        require(self.min_tokens >= 2, "min_tokens", self.min_tokens, "at least 2: a lone token has nothing to predict")
        require(bool(self.text_key), "text_key", repr(self.text_key), "the name of a column")


@dataclass(frozen=True)
class PretrainConfig(SupervisedConfig):
    """Continued pretraining: the model learns to predict every token of plain text.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "text"

    data: TextData = field(default_factory=TextData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/pretrain"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, weight_decay=0.1))
    update: UpdateConfig = field(default_factory=lambda: UpdateConfig(batch_size=32, micro_batch_size=1))

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = super().check(world)
        self.update.check(dp, self.data.max_tokens, "data.max_tokens")
        return dp
