"""The `data` section: rows and how they become tokens, which the scripts' own sections extend."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from ...engine.config import FilePath, FunctionPath
from ..extensions import READER, check_function
from .common import require


@dataclass(frozen=True)
class DataConfig:
    """Rows and how they become tokens."""

    section: ClassVar[str] = "data"  # of the config, as messages name its options
    sources: tuple[FilePath, ...] = ()
    """files (.jsonl, .json, .csv, .tsv, .parquet), folders of them or by `datasets`, hub names (name:config:split)"""
    probabilities: str = ""
    """sampling probability of each source, as 0.5,0.4,0.1 ("": all rows alike)"""
    reader: FunctionPath = ""
    """path/to/file.py:function or module:function that reads a source: (source) -> rows as dicts ("": by file type)"""
    chat_template: bool = True
    """wrap the messages in the tokenizer's chat template; false feeds the bare text"""
    system_prompt: str = ""
    """system message put before rows that bring none ("": the template's own)"""

    def __post_init__(self) -> None:
        self.weights()

    @property
    def keys(self) -> dict[str, str]:
        """Option -> the column that it names."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_key")}

    def weights(self) -> tuple[float, ...]:
        """`probabilities` as numbers that add up to 1; empty where all rows are drawn alike."""
        if not self.probabilities:
            return ()
        try:
            numbers = tuple(float(part) for part in self.probabilities.split(","))
        except ValueError:
            raise ValueError(
                f"probabilities={self.probabilities!r}: must be numbers with commas, as 0.5,0.4,0.1"
            ) from None
        if len(numbers) != len(self.sources):
            raise ValueError(
                f"probabilities={self.probabilities!r}: {len(numbers)} numbers for {len(self.sources)} sources"
            )
        if not all(0 <= number < math.inf for number in numbers) or sum(numbers) <= 0:
            raise ValueError(f"probabilities={self.probabilities!r}: must be 0 or more, and not all 0")
        return tuple(number / sum(numbers) for number in numbers)

    def check(self, rows: str) -> None:
        """Refuse a section without sources, or with a reader that cannot be loaded.

        Args:
            rows: what the sources hold, for the message.
        """
        if not self.sources:
            raise ValueError(f"{self.section}.sources is not given: at least one file of {rows}")
        self.check_reader()

    def check_reader(self) -> None:
        """Refuse a reader that cannot be loaded."""
        if self.reader:
            check_function(f"{self.section}.reader", self.reader, READER)


@dataclass(frozen=True)
class PromptData(DataConfig):
    """Prompts."""

    prompt_key: str = "prompt"
    """column that holds the prompt: a string, or a list of {role, content} messages"""
    max_prompt_tokens: int = 1024
    """prompts with more tokens, template included, are counted and dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_prompt_tokens >= 1, "max_prompt_tokens", self.max_prompt_tokens, "at least 1")
        require(bool(self.prompt_key), "prompt_key", repr(self.prompt_key), "the name of a column")


@dataclass(frozen=True)
class RowData(DataConfig):
    """Rows, their longest length, and the eval split."""

    max_tokens: int = 2048
    """rows with more tokens, template included, are counted and dropped [O]"""
    eval_sources: tuple[FilePath, ...] = ()
    """rows of the eval split, given like sources"""
    eval_fraction: float = 0.0
    """instead of that, the share of the rows in the eval split, chosen by the seed (0: off)"""

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
