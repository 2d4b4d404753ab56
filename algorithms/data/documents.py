"""Documents of pretraining: split into passages and packed into rows; and the text of PPO's pretraining mix.

Each passage is a sample of its own: attention and positions restart with it. A document ends with the end of sequence.
Passages of a document longer than a row overlap by one token, so that every token but its first is predicted once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, pack
from ..config.pretrain import TextData
from .chat import column, shorten
from .encoding import encode_documents
from .sources import Read, RowReader
from .streams import RowStream, split_eval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # documents tokenized at once


class Passage(NamedTuple):
    """A document, or part of one."""

    tokens: array[int]
    where: str  # as text.jsonl:12


PackedRow = list[Passage]
"""A row: passages of at most `data.max_tokens` tokens in total."""


def pack_tokens(row: PackedRow) -> int:
    """Tokens of a row."""
    return sum(len(piece.tokens) for piece in row)


def read_texts(source: str, key: str, option: str, read: Read) -> Iterator[tuple[str, str]]:
    """(where, text) of every document of a source; a .txt or .md file is one.

    Args:
        option: of the column `key`.

    Raises:
        ValueError: it does not exist or cannot be read, a row lacks the column, or it holds no string; names the row.
    """
    for where, row in read(source, {"text_key": key}):
        text = column(where, row, key, option)
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key!r} must be a string, not {shorten(text)}")
        yield where, text


def cut(document: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    """Parts of a document of at most `length` tokens, each beginning with the last token of the one before."""
    for begin in range(0, max(1, len(document) - 1), length - 1):
        yield document[begin : begin + length]


def passages(documents: Sequence[Passage], length: int) -> list[Passage]:
    """All documents' passages of at most `length` tokens."""
    return [Passage(array("i", part), d.where) for d in documents for part in cut(d.tokens, length)]


def fill(parts: Sequence[Passage], budget: int) -> list[PackedRow]:
    """Pack passages into rows of at most `budget` tokens: longest first, into the fullest row with room (best fit)."""
    rows: list[PackedRow] = []
    open_rows: dict[int, list[int]] = {}  # room -> rows that have it
    rooms: list[int] = []  # keys of open_rows, in order
    for piece in sorted(parts, key=lambda piece: -len(piece.tokens)):
        size = len(piece.tokens)
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, row = budget, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(piece)
        left = room - size
        if left >= 2:  # the shortest passage
            if left not in open_rows:
                insort(rooms, left)
            open_rows.setdefault(left, []).append(row)
    return rows


