"""Detection of NaN and infinity in an update, before they reach weights, moments or checkpoints.

The inputs and loss of every micro-batch and the norm of the whole gradient are checked in one number that is the same
on all ranks (`ShardedAdamW.step`), so all stop or skip the step together. Only then is the culprit searched: in the
weights, in the batch's numbers of each sample, in each sample's loss by one more forward, in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...engine.mesh import Mesh
from ...engine.optim.adamw import ShardedAdamW
from ...engine.parallel.collectives import gather_objects
from ..batch import PER_TOKEN, Batch

NAMED = 3  # culprits named in a message
NUMBERS = tuple(name for name in PER_TOKEN if name not in ("tokens", "mask", "versions"))


def poison(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """0 if all numbers are finite, else NaN; 0-d float64, without waiting for the device."""
    flag = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        flag = flag.masked_fill(~tensor.detach().isfinite().all(), torch.nan)
    return flag


def numbers_of(part: Batch) -> dict[str, Tensor]:
    """Per-token numbers of a micro-batch: logprobs, rewards, advantages and so on."""
    return {name: value for name, value in part.per_token().items() if name in NUMBERS}


def named_inputs(parts: Sequence[Batch]) -> list[list[str]]:
    """Samples with numbers that are not finite: a list for each of `NUMBERS`, causes before their effects."""
    found: dict[str, list[str]] = {name: [] for name in NUMBERS}
    for part in parts:
        sample = torch.bucketize(torch.arange(len(part.tokens)), part.cu_seqlens[1:].cpu().long(), right=True)
        for name, value in numbers_of(part).items():
            value = value.cpu()
            for i in sample[~value.isfinite()].unique().tolist():
                bad = value[(sample == i) & ~value.isfinite()]
                found[name].append(f"{name} of {part.name(i)} ({bad[0].item()})")
    return list(found.values())


def unit_losses(part: Batch, hidden: Tensor, loss: Callable[[Batch, Tensor], Tensor], unit: int) -> Tensor:
    """[samples / unit]: loss of each sample alone, or of each `unit` neighbors with a joint loss."""
    groups = [list(range(i, min(i + unit, len(part)))) for i in range(0, len(part), unit)]
    return torch.stack([loss(part.select(group), hidden[part.places(group)]) for group in groups])


def named_losses(part: Batch, losses: Tensor, unit: int) -> Iterator[str]:
    """Samples of a micro-batch whose loss (`unit_losses`) is not finite."""
    for i in (~losses.isfinite()).nonzero().flatten().tolist():
        samples = dict.fromkeys(part.name(j) for j in range(i * unit, min((i + 1) * unit, len(part))))
        yield f"loss of {' and '.join(samples)} ({losses[i].item()})"


def describe_culprits(kinds: Sequence[Sequence[str]], mesh: Mesh) -> str:
    """A message with the first kind of culprits that any rank found, a few by name. Collective over the world.

    Args:
        kinds: this rank's culprits of each kind, causes before their effects.
    """
    ranks = gather_objects([list(kind) for kind in kinds], mesh.world)
    for found in zip(*ranks, strict=True):
        names = list(dict.fromkeys(name for rank in found for name in rank))
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            return f"not finite: {', '.join(names[:NAMED])}{more}"
    return "each sample's loss is finite alone, and so is the gradient; their sum is not"


def check_finite(values: Tensor, label: str, name: Callable[[int], str]) -> None:
    """Refuses numbers [count] that are not finite.

    Args:
        label: of the numbers, such as "score".
        name: row of a number, by its index.

    Raises:
        ValueError: names the first such row and counts them.
    """
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = f"{name(bad[0])}: {label} {values[bad[0]].item()}"
        raise ValueError(f"{first}: must be a finite number ({len(bad)} of {len(values)} are not)")


def check_states(optimizers: dict[str, ShardedAdamW], mesh: Mesh) -> None:
    """Refuses states with numbers that are not finite, before a checkpoint. Collective over the world.

    Raises:
        FloatingPointError: a weight, moment or average is not finite; on every rank, naming the first ones.
    """
    own = [f"{role}: {name}" for role, optimizer in optimizers.items() for name in optimizer.data.not_finite()]
    if any(gather_objects(bool(own), mesh.world)):
        raise FloatingPointError(f"no checkpoint is written: {describe_culprits([own], mesh)}")
