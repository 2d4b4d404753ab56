"""The `data` section: sources of rows and their tokenization; scripts extend it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from ...engine.config import FilePath, FunctionPath
from ..extensions import READER, check_function
from .common import require, require_at_least, require_fraction


@dataclass(frozen=True)
class DataConfig:
    """Sources of rows and their tokenization."""

    section: ClassVar[str] = "data"  # of the config, in messages

    sources: tuple[FilePath, ...] = ()
    """files (.jsonl, .json, .csv, .tsv, .parquet), folders of files, folders saved by the datasets library, or Hugging
    Face dataset names (name:config:split)"""
    probabilities: tuple[float, ...] = ()
    """sampling weight of each source, normalized to sum to 1 (empty: all rows are sampled alike)"""
    reader: FunctionPath = ""
    """custom reader of each source, path/to/file.py:function or module:function: (source) -> rows as dicts (empty: by
    file type)"""
    chat_template: bool = True
    """format messages with the tokenizer's chat template; false: plain text"""
    system_prompt: str = ""
    """system message of rows without one (empty: the chat template's default)"""

    def __post_init__(self) -> None:
        self.weights()
        for name, column in self.keys.items():
            require(bool(column) or name == "margin_key", name, repr(column), "the name of a column")

    @property
    def keys(self) -> dict[str, str]:
        """Option -> the column it names."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_key")}

    def weights(self) -> tuple[float, ...]:
        """`probabilities` normalized to sum to 1.

        Raises:
            ValueError: not one for each source, or not numbers from 0 up with one above.
        """
        numbers = self.probabilities
        if numbers and len(numbers) != len(self.sources):
            raise ValueError(f"probabilities={numbers}: {len(numbers)} numbers for {len(self.sources)} sources")
        if not all(0 <= number < math.inf for number in numbers) or numbers and not any(numbers):
            raise ValueError(f"probabilities={numbers}: must be 0 or more, and not all 0")
        return tuple(number / sum(numbers) for number in numbers)

    def check(self, rows: str) -> None:
        """Refuse a section without sources of `rows`, or with a reader that cannot be loaded."""
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
    """column of the prompt: a string, or a list of {role, content} messages"""
    max_prompt_tokens: int = 1024
    """maximum prompt length in tokens, chat template included; longer prompts are dropped and counted"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "max_prompt_tokens")


@dataclass(frozen=True)
class RowData(DataConfig):
    """Rows, their maximum length, and the eval split."""

    row_samples: ClassVar[int] = 1  # sequences of a row

    max_tokens: int = 2048
    """maximum sequence length in tokens, chat template included; longer rows are dropped and counted [O]"""
    eval_sources: tuple[FilePath, ...] = ()
    """sources of the eval split"""
    eval_fraction: float = 0.0
    """fraction of the rows in the eval split, chosen by run.seed, without eval_sources (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 2, "max_tokens")
        require_fraction(self, "eval_fraction", below_1=True)
        if self.eval_sources and self.eval_fraction:
            raise ValueError(f"eval_fraction={self.eval_fraction}: must be 0 with eval_sources={self.eval_sources}")


@dataclass(frozen=True)
class ResponseData(RowData):
    """Rows with responses to learn."""

    append_eos: bool = False
    """append end of sequence to turns that the chat template ends without a learned one (false: refuse such rows)"""
