"""Minibatches of an update, and the micro-batches a role cuts them into on its own mesh.

A minibatch, what one optimizer step learns from, is sample ids that depend on the seed alone. Every role deals them to
the DP ranks of its mesh and cuts each rank's part by its own sizes. A pass over a batch that is to be learned from is
cut exactly as the first epoch's optimizer steps are: an old logprob then is the new one to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch

from ..engine.mesh import Axis
from .batch import Batch, Minibatches


class MicroBatchSizes(Protocol):
    """Rows of a micro-batch or, where `micro_batch_tokens` is above 0, its most tokens."""

    @property
    def micro_batch_size(self) -> int: ...
    @property
    def micro_batch_tokens(self) -> int: ...


class Passes(MicroBatchSizes, Protocol):
    """Use of a batch by PPO and GRPO: `epochs` passes of `minibatches` optimizer steps."""

    @property
    def epochs(self) -> int: ...
    @property
    def minibatches(self) -> int: ...


def draw_minibatches(count: int, passes: Passes, seed: int) -> Minibatches:
    """Sample ids of every optimizer step, by epoch: `count` samples shuffled and cut into equal parts."""
    generator = torch.Generator().manual_seed(seed)
    size = count // passes.minibatches
    assert size * passes.minibatches == count
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(passes.epochs)]
    return tuple(tuple(tuple(order[i : i + size]) for i in range(0, count, size)) for order in orders)


def update_micro_batches(batch: Batch, samples: Sequence[int], sizes: MicroBatchSizes, dp: Axis) -> list[list[int]]:
    """This DP rank's micro-batches of an optimizer step, as sample ids: equally many rows a rank, or one more where
    they do not divide, and about equally many tokens.

    Args:
        samples: ids of the minibatch, whole rows.

    Raises:
        ValueError: the rows are fewer than the DP ranks, or one has more tokens than a micro-batch may.
    """
    rows, lengths = _rows(batch)
    row_of = {sample: i for i, row in enumerate(rows) for sample in row}
    wanted = list(dict.fromkeys(row_of[sample] for sample in samples))
    cuts = deal_micro_batches(wanted, lengths, dp, sizes.micro_batch_size, sizes.micro_batch_tokens)
    return [[sample for row in cut for sample in rows[row]] for cut in cuts]


def pass_micro_batches(batch: Batch, sizes: MicroBatchSizes, dp: Axis, *, by_length: bool = True) -> list[list[int]]:
    """This DP rank's micro-batches of a forward pass over the whole batch, as sample ids.

    A batch that is only scored is cut into contiguous parts, whose rows need be neither as many as the DP ranks nor
    short enough for `micro_batch_tokens`: a longer one has a micro-batch of its own.

    Args:
        by_length: of a batch that is only scored: as in `micro_batches`.
    """
    if batch.minibatches:
        return [cut for samples in batch.minibatches[0] for cut in update_micro_batches(batch, samples, sizes, dp)]
    rows, lengths = _rows(batch)
    most = sizes.micro_batch_tokens and max(sizes.micro_batch_tokens, *lengths)
    mine = range(len(rows))[contiguous_part(len(rows), dp)]
    cuts = micro_batches(mine, lengths, sizes.micro_batch_size, most, by_length=by_length)
    return [[sample for row in cut for sample in rows[row]] for cut in cuts]


def _rows(batch: Batch) -> tuple[list[range], list[int]]:
    """(samples of each row, its tokens)."""
    sizes = batch.row_sizes or (1,) * len(batch)
    rows = [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    return rows, [sum(batch.lengths[i] for i in row) for row in rows]


def contiguous_part(count: int, dp: Axis) -> slice:
    """This DP rank's contiguous part of `count` items; parts differ by one at most."""
    return slice(count * dp.rank // dp.size, count * (dp.rank + 1) // dp.size)


def deal(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deals row indices to `parts` ranks: equally many each, or one more where they do not divide, and about equally
    many tokens (longest first, to the rank with the fewest so far). Depends on the lengths alone, so every rank gets
    the same result.

    Raises:
        ValueError: there are fewer rows than parts.
    """
    least, more = divmod(len(lengths), parts)
    if not least:
        raise ValueError(f"{len(lengths)} samples are fewer than {parts} data-parallel ranks")
    hands: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = least + (more > sum(len(hand) > least for hand in hands))
        open_ranks = [rank for rank in range(parts) if len(hands[rank]) < room]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], rank))
        hands[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(hand) for hand in hands]


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int = 0, *, by_length: bool = True
) -> list[list[int]]:
    """Cuts `rows` into micro-batches of `size` rows, or, if `max_tokens` is given, of at most so many tokens.

    Args:
        rows: indices into `lengths`.
        by_length: longest first, so that those of one micro-batch are about equally long; else as they come.

    Raises:
        ValueError: a row alone has more tokens than `max_tokens`.
    """
    ordered = sorted(rows, key=lambda i: (-lengths[i], i)) if by_length else rows
    if not max_tokens:
        return [list(ordered[i : i + size]) for i in range(0, len(ordered), size)]
    cuts: list[list[int]] = []
    room = 0
    for row in ordered:
        if lengths[row] > max_tokens:
            raise ValueError(f"a sample of {lengths[row]} tokens does not fit micro-batches of {max_tokens} tokens")
        if lengths[row] > room:
            cuts.append([])
            room = max_tokens
        cuts[-1].append(row)
        room -= lengths[row]
    return cuts


def deal_micro_batches(
    rows: Sequence[int], lengths: Sequence[int], dp: Axis, size: int, max_tokens: int = 0
) -> list[list[int]]:
    """This DP rank's part of `rows` in micro-batches, as many as every other DP rank has, or one fewer where it has a
    row less and each alone.

    Under ep the n-th micro-batches of some ranks run together and go through the same experts: they must be the same
    ones in every pass, for an old logprob to be the new one to the last bit.

    Args, raises: as in `deal` and `micro_batches`.
    """
    hands = deal([lengths[i] for i in rows], dp.size)
    cuts = [micro_batches([rows[i] for i in hand], lengths, size, max_tokens) for hand in hands]
    mine = cuts[dp.rank]
    while len(mine) < min(max(map(len, cuts)), len(hands[dp.rank])):
        place = max(range(len(mine)), key=lambda i: len(mine[i]))
        half = len(mine[place]) // 2
        mine[place : place + 1] = [mine[place][:half], mine[place][half:]]
    return mine
