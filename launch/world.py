"""From torchrun's (or SLURM's) environment to a mesh: the only place outside kernels/dispatch.py that reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from trialign.algorithms.config import ParallelConfig
from trialign.engine.mesh import Mesh, build_mesh

TIMEOUT = timedelta(minutes=30)
# oneDNN keeps the primitives it has compiled, one a shape, by default 1024 of them: gigabytes where the number of
# tokens differs from step to step. It reads this once, at its first operation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def world_size() -> int:
    """Ranks of this job; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the rank that prints, known before any process group is."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_prefix() -> str:
    """What other ranks than the first put before their messages."""
    return "" if is_main() else f"rank {os.environ['RANK']}: "


def pick_device(wanted: str) -> torch.device:
    """The device of this rank.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("parallel.device=cuda: torch sees no CUDA device here; allowed: cpu, auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def mesh_of(parallel: ParallelConfig) -> Iterator[Mesh]:
    """Joins the job's process group (gloo on the CPU, NCCL on CUDA), builds the mesh and leaves the group at the end.

    After an error it is not left: that would wait for ranks which may be stuck. The launcher ends them.
    """
    device = pick_device(parallel.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    yield build_mesh(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp or None, ep=parallel.ep, device=device)
    if dist.is_initialized():
        dist.destroy_process_group()
