"""Which rows of a batch a DP rank computes, in which micro-batches.

A row is one sample, or several that one loss needs together (a pair): they stay in one micro-batch, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.mesh import Mesh
from .batch import Batch, deal_micro_batches, micro_batches
from .config.common import UpdateConfig
from .roles.role import Share
from .rollout.sync import my_part


def plan(batch: Batch, update: UpdateConfig, mesh: Mesh, width: int = 1) -> list[Share]:
    """This DP rank's micro-batches of a step: equally many rows a rank, or one more where they do not divide, and
    about equally many tokens.

    Args:
        width: samples of a row.

    Raises:
        ValueError: the rows are fewer than the DP ranks, or one has more tokens than a micro-batch may.
    """
    lengths = row_lengths(batch, width)
    sizes = update.micro_batch_size, update.micro_batch_tokens
    return _samples(deal_micro_batches(range(len(lengths)), lengths, mesh.dp, *sizes), width)


def plan_scoring(batch: Batch, update: UpdateConfig, mesh: Mesh, width: int = 1) -> list[Share]:
    """The same of rows that are only scored, whose number need not divide by the DP ranks."""
    lengths = row_lengths(batch, width)
    mine = range(len(lengths))[my_part(len(lengths), mesh.dp)]
    return _samples(micro_batches(mine, lengths, update.micro_batch_size, update.micro_batch_tokens), width)


def row_lengths(batch: Batch, width: int) -> list[int]:
    """Tokens of each row."""
    return [sum(batch.lengths[start : start + width]) for start in range(0, len(batch), width)]


def _samples(cuts: Sequence[Sequence[int]], width: int) -> list[Share]:
    return [[row * width + i for row in cut for i in range(width)] for cut in cuts]
