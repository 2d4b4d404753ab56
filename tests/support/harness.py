"""Runs a test's function on several gloo ranks of this machine: `run_ranks(fn, world, *args)`.

Ranks are processes forked from a server with torch loaded, kept from one call to the next, so that a call takes
hundredths of a second. Every call starts with a new process group and resets the random state, the environment,
sys.path and the working directory (the caller's, so that monkeypatch.setenv reaches the ranks), torch's default dtype
and grad mode. A test that changes anything else in its process needs `fresh=True`. After a failure no rank is reused.
"""

import contextlib
import datetime
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# The last one is imported by the first backward(gradient) of a process, in 0.4 s.
PRELOAD = ["torch", "torch.distributed", "torch.fx.experimental.symbolic_shapes"]
GRACE = 2.0  # seconds for the other ranks' tracebacks after the first failure
_workers: list["Worker"] = []


class RanksFailed(AssertionError):
    """A rank raised or died. The text has the tracebacks of all failed ranks."""


class RanksTimeout(RanksFailed):
    """Some ranks did not end in time (a deadlock). The text has their numbers and stacks."""


class Worker:
    """A process that runs one rank of a call after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipe, far_end = context.Pipe()
        descriptor, name = tempfile.mkstemp(prefix="rank-stack-")
        os.close(descriptor)
        self.stack_file = Path(name)
        self.process = context.Process(target=_serve, args=(far_end, name), daemon=True)
        self.process.start()
        far_end.close()

    def stack(self) -> str:
        """The process's current stack, from its faulthandler."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return self.stack_file.read_text() or "(no stack: not started, or signals are blocked)"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.stack_file.unlink(missing_ok=True)


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60, fresh: bool = False) -> list[Any]:
    """Runs `fn(rank, world, *args)`, of a test file's top level, on `world` ranks of one thread; their results by rank.
    timeout: seconds of the call, and of each collective. fresh: in new processes, which end afterwards."""
    if fn.__qualname__ != fn.__name__:
        raise ValueError(f"{fn.__qualname__} must be at the top level of its file: ranks import it by name")
    reusable = [] if fresh else _workers
    while len(reusable) < world:
        reusable.append(Worker())
    workers = reusable[:world]
    surroundings, finished = (dict(os.environ), list(sys.path), os.getcwd()), False
    try:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            for rank, worker in enumerate(workers):
                job = (fn.__module__, fn.__name__, rank, world, args, f"{folder}/store", timeout)
                worker.pipe.send((surroundings, pickle.dumps(job)))
            results = _collect(workers, timeout)
        finished = True
        return results
    finally:
        if fresh or not finished:
            for worker in reusable:
                worker.kill()
            reusable.clear()


def _collect(workers: list[Worker], timeout: float) -> list[Any]:
    """Waits for every rank's result; the pipe of a dead process ends at once."""
    results, failures = dict[int, Any](), dict[int, str]()
    rank_of: dict[Any, int] = {worker.pipe: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout
    while rank_of and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(rank_of), left):
            rank = rank_of.pop(pipe)
            worker = workers[rank]
            try:
                ok, payload = worker.pipe.recv()
            except EOFError:
                worker.process.join()
                crash = worker.stack_file.read_text()  # by faulthandler, after a segmentation fault
                failures[rank] = f"died, exit code {worker.process.exitcode}\n{crash}"
                continue
            if ok:
                results[rank] = pickle.loads(payload)
            else:
                failures[rank] = payload.decode()
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE)
    if not failures and not rank_of:
        return [results[rank] for rank in range(len(workers))]
    late = sorted(rank_of.values())
    report = [f"--- rank {rank} of {len(workers)}: {text}" for rank, text in failures.items()]
    report += [f"--- rank {rank} of {len(workers)}: still running here\n{workers[rank].stack()}" for rank in late]
    if failures:
        raise RanksFailed("\n".join([f"ranks {sorted(failures)} failed", *report]))
    raise RanksTimeout("\n".join([f"ranks {late} did not end in {timeout} s (a deadlock?)", *report]))


def _serve(pipe: Connection, stack_file: str) -> None:
    """Main loop of a worker: runs jobs until the pipe closes."""
    with open(stack_file, "w") as stack:
        faulthandler.enable(file=stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        with contextlib.suppress(EOFError):
            while True:
                (environment, path, folder), job = pipe.recv()
                os.environ.clear()
                os.environ.update(environment)
                # The machine's host name may not resolve; the loopback interface always works.
                loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
                sys.path[:] = path
                os.chdir(folder)
                pipe.send(_run(job))


def _run(job: bytes) -> tuple[bool, bytes]:
    """Runs one call: (True, the pickled result) or (False, the traceback)."""
    import torch  # not at the top: the test process may not need it before its ranks do
    import torch.distributed as dist

    try:
        module, name, rank, world, args, store, timeout = pickle.loads(job)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.manual_seed(0)
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
        dist.barrier()  # no rank may end before the others have connected
        fn = getattr(importlib.import_module(module), name)
        return True, pickle.dumps(fn(rank, world, *args))
    except BaseException:  # SystemExit too
        return False, traceback.format_exc().encode()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
