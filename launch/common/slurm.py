"""Ranks that `srun` starts without torchrun: SLURM's variables of a task as torchrun's, which everything else reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

PORTS = (15000, 15000)  # first port of the job's store and their number, below the ports that Linux gives to clients


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR and MASTER_PORT of a task of srun.

    {} under torchrun, which srun may have started, and where there is one process: outside a step, and so in a batch
    script too, which has SLURM_PROCID=0 and the job's SLURM_NTASKS. A MASTER_ADDR or MASTER_PORT that is set is kept.

    Raises:
        ValueError: a variable is missing or no number; names it.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return {}
    world = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    if world == 1:
        return {}
    rank, local, node = (_number(environ, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
    if rank >= world:
        raise ValueError(f"SLURM_PROCID={rank}: must be below the number of tasks, {world}")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    # Task 0 is on the first node; srun's own host may be a login node.
    first = next(hosts(nodes), "") or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not first:
        raise ValueError("SLURM_STEP_NODELIST is not set: it names the node of rank 0; or set MASTER_ADDR")
    tasks = [*counts(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", ""))]
    start, number = PORTS
    port = start + (31 * _number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID")) % number
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(tasks[node] if node < len(tasks) else local + 1),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def hosts(nodelist: str) -> Iterator[str]:
    """Host names of a list such as `login,gpu[01-03,7]-ib`, in order."""
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        yield from _expanded(item)


def _expanded(item: str) -> Iterator[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        yield item
        return
    ranges, _, after = rest.partition("]")
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for tail in _expanded(after):
                yield f"{before}{number:0{len(first)}}{tail}"


def counts(text: str) -> Iterator[int]:
    """Numbers of a list such as `4(x2),3`: 4, 4, 3."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(count)] * int(times or 1)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}={value or 'is not set'}: must be a number, as srun sets it for each task")
    return int(value)
