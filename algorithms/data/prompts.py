"""Endless, seeded streams of prompts, read and checked before the run; the same on every rank, in any layout."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..batch import Prompt
from ..config.data import PromptData
from ..config.rlhf import PromptsConfig
from .chat import column, need_template, read_prompt, read_tools, render_prompt, users_words, with_system_prompt
from .encoding import encode_prompts
from .sources import Read, RowReader
from .streams import Mixture, eval_indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Item:
    """A row of a prompt."""

    tokens: array
    messages: tuple[dict[str, Any], ...]
    fields: dict[str, Any]
    where: str


class PromptDataset:
    """Endless, seeded stream of prompts.

    Without probabilities all rows form one pool, shuffled each epoch; with them each source is one, sampled by chance.

    Raises:
        ValueError: a source is missing, empty or malformed, or no prompt is short enough; names file, row and key.
    """

    def __init__(self, config: PromptData, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        if config.chat_template:
            need_template(tokenizer)
        self._reader = RowReader(config.reader)
        read = [_load_prompts(source, config, tokenizer, self._reader) for source in config.sources]
        self.rows = sum(len(items) for items in read)
        kept = [[item for item in items if len(item.tokens) <= config.max_prompt_tokens] for items in read]
        self.dropped = self.rows - sum(len(items) for items in kept)
        lengths = [sum(len(item.tokens) for items in pools for item in items) for pools in (read, kept)]
        self.dropped_tokens = lengths[0] - lengths[1]
        self.limit = config.max_prompt_tokens
        self.weights = config.weights()
        for source, items, short in zip(config.sources, read, kept, strict=True):
            if not short and (self.weights or self.dropped == self.rows):
                shortest = min(len(item.tokens) for item in items)
                raise ValueError(
                    f"data source {source}: all {len(items)} prompts are longer than"
                    f" {config.section}.max_prompt_tokens={self.limit}; the shortest has {shortest} tokens"
                )
        self._pools = kept if self.weights else [[item for items in kept for item in items]]
        self._draws = Mixture([len(pool) for pool in self._pools], self.weights, seed, "prompts")

    def __str__(self) -> str:
        dropped = f", {self.dropped} dropped for more than {self.limit} tokens ({self.dropped_tokens:,} tokens)"
        return f"{self.rows - self.dropped} prompts{dropped if self.dropped else ''}"

    def columns(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Source and other columns of each prompt."""
        return ((item.where, item.fields) for pool in self._pools for item in pool)

    def longest(self) -> tuple[str, int]:
        """File and line of the longest prompt, and its tokens."""
        item = max((item for pool in self._pools for item in pool), key=lambda item: len(item.tokens))
        return item.where, len(item.tokens)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> Prompt:
        index = self._draws.drawn
        pool, place = self._draws.next()
        item = self._pools[pool][place]
        return Prompt(index, item.tokens.tolist(), users_words(item.messages), item.fields, item.where, item.messages)

    def state(self) -> dict[str, Any]:
        """Positions and digests of the data, for a checkpoint."""
        return self._draws.state() | {"digests": self._reader.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`. ValueError if the data has changed."""
        self._draws.load_state(state)
        self._reader.check(state.get("digests", ()))


def _load_prompts(source: str, config: PromptData, tokenizer: PreTrainedTokenizerBase, read: Read) -> list[_Item]:
    """All prompts of a source, tokenized, including long ones."""
    rows = list(read(source, config.keys))
    if not rows:
        raise ValueError(f"data source {source}: holds no prompts")
    chats = [with_system_prompt(read_prompt(where, row, config.prompt_key, config), config) for where, row in rows]
    tools = [read_tools(where, row, config) for where, row in rows]
    named = zip(rows, chats, tools, strict=True)
    if config.chat_template:
        texts = [render_prompt(where, chat, tokenizer, own) for (where, _), chat, own in named]
    else:
        texts = [chat[-1]["content"] for chat in chats]
    tokens = encode_prompts(tokenizer, texts, config.chat_template)
    return [
        _Item(array("i", ids), tuple(chat), {k: v for k, v in row.items() if k != config.prompt_key}, where)
        for (where, row), chat, ids in zip(rows, chats, tokens, strict=True)
    ]


def split_prompts(config: PromptsConfig, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, eval rows) in the order of the data; equal prompts are in the same split.

    Raises:
        ValueError: a source cannot be read or lacks the column, or a split would be empty.
    """
    rows, keys = [], []
    for source in config.sources:
        for where, row in RowReader(config.reader)(source, config.keys):
            keys.append(json.dumps(column(where, row, config.prompt_key, "prompts.prompt_key"), sort_keys=True))
            rows.append(row)
    distinct = list(dict.fromkeys(keys))
    chosen = {distinct[i] for i in eval_indices(len(distinct), config.eval_fraction, seed)}
    if len(chosen) == len(distinct):
        raise ValueError(
            f"prompts.eval_fraction={config.eval_fraction} of {len(distinct)} prompts leaves none to learn from"
        )
    sides = [[row for key, row in zip(keys, rows, strict=True) if (key in chosen) == out] for out in (False, True)]
    return sides[0], sides[1]
