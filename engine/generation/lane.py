"""Device state of a lane's running sequences: row i is the i-th in the scheduler's list."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transfer import to_device
from .scheduler import NewRows, Step


class Lane:
    """Rows are filled at admission, advance by a token a step, and are compacted when sequences leave.

    A row without a sequence is a token 0 alone, greedy, in the spare block of the cache: a captured step may run it.
    All tensors keep their addresses, so that a captured step finds them; `tables` and `stop_ids` move where a longer
    sequence or one with more stop ids arrives.

    Attributes:
        count: of rows that hold a sequence, the first ones.
        last: [rows], the last token of each sequence.
        length: [rows], number of tokens, including the last.
        position: [rows], number of response tokens, which counts the random numbers drawn.
        key: [rows], of the random numbers.
        min_new: [rows], number of response tokens before a stop id can be sampled; 0 without stop ids.
        tables: [rows, blocks] int32, cache blocks; the spare one past those of a sequence.
        stop_ids: [rows, ids], filled up with the first one.
        sampling: [2, rows] fp32, `temperature` and `top_p`.
        top_k: [rows] int32.
    """

    def __init__(self, rows: int, spare: int, device: torch.device) -> None:
        self.count, self.spare = 0, spare
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.last, self.length, self.position, self.key, self.min_new = self.state
        self.length.fill_(1)
        self.tables = torch.zeros(rows, 0, dtype=torch.int32, device=device)
        self.stop_ids = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.sampling = torch.zeros(2, rows, dtype=torch.float32, device=device)
        self.temperature, self.top_p = self.sampling
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)

    def prepare(self, step: Step, width: int) -> None:
        """Makes the rows those of `step`.

        Args:
            width: cache blocks of the longest possible sequence.
        """
        device = self.state.device
        if step.moved is not None:
            kept = to_device(step.moved, device)
            self.state[:, : step.kept] = self.state[:, kept]
            self.sampling[:, : step.kept] = self.sampling[:, kept]
            for column in (self.tables, self.stop_ids, self.top_k):
                column[: step.kept] = column[kept]
        if step.kept < self.count:
            self._clear(slice(step.kept, self.count))
        if width > self.tables.shape[1]:
            self.tables = F.pad(self.tables, (0, width - self.tables.shape[1]), value=self.spare)
        if len(step.grown):
            rows, places, blocks = to_device(step.grown, device).T
            self.tables[rows, places] = blocks.int()
        if step.kept < step.size:
            self._fill(slice(step.kept, step.size), step.new_rows(self.tables.shape[1], self.stop_ids.shape[1]))
        self.count = step.size

    def _fill(self, rows: slice, new: NewRows) -> None:
        device = self.state.device
        more = new.stop_ids.shape[1] - self.stop_ids.shape[1]
        if more:
            self.stop_ids = F.pad(self.stop_ids, (0, more))
        self.state[:, rows] = to_device(new.state, device)
        self.tables[rows] = to_device(new.tables, device)
        self.stop_ids[rows] = to_device(new.stop_ids, device)
        self.sampling[:, rows] = to_device(new.sampling, device)
        self.top_k[rows] = to_device(new.top_k, device)

    def _clear(self, rows: slice) -> None:
        """Makes these rows hold no sequence."""
        self.state[:, rows] = 0
        self.length[rows] = 1
        self.tables[rows] = self.spare
        self.temperature[rows] = 0

    def advance(self, tokens: Tensor) -> None:
        """Appends a token to each of the first rows."""
        self.last[: len(tokens)] = tokens
        self.state[1:3, : len(tokens)] += 1


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
