"""Device state of a lane's running sequences: row i is the i-th in the scheduler's list."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transfer import to_device
from .scheduler import Sequence, Step


class Lane:
    """Rows are filled at admission, advance by a token a step, and are compacted when sequences leave.

    A row without a sequence is a token 0 alone, greedy, in the spare block of the cache: a captured step may run it.
    All tensors keep their addresses, so that a captured step finds them; `tables` and `stop_ids` move where a longer
    sequence or one with more stop ids arrives.

    Attributes:
        sequences: of the rows.
        last: [rows], the last token of each sequence.
        length: [rows], number of tokens, including the last.
        position: [rows], number of response tokens, which counts the random numbers drawn.
        key: [rows], of the random numbers.
        min_new: [rows], number of response tokens before a stop id can be sampled; 0 without stop ids.
        tables: [rows, blocks] int32, cache blocks; the spare one past those of a sequence.
        stop_ids: [rows, ids], filled up with the first one.
        temperature, top_p: [rows] fp32.
        top_k: [rows] int32.
    """

    def __init__(self, rows: int, spare: int, device: torch.device) -> None:
        self.sequences: list[Sequence] = []
        self.spare = spare
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.last, self.length, self.position, self.key, self.min_new = self.state
        self.length.fill_(1)
        self.tables = torch.zeros(rows, 0, dtype=torch.int32, device=device)
        self.stop_ids = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.temperature, self.top_p = torch.zeros(2, rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)

    def prepare(self, step: Step, width: int) -> None:
        """Makes the rows those of `step`.

        Args:
            width: cache blocks of the longest possible sequence.
        """
        place = {id(sequence): row for row, sequence in enumerate(self.sequences)}
        kept = [place[id(sequence)] for sequence in step.rows[: step.kept]]
        if len(kept) < len(self.sequences):
            self._compact(kept)
        if width > self.tables.shape[1]:
            self.tables = F.pad(self.tables, (0, width - self.tables.shape[1]), value=self.spare)
        if step.grown:
            rows, places, blocks = to_device(step.grown, self.state.device).T
            self.tables[rows, places] = blocks.int()
        if step.kept < len(step.rows):
            self._fill(step)
        self.sequences = step.rows

    def _fill(self, step: Step) -> None:
        """Fills the rows after the kept ones."""
        rows, new, device = slice(step.kept, len(step.rows)), step.rows[step.kept :], self.state.device
        columns = [
            [sequence.prompt[-1] for sequence in new],  # of those that decode; the others' are the step's result
            [sequence.length for sequence in new],
            [len(sequence.tokens) for sequence in new],
            [sequence.key for sequence in new],
            [sequence.params.min_new_tokens if sequence.params.stop_ids else 0 for sequence in new],
        ]
        self.state[:, rows] = to_device(columns, device)
        width = self.tables.shape[1]
        tables = [sequence.blocks + [self.spare] * (width - len(sequence.blocks)) for sequence in new]
        self.tables[rows] = to_device(tables, device, torch.int32)
        stops = [sequence.params.stop_ids or (0,) for sequence in new]
        count = max(self.stop_ids.shape[1], *map(len, stops))
        self.stop_ids = F.pad(self.stop_ids, (0, count - self.stop_ids.shape[1]))
        filled = [ids + ids[:1] * (count - len(ids)) for ids in stops]
        self.stop_ids[rows] = to_device(filled, device)
        self.temperature[rows] = to_device([sequence.params.temperature for sequence in new], device)
        self.top_p[rows] = to_device([sequence.params.top_p for sequence in new], device)
        self.top_k[rows] = to_device([sequence.params.top_k for sequence in new], device, torch.int32)

    def advance(self, tokens: Tensor) -> None:
        """Appends a token to each of the first rows."""
        self.last[: len(tokens)] = tokens
        self.state[1:3, : len(tokens)] += 1

    def _compact(self, rows: list[int]) -> None:
        """Moves these rows to the front, in their order; those behind them hold no sequence any more."""
        if rows:
            kept = to_device(rows, self.state.device)
            self.state[:, : len(rows)] = self.state[:, kept]
            for column in (self.tables, self.stop_ids, self.temperature, self.top_k, self.top_p):
                column[: len(rows)] = column[kept]
        left = slice(len(rows), len(self.sequences))
        self.state[:, left] = 0
        self.length[left] = 1
        self.tables[left] = self.spare
        self.temperature[left] = 0


def sample_key(seed: int, sample_id: int) -> int:
    """64-bit key of a sample's random numbers, signed as int64: SplitMix64 over both numbers (Steele et al. 2014, "Fast
    splittable pseudorandom number generators"), so that keys of neighboring seeds and ids are unrelated."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return x ^ (x >> 31)

    key = mix(mix(seed) ^ sample_id)
    return key - (1 << 64) if key >> 63 else key
