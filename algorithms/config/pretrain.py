"""Config of launch/pretrain.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...engine.config import FilePath
from .common import OptimizerConfig, require, require_at_least
from .data import RowData
from .run import EpochRun
from .supervised import SupervisedConfig, UpdateConfig


@dataclass(frozen=True)
class TextData(RowData):
    """Documents, packed into rows, and the eval split."""

    sources: tuple[FilePath, ...] = ()
    """files (.txt and .md, a document each; .jsonl, .json, .csv, .tsv, .parquet), folders, or Hugging Face datasets"""
    chat_template: bool = False
    """must be false: documents are plain text"""
    max_tokens: int = 2048
    """sequence length in tokens: documents are packed into rows of at most this length, longer ones are split"""
    text_key: str = "text"
    """column of the document"""
    min_tokens: int = 2
    """minimum document length in tokens, end of sequence included; shorter ones are dropped and counted"""
    eval_fraction: float = 0.0
    """fraction of the documents in the eval split, chosen by run.seed, without eval_sources (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.chat_template, "chat_template", self.chat_template, "false: documents are plain text")
        require(not self.system_prompt, "system_prompt", repr(self.system_prompt), "empty: documents are plain text")
        require_at_least(self, 2, "min_tokens")


@dataclass(frozen=True)
class PretrainConfig(SupervisedConfig):
    """Continued pretraining: next-token prediction on plain text.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "text"

    data: TextData = field(default_factory=TextData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/pretrain"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, weight_decay=0.1))
    update: UpdateConfig = field(default_factory=lambda: UpdateConfig(batch_size=32, micro_batch_size=1))