class TextStream(RowStream[PackedRow]):
    """Stream of continued pretraining.

    Raises:
        ValueError: a source is missing, empty or malformed, or no document is long enough; names file, row and key.
    """

    def __init__(self, config: TextData, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        self.floor, self.short, self.short_tokens, reader = config.min_tokens, 0, 0, RowReader(config.reader)
        sources = (*config.sources, *config.eval_sources)
        read = {source: self._read(source, config, tokenizer, reader) for source in sources}
        unseen = [document for source in config.eval_sources for document in read[source]]
        learned = {source: read[source] for source in config.sources}
        if config.eval_fraction:
            pools, places = split_eval(config, list(learned.values()), seed, "documents")
            unseen = [learned[source][i] for source, i in sorted((config.sources[pool], i) for pool, i in places)]
            learned = dict(zip(learned, pools, strict=True))
        if not config.probabilities:
            learned = {", ".join(learned): [document for documents in learned.values() for document in documents]}
        self.documents = sum(map(len, learned.values()))
        self.cut = sum(len(d.tokens) > config.max_tokens for documents in learned.values() for d in documents)
        packed = {
            source: fill(passages(documents, config.max_tokens), config.max_tokens)
            for source, documents in learned.items()
        }
        # The eval split has whole documents, chosen before packing.
        rest = replace(config, sources=tuple(packed), eval_sources=(), eval_fraction=0.0)
        super().__init__(rest, packed.__getitem__, lambda row: [pack_tokens(row)], seed, reader=reader)
        self.eval_rows = fill(passages(unseen, config.max_tokens), config.max_tokens)

    def _read(self, source: str, config: TextData, tokenizer: PreTrainedTokenizerBase, read: Read) -> list[Passage]:
        """Documents of a source of at least `min_tokens` tokens."""
        texts = read_texts(source, config.text_key, f"{config.section}.text_key", read)
        documents = list(tokenize_texts(texts, tokenizer))
        if not documents:
            raise ValueError(f"data source {source}: holds no documents")
        kept = [document for document in documents if len(document.tokens) >= config.min_tokens]
        if not kept:
            option = f"{config.section}.min_tokens={config.min_tokens}"
            raise ValueError(f"data source {source}: all {len(documents)} documents have fewer tokens than {option}")
        self.short += len(documents) - len(kept)
        self.short_tokens += sum(len(d.tokens) for d in documents) - sum(len(d.tokens) for d in kept)
        return kept

    def amount(self) -> str:
        full = self.tokens / (len(self) * self.limit)
        text = f"{len(self)} rows of {self.tokens:,} tokens ({full:.1%} full) out of {self.documents:,} documents"
        return text + (f", {self.cut:,} split" if self.cut else "")

    def __str__(self) -> str:
        text = super().__str__()
        if self.short:
            text += f"; {self.short} dropped for fewer than {self.floor} tokens ({self.short_tokens:,} tokens)"
        return text


def tokenize_texts(texts: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    """Tokens of each document, end of sequence included; an empty one has only that."""
    waiting: list[tuple[str, str]] = []

    def flush() -> Iterator[Passage]:
        encoded = encode_documents(tokenizer, [text for _, text in waiting])
        for (where, text), ids in zip(waiting, encoded, strict=True):
            yield Passage(array("i", ids if text.strip() else ids[-1:]), where)
        waiting.clear()

    for document in texts:
        waiting.append(document)
        if len(waiting) == CHUNK:
            yield from flush()
    yield from flush()


def pack_documents(rows: Sequence[PackedRow]) -> Batch:
    """Batch for a forward pass: a sample a piece, all tokens but each piece's first are targets; micro-batches are of
    so many pieces."""
    pieces = [piece for row in rows for piece in row]
    return pack([piece.tokens.tolist() for piece in pieces]).with_(names=tuple(piece.where for piece in pieces))


def pack_rows(rows: Sequence[PackedRow]) -> Batch:
    """Batch for an update: as `pack_documents`, with micro-batches of so many whole rows."""
    return pack_documents(rows).with_(row_sizes=tuple(map(len, rows)))


class TextDataset:
    """Endless, seeded stream of the pretraining mix: shuffled documents with ends of sequence, cut to one length.

    Args:
        length: tokens of a sequence.

    Raises:
        ValueError: the source is missing, empty or malformed, or has less text than one sequence; the tokenizer has no
            end of sequence.
    """

    def __init__(self, source: str, key: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int = 0):
        self._reader = RowReader()
        texts = [text for _, text in read_texts(source, key, "data.ptx_key", self._reader)]
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
        epoch, place = divmod(self._position, self.tokens // self.length)  # an epoch's last, short sequence is dropped
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._documents))
            self._epoch, self._stream = epoch, np.concatenate([self._documents[i] for i in order])
        self._position += 1
        return self._stream[place * self.length : (place + 1) * self.length]

    def state(self) -> dict[str, Any]:
        """Position and digests, for a checkpoint."""
        return {"position": self._position, "tokens": self.tokens, "digests": self._reader.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`. ValueError if the text has changed."""
        if state["tokens"] != self.tokens:
            raise ValueError(f"the text has changed since the checkpoint: {state['tokens']} tokens, now {self.tokens}")
        self._reader.check(state.get("digests", ()))
        self._position = state["position"]
