"""Golden vectors: cases that other trainers' own functions computed, and how each is put to ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trialign.algorithms.segments import Segments

FOLDER = Path(os.environ.get("TRIALIGN_GOLDEN") or Path(__file__).parent / "golden")
WHOLE_NUMBERS = ("index", "labels", "lengths", "_ids", "num_turns", "sequence_lengths", "response_length")

Case = dict[str, Any]
Outputs = dict[str, Tensor | float]
Adapter = Callable[[Case], Outputs]
ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(framework: str, *functions: str) -> Callable[[Adapter], Adapter]:
    """Registers what computes the outputs of these functions of a framework with ours."""

    def register(function: Adapter) -> Adapter:
        for name in functions:
            ADAPTERS[framework, name] = function
        return function

    return register


def cases() -> Iterator[tuple[str, Case]]:
    """(name, case) of every case in the folder."""
    for path in sorted(FOLDER.glob("*.json")):
        for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            function = case["function"].split("::")[1]
            yield f"{path.stem}[{number}] {case['framework']} {function} {case.get('kind', '')}", case


def tensor(case: Case, name: str) -> Tensor:
    """An input as float64, or int64 where it counts or names something."""
    whole = any(name.endswith(ending) for ending in WHOLE_NUMBERS)
    return torch.tensor(case["inputs"][name], dtype=torch.int64 if whole else torch.float64)


class Rows:
    """A padded [rows, tokens] case as one packed batch, every place a token, `mask` saying which count."""

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        rows, tokens = mask.shape
        self.segments = Segments.of_lengths(torch.full((rows,), tokens), mask.flatten().bool())
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * tokens

    def pack(self, x: Tensor, *, grad: bool = False) -> Tensor:
        """[rows, tokens], or [rows] put on all tokens, as [total]; a leaf where `grad`."""
        flat = x.flatten() if x.dim() == 2 else x.repeat_interleave(self.shape[1])
        return flat.clone().requires_grad_() if grad else flat

    def unpack(self, x: Tensor) -> Tensor:
        """[total] as [rows, tokens]."""
        return x.reshape(self.shape)


def loss_and_gradient(rows: Rows, loss: Tensor, leaf: Tensor, name: str) -> Outputs:
    """The loss and its gradient at `leaf`, under the name the case gives it."""
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return {"loss": loss, name: rows.unpack(torch.zeros_like(leaf) if gradient is None else gradient)}
