"""Environment variables that torchrun or srun sets, and the mesh that is built from them."""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from trialign.algorithms.config.common import ParallelConfig
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.mesh import Mesh, build_mesh
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.precision import sum_products_in_fp32

from .signals import Exit, StopSignals
from .slurm import rank_variables
from .watchdog import Watchdog

# oneDNN caches 1024 compiled primitives, one a shape: gigabytes where the number of tokens differs from step to step.
# It reads the variable once, at its first operation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
# With a fixed workspace cuBLAS gives the same bits on every run, also where several streams multiply ("Results
# reproducibility" in its documentation). torch reads the variable once, at its first product on CUDA.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
try:
    os.environ.update(rank_variables(os.environ))
except ValueError as error:
    sys.exit(f"error: {error}")


def world_size() -> int:
    """Ranks of this job; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the rank that prints; needs no process group."""
    return int(os.environ.get("RANK", "0")) == 0


def restarted() -> bool:
    """Whether torchrun (--max-restarts) or SLURM (requeue) has started this command before."""
    return any(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def node() -> tuple[str, str]:
    """This rank's node: host name, and number of the torchrun agent (one host may have several)."""
    return socket.gethostname(), os.environ.get("GROUP_RANK", "0")


def pick_device(wanted: str) -> torch.device:
    """The device of this rank.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("parallel.device=cuda: torch sees no CUDA device here; allowed: cpu, auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # One visible device: each rank has its own, as under srun --gpus-per-task or with a CUDA_VISIBLE_DEVICES a rank.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_own_device(store: Any, rank: int, world: int, device: str) -> None:
    """Refuses two ranks on one GPU, which NCCL would answer with an error that names neither. Collective.

    Args:
        device: host and id of this rank's GPU.

    Raises:
        ValueError: on the second rank of a GPU; names both, and the GPU.
    """
    store.set(f"device/{rank}", device)
    devices = [found.decode() for found in store.multi_get([f"device/{other}" for other in range(world)])]
    first = devices.index(device)
    if first < rank:
        masks = os.environ.get("CUDA_VISIBLE_DEVICES", "is not set")
        raise ValueError(
            f"ranks {first} and {rank} have the same GPU, {device}: start at most as many ranks on a node as it has"
            f" GPUs, or give each rank its own (CUDA_VISIBLE_DEVICES={masks} here)"
        )


def own_part(store: Any, rank: int, world: int, timeout: float) -> PrefixStore:
    """The job's store under a key prefix unique to this start: after a restart by torchrun it holds old keys too.
    Collective.

    The number of restarts would not do, as nodes count it differently. So each rank asks under a new name, and only a
    living main rank responds.

    Raises:
        TimeoutError: on the main rank: a rank has not asked within `timeout` seconds.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"asks/{store.add('asked', 1)}", name)
        own = PrefixStore(store.get(name).decode(), store)
        own.set(f"joined/{rank}", "")
        return own
    start, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    own, seen, pending = PrefixStore(start, store), 0, set()
    while missing := [other for other in range(1, world) if not own.check([f"joined/{other}"])]:
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise TimeoutError(f"rank {ranks} has not joined the run after {timeout:.0f} s (run.timeout)")
        asked = store.add("asked", 0)
        pending |= set(range(seen + 1, asked + 1))
        seen = asked
        for number in [number for number in pending if store.check([f"asks/{number}"])]:
            store.set(store.get(f"asks/{number}").decode(), start)
            pending.remove(number)
        time.sleep(0.01)
    return own


@contextmanager
def mesh_of(parallel: ParallelConfig, timeout: float, signals: StopSignals) -> Iterator[Mesh]:
    """Joins the job's process group (gloo on the CPU, NCCL on CUDA), builds the mesh, and leaves the group at the end.

    After an error the group is not left, which would wait for ranks that may be stuck; the launcher ends them.

    Args:
        timeout: seconds that a rank waits for others.
        signals: gets a watchdog where there are other ranks.
    """
    sum_products_in_fp32()
    device = pick_device(parallel.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    layout = {"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp or None, "ep": parallel.ep, "device": device}
    if world_size() == 1:
        yield build_mesh(**layout)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Above the watchdog's limit, whose report is better; for waits that the watchdog cannot see.
    limit = timedelta(seconds=2 * timeout + 30)
    store, rank, world = next(iter(rendezvous("env://", timeout=limit)))
    store = own_part(store, rank, world, timeout)
    watchdog = Watchdog(PrefixStore("watch", store), rank, world, timeout, signals, waits_show=backend == "gloo")
    gpu = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    if gpu is not None:
        with HEARTBEAT.waiting("the devices of all ranks"):
            check_own_device(store, rank, world, f"{gpu} on {socket.gethostname()}")
    with HEARTBEAT.waiting("the start of all ranks"):
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
    with HEARTBEAT.waiting("the groups of the mesh"):
        mesh = build_mesh(**layout)
    try:
        yield mesh
    except Exit as end:
        if not end.failed:  # all ranks stop; after an error the watchdog goes on, to show that this rank is alive
            watchdog.close()
        raise
    gather_objects(None, mesh.world)  # NCCL's groups are destroyed by all ranks at once, or wait for each other
    watchdog.close()
    dist.destroy_process_group()
