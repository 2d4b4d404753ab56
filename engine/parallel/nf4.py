"""The frozen weight of a parallel linear in NF4 with double quantization (QLoRA, https://arxiv.org/abs/2305.14314).

Every layout multiplies by the same numbers, bit for bit: those of the whole weight quantized at once. Every rank
quantizes its own rectangle of a weight as it is loaded. Codes do not depend on the layout, since a block of 64 lies in
one row and in one shard. Quantizing the scales needs the whole weight (their mean, groups of 256), so the ranks of tp
all-reduce the scales of one weight, 1/64 of its numbers, quantize them all, and keep their rectangle. That happens in
the weight's first forward, so that loading has no collective, which a rank that fails to read would miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.nf4 import BLOCK, GROUP, NF4, nf4_linear, nf4_unpack, quantize_nf4, quantize_scales
from ..mesh import Axis
from .collectives import all_reduce
from .shard import Shard, Sink


@dataclass
class _PieceSink:
    """Sink of one piece [rows, cols] of an NF4Weight, which quantizes it."""

    weight: NF4Weight
    index: int

    def copy_(self, source: Tensor) -> None:
        weight, shape = self.weight, self.weight.pieces[self.index].shape
        assert tuple(source.shape) == shape, f"{list(source.shape)} for a piece of {shape}"
        codes, weight.filled[self.index] = quantize_nf4(source.to(weight.codes.device))
        weight.codes[weight.rows(self.index)] = codes


class NF4Weight(nn.Module):
    """The pieces of `shard`, stacked along dim 0, each sharded along one dim over `axis` or replicated.

    Raises:
        ValueError: a piece's row is not a multiple of 64 weights.
    """

    def __init__(self, shard: Shard, axis: Axis, device: torch.device):
        super().__init__()
        self.axis, self.pieces = axis, shard.pieces
        cols = shard.pieces[0].shape[1]
        if cols % BLOCK:
            whole = list(shard.pieces[0].global_shape)
            raise ValueError(
                f"NF4 needs rows of a multiple of {BLOCK} weights: {whole} leaves rows of {cols} on this rank of"
                f" {axis.size} of {axis.name}"
            )
        self.filled: dict[int, Tensor] = {}  # piece -> scales [rows, cols / 64] fp32, until they are quantized
        rows = sum(piece.shape[0] for piece in shard.pieces)
        self.codes: Tensor  # the fields of kernels/nf4.py's NF4
        self.scales: Tensor
        self.first: Tensor
        self.groups: Tensor
        self.offsets: Tensor
        self.register_buffer("codes", torch.empty(rows, cols // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(rows, cols // BLOCK, dtype=torch.uint8, device=device))
        first, self.bounds = [], [0]  # bounds of each piece's groups: 1/16384 of its whole weight's numbers
        for piece in shard.pieces:
            width = piece.global_shape[1] // BLOCK
            top = torch.arange(piece.offset[0], piece.offset[0] + piece.shape[0])
            first.append(self.bounds[-1] * GROUP + top * width + piece.offset[1] // BLOCK)
            self.bounds.append(self.bounds[-1] + -(-piece.global_shape[0] * width // GROUP))
        self.register_buffer("first", torch.cat(first).int().to(device))
        self.register_buffer("groups", torch.empty(self.bounds[-1], device=device))
        self.register_buffer("offsets", torch.empty(rows, device=device))

    def sink(self, piece: int) -> Sink:
        return _PieceSink(self, piece)

    def rows(self, index: int) -> slice:
        """Rows of a piece."""
        begin = sum(piece.shape[0] for piece in self.pieces[:index])
        return slice(begin, begin + self.pieces[index].shape[0])

    def _quantize_scales(self) -> None:
        """Quantizes the scales of filled pieces. Collective over the axis where a piece is sharded."""
        for index, absmax in sorted(self.filled.items()):
            piece = self.pieces[index]
            top, left = piece.offset[0], piece.offset[1] // BLOCK
            here = slice(top, top + absmax.shape[0]), slice(left, left + absmax.shape[1])
            if piece.shape != piece.global_shape:  # zeros elsewhere, so that the sum is a gather
                whole = absmax.new_zeros(piece.global_shape[0], piece.global_shape[1] // BLOCK)
                whole[here] = absmax
                absmax = all_reduce(whole, self.axis)
            scales, groups, offset = quantize_scales(absmax)
            self.scales[self.rows(index)] = scales[here]
            self.groups[self.bounds[index] : self.bounds[index + 1]] = groups
            self.offsets[self.rows(index)] = offset
        self.filled.clear()

    def packed(self) -> NF4:
        """The weight [rows, cols] as the kernels take it. The first call after a fill is collective over the axis."""
        if self.filled:
            self._quantize_scales()
        return NF4(self.codes, self.scales, self.first, self.groups, self.offsets)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [rows, cols] in `dtype`; collective as `packed`."""
        return nf4_unpack(self.packed(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[n, cols] -> [n, rows]."""
        return nf4_linear(x, self.packed())
