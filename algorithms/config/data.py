"""Options of rows to learn from, which the scripts' own data sections extend."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.config import FilePath
from .common import DataConfig, require


@dataclass(frozen=True)
class RowData(DataConfig):
    """Rows, how long they may be, and what is held out."""

    max_tokens: int = 2048
    """rows with more tokens, template included, are counted and dropped [O]"""
    eval_sources: tuple[FilePath, ...] = ()
    """rows for the held-out measurements, given like sources"""
    eval_fraction: float = 0.0
    """instead of that, this share of the rows is held out, chosen by the seed (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_tokens >= 2, "max_tokens", self.max_tokens, "at least 2")
        require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "0 (off) or more and below 1")
        if self.eval_sources and self.eval_fraction:
            raise ValueError(f"eval_fraction={self.eval_fraction}: must be 0 where eval_sources are given")


@dataclass(frozen=True)
class ResponseData(RowData):
    """Rows with responses to learn."""

    append_eos: bool = False
    """learn an end of sequence behind turns that the chat template gives none, or none to learn (false: refuse them)"""
