"""Prompts and text: read and checked whole before the run, then drawn endlessly in an order the seed alone decides.

Every rank reads the same rows and draws the same prompts, in any layout. A stream's place is a small dict; given back
with the same data it goes on exactly there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Prompt
from ..config.common import PromptData
from .chat import (
    brief,
    column,
    need_template,
    read_prompt,
    read_tools,
    render_prompt,
    users_words,
    with_system_prompt,
)
from .encoding import encode_documents, encode_prompts
from .sources import Read, RowReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Item:
    """A prompt before it is drawn."""

    tokens: array
    messages: tuple[dict[str, Any], ...]
    fields: dict[str, Any]
    where: str


class PromptDataset:
    """An endless, seeded stream of prompts out of one or more sources.

    Without probabilities all rows form one pool, met once an epoch in shuffled order; with them each source is a pool
    with epochs of its own, and each draw picks a pool by chance.

    Args:
        tokenizer: a Hugging Face tokenizer; its chat template wraps the prompts unless the config says no.

    Raises:
        ValueError: a source is missing, empty or malformed, or no prompt is short enough; names file, row and key.
    """

    def __init__(self, config: PromptData, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        if config.chat_template:
            need_template(tokenizer)
        self._reader = RowReader()
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
        """Where each prompt was read, and the other columns of its row."""
        return ((item.where, item.fields) for pool in self._pools for item in pool)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> Prompt:
        index = self._draws.drawn
        pool, place = self._draws.next()
        item = self._pools[pool][place]
        return Prompt(index, item.tokens.tolist(), users_words(item.messages), item.fields, item.where, item.messages)

    def state(self) -> dict[str, Any]:
        """Where the stream is, and in which data, for a checkpoint."""
        return self._draws.state() | {"digests": self._reader.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: the data is not what it was then; names the source.
        """
        self._draws.load_state(state)
        self._reader.check(state.get("digests", ()))


class Mixture:
    """Endless, seeded draws out of pools of rows: one pool in epochs, or several, each draw picking one by chance.

    Args:
        sizes: rows of each pool.
        weights: how likely each pool is; none where there is one.
        rows: what the rows are, for messages.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, rows: str = "rows"):
        self.sizes, self.weights, self.rows = list(sizes), weights, rows
        self.drawn = 0
        self._seed = seed
        self._order = [_Order(size, (seed, number)) for number, size in enumerate(sizes)]

    def next(self) -> tuple[int, int]:
        """(pool, row in it)."""
        pool = 0
        if self.weights:  # keyed by the draw, so that going on needs no generator's state
            pool = int(np.random.default_rng((self._seed, self.drawn)).choice(len(self.weights), p=self.weights))
        self.drawn += 1
        return pool, self._order[pool].next()

    def state(self) -> dict[str, Any]:
        """Where the stream is, for a checkpoint."""
        return {"drawn": self.drawn, "positions": [order.position for order in self._order], "rows": self.sizes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: the pools are not what they were then.
        """
        if state["rows"] != self.sizes:
            raise ValueError(
                f"the {self.rows} have changed since the checkpoint: {state['rows']} rows, now {self.sizes}"
            )
        self.drawn = state["drawn"]
        for order, position in zip(self._order, state["positions"], strict=True):
            order.position = position


class _Order:
    """Endless shuffled indices below `size`: each epoch is a permutation of its own, found from seed and epoch."""

    def __init__(self, size: int, seed: tuple[int, ...]):
        self.size, self.seed, self.position = size, seed, 0
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def next(self) -> int:
        epoch, place = divmod(self.position, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng((*self.seed, epoch)).permutation(self.size)
        self.position += 1
        return int(self._permutation[place])


def _load_prompts(source: str, config: PromptData, tokenizer: PreTrainedTokenizerBase, read: Read) -> list[_Item]:
    """All prompts of a source, over-long ones too, tokenized."""
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


class TextDataset:
    """An endless, seeded stream of packed text for the pretraining mix: documents in shuffled order, an end of sequence
    after each, cut into sequences of equal length.

    Args:
        length: tokens of a sequence.

    Raises:
        ValueError: the source is missing, empty or malformed, or has less text than one sequence; the tokenizer has no
            end of sequence.
    """

    def __init__(self, source: str, key: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int = 0):
        self._reader = RowReader()
        rows = list(self._reader(source, {"text_key": key}))
        texts = [column(where, row, key, "data.ptx_key") for where, row in rows]
        for (where, _), text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{where}: {key!r} must be a string, not {brief(text)}")
        self._documents = [np.array(document, np.int64) for document in encode_documents(tokenizer, texts)]
        self.tokens = sum(len(document) for document in self._documents)
        if self.tokens < length:
            raise ValueError(f"data source {source}: {self.tokens} tokens are less than one sequence of {length}")
        self.length, self._seed, self._position = length, seed, 0
        self._epoch, self._stream = -1, np.empty(0, np.int64)

    def next(self, count: int) -> Tensor:
        """The next sequences: [count, length] int64."""
        return torch.from_numpy(np.stack([self._draw() for _ in range(count)]))

    def _draw(self) -> np.ndarray:
        epoch, place = divmod(self._position, self.tokens // self.length)  # an epoch's last, short sequence is left out
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._documents))
            self._epoch, self._stream = epoch, np.concatenate([self._documents[i] for i in order])
        self._position += 1
        return self._stream[place * self.length : (place + 1) * self.length]

    def state(self) -> dict[str, Any]:
        """Where the stream is, and in which text, for a checkpoint."""
        return {"position": self._position, "tokens": self.tokens, "digests": self._reader.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: the text is not what it was then.
        """
        if state["tokens"] != self.tokens:
            raise ValueError(f"the text has changed since the checkpoint: {state['tokens']} tokens, now {self.tokens}")
        self._reader.check(state.get("digests", ()))
        self._position = state["position"]
