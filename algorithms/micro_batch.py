"""Minibatches of an update, and the micro-batches that each role cuts them into on its own mesh.

A minibatch, the samples of one optimizer step, is a list of sample ids that depends only on the seed. Every role deals
them to the DP ranks of its mesh and cuts each rank's part by its own sizes. A forward pass over a training batch is cut
exactly as the optimizer steps of the first epoch, so an old logprob equals the new one to the last bit.

The cuts are made by trialign._host where it is built (engine/host.py), and are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch

from ..engine.host import HOST
from ..engine.mesh import Axis
from .batch import Batch, Minibatches


class MicroBatchSizes(Protocol):
    """Rows of a micro-batch or, where `micro_batch_tokens` is above 0, its token limit."""

    @property
    def micro_batch_size(self) -> int: ...
    @property
    def micro_batch_tokens(self) -> int: ...


class Passes(MicroBatchSizes, Protocol):
    """Updates of PPO and GRPO: `epochs` over the batch, of `minibatches` optimizer steps each."""

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
    """This DP rank's micro-batches of an optimizer step, as sample ids, balanced by `deal`.

    Args:
        samples: ids of the minibatch, whole rows.

    Raises:
        ValueError: fewer rows than DP ranks, or a row over the token limit.
    """
    rows, lengths = _rows(batch)
    row_of = {sample: i for i, row in enumerate(rows) for sample in row}
    wanted = list(dict.fromkeys(row_of[sample] for sample in samples))
    cuts = deal_micro_batches(wanted, lengths, dp, sizes.micro_batch_size, sizes.micro_batch_tokens)
    return [[sample for row in cut for sample in rows[row]] for cut in cuts]


def pass_micro_batches(batch: Batch, sizes: MicroBatchSizes, dp: Axis, *, by_length: bool = True) -> list[list[int]]:
    """This DP rank's micro-batches of a forward pass over the whole batch, as sample ids.

    A batch without minibatches (of a pass that nothing is learned from) is cut into contiguous parts; a DP rank may get
    no row, and a row over `micro_batch_tokens` is a micro-batch of its own.

    Args:
        by_length: as in `micro_batches`, for a batch without minibatches.
    """
    if batch.minibatches:
        return [cut for samples in batch.minibatches[0] for cut in update_micro_batches(batch, samples, sizes, dp)]
    rows, lengths = _rows(batch)
    limit = sizes.micro_batch_tokens and max(sizes.micro_batch_tokens, *lengths)
    own = range(len(rows))[contiguous_part(len(rows), dp)]
    cuts = micro_batches(own, lengths, sizes.micro_batch_size, limit, by_length=by_length)
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
    """Deals row indices to `parts` ranks: the same number each (or one more), and about the same number of tokens.

    Greedy: longest first, to the rank with the fewest tokens so far. Depends only on the lengths, so all ranks agree.

    Raises:
        ValueError: fewer rows than parts.
    """
    least, more = divmod(len(lengths), parts)
    if not least:
        raise ValueError(f"{len(lengths)} samples are fewer than {parts} data-parallel ranks")
    dealt: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        limit = least + (more > sum(len(rows) > least for rows in dealt))
        open_ranks = [rank for rank in range(parts) if len(dealt[rank]) < limit]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], rank))
        dealt[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(rows) for rows in dealt]


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int = 0, *, by_length: bool = True
) -> list[list[int]]:
    """Cuts `rows` into micro-batches of `size` rows or, if given, of at most `max_tokens` tokens.

    Args:
        rows: indices into `lengths`.
        by_length: longest first, so that a micro-batch has rows of similar length; else in their order.

    Raises:
        ValueError: a row has more than `max_tokens` tokens.
    """
    if HOST is not None:
        return HOST.micro_batches(rows, lengths, size, max_tokens, by_length)
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
    """This DP rank's part of `rows` in micro-batches, as many as on every other DP rank, or one fewer where it has a
    row less and every micro-batch is one row.

    Under ep the n-th micro-batches of several ranks go through the same experts together. They must be the same in
    every pass, so that an old logprob equals the new one to the last bit.

    Args, raises: as in `deal` and `micro_batches`.
    """
    if HOST is not None:
        return HOST.deal_micro_batches(rows, lengths, dp.size, dp.rank, size, max_tokens)
    dealt = deal([lengths[i] for i in rows], dp.size)
    cuts = [micro_batches([rows[i] for i in part], lengths, size, max_tokens) for part in dealt]
    own = cuts[dp.rank]
    while len(own) < min(max(map(len, cuts)), len(dealt[dp.rank])):
        largest = max(range(len(own)), key=lambda i: len(own[i]))
        half = len(own[largest]) // 2
        own[largest : largest + 1] = [own[largest][:half], own[largest][half:]]
    return own
