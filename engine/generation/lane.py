"""Device state of a lane's running sequences: row i is the i-th in the scheduler's list."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scheduler import Step


class Lane:
    """Rows are filled at admission, advance by a token a step, and are compacted when sequences end.

    Attributes:
        last: [rows], the last token of each sequence.
        length: [rows], number of tokens, including the last.
        position: [rows], number of response tokens, which counts the random numbers drawn.
        key: [rows], of the random numbers.
        tables: [rows, blocks] int32, cache blocks.
        temperature, top_p: [rows] fp32.
        top_k: [rows] int32.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.state = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.last, self.length, self.position, self.key = self.state
        self.tables = torch.zeros(rows, 0, dtype=torch.int32, device=device)
        self.temperature, self.top_p = torch.zeros(2, rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)

    def admit(self, step: Step, width: int) -> None:
        """Fills the rows after the decoding ones with the step's admitted sequences.

        Args:
            width: cache blocks of the longest possible sequence.
        """
        rows, new, device = slice(step.decoding, step.rows), step.admitted, self.state.device
        columns = [
            [0] * len(new),
            [sequence.length for sequence in new],
            [len(sequence.tokens) for sequence in new],
            [sequence.key for sequence in new],
        ]
        self.state[:, rows] = torch.tensor(columns, device=device)
        if width > self.tables.shape[1]:
            self.tables = F.pad(self.tables, (0, width - self.tables.shape[1]))
        # Entries past a sequence's blocks are never read, but must be valid block numbers.
        tables = [sequence.blocks + [0] * (self.tables.shape[1] - len(sequence.blocks)) for sequence in new]
        self.tables[rows] = torch.tensor(tables, dtype=torch.int32, device=device)
        self.temperature[rows] = torch.tensor([sequence.params.temperature for sequence in new], device=device)
        self.top_p[rows] = torch.tensor([sequence.params.top_p for sequence in new], device=device)
        self.top_k[rows] = torch.tensor([sequence.params.top_k for sequence in new], dtype=torch.int32, device=device)

    def advance(self, tokens: Tensor) -> None:
        """Appends a token to each of the first rows."""
        self.last[: len(tokens)] = tokens
        self.state[1:3, : len(tokens)] += 1

    def compact(self, rows: list[int]) -> None:
        """Moves these rows to the front, in their order."""
        if rows:
            kept = torch.tensor(rows, device=self.state.device)
            self.state[:, : len(rows)] = self.state[:, kept]
            for column in (self.tables, self.temperature, self.top_p, self.top_k):
                column[: len(rows)] = column[kept]


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
