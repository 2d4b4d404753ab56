"""Launch scripts in processes forked from one that has imported them: `Forked().run(...)` takes a second or two.

As a program: forks the ranks for each line of JSON on stdin, with a store and environment as under torchrun, and writes
a line to stdout when all have ended or the time is up. A fault is a signal that a rank sends to itself, {"phase":
"rollout", "nth": 2, "rank": 1, "signal": "SIGSTOP"}, `again` after some seconds; a file to create, {"touch": PATH}; an
exception of builtins or torch, {"raise": "MemoryError"}; or {"hang": true}.
"""

import builtins
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scripts import ENVIRONMENT, ROOT
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from trialign.engine.heartbeat import HEARTBEAT

SCRIPTS = ("ppo", "sft", "dpo", "rejection", "evaluate")
IMPORTED_BY_RUNS = (
    "transformers.models.auto.tokenization_auto",
    "matplotlib.pyplot",
    "torch.fx.experimental.symbolic_shapes",
)
"""What a run imports when it first reads a tokenizer, plots, or goes backward: a second or two."""


class Ended(NamedTuple):
    """Ends of a run's ranks; a code is negative after a signal, None where the rank had to be killed."""

    codes: list[int | None]
    output: str  # of all ranks, both streams
    errors: list[str | None]  # each rank's message in torchrun's error file


class Forked:
    """The process that forks, until `close`.

    Args:
        command: before this file's name.
    """

    def __init__(self, *command: str) -> None:
        command, environment, pipe = (
            (*(command or [sys.executable]), __file__),
            os.environ | ENVIRONMENT,
            subprocess.PIPE,
        )
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(
        self,
        script: str,
        *arguments: object,
        ranks: int = 1,
        fault: dict[str, Any] | None = None,
        seconds: float = 180,
        ledgers: Path | None = None,
        launcher: bool = True,
    ) -> Ended:
        """Runs a script's ranks to their end; kills those that have not ended in time.

        Args:
            ledgers: folder for the ledgers of the ranks' fake CUDA devices; None for a run on the CPU.
            launcher: ends the other ranks where one fails, as torchrun does.
        """
        job = {"script": script, "arguments": list(map(str, arguments)), "ranks": ranks, "fault": fault}
        job |= {"ledgers": None if ledgers is None else str(ledgers), "launcher": launcher}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(job | {"seconds": seconds}), file=self.process.stdin, flush=True)
        return Ended(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT / "launch"))
    for module in (*SCRIPTS, *IMPORTED_BY_RUNS):
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            output, files = Path(folder, "output"), [Path(folder, f"{rank}.json") for rank in range(job["ranks"])]
            output.touch()
            pids = [_fork(job, rank, store.port, output, file) for rank, file in enumerate(files)]
            codes = _wait(pids, time.monotonic() + job["seconds"], job["launcher"])
            errors = [json.loads(f.read_text())["message"]["message"] if f.exists() else None for f in files]
            print(json.dumps([codes, output.read_text(), errors]), file=replies, flush=True)


def _wait(pids: list[int], deadline: float, launcher: bool) -> list[int | None]:
    codes: dict[int, int | None] = dict.fromkeys(pids)
    failed = not launcher
    while None in codes.values() and time.monotonic() < deadline:
        for pid in pids:
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
        if not failed and any(code not in (None, 0) for code in codes.values()):
            # As torchrun's agent ends the other ranks.
            failed, deadline = True, min(deadline, time.monotonic() + 10)
            for pid in (pid for pid, code in codes.items() if code is None):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.02)
    for pid in (pid for pid, code in codes.items() if code is None):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(codes.values())


def _fork(job: dict[str, Any], rank: int, port: int, output: Path, error: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.setsid()
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": str(error)}
        if job["fault"] and rank == job["fault"].get("rank", 0):
            _plant(job["fault"])
        if job["ledgers"]:
            sys.path.append(str(Path(__file__).with_name("fake_cuda")))
            importlib.import_module("fake_device").prepare_script(rank, job["ranks"], Path(job["ledgers"]))
        sys.argv = [str(ROOT / "launch" / f"{job['script']}.py"), *job["arguments"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _plant(fault: dict[str, Any]) -> None:
    """Sends this process the fault's signal at the nth time that the phase begins."""
    run: Any = importlib.import_module("common.run")
    left = [fault.get("nth", 1)]

    def strike() -> None:
        if "touch" in fault:
            return Path(fault["touch"]).touch()
        if "raise" in fault:
            raise getattr(builtins, fault["raise"], None) or getattr(torch, fault["raise"])
        if "hang" in fault:
            time.sleep(1000)
        number = signal.Signals[fault["signal"]]
        # The phase is published before the rank ends or stops.
        time.sleep(0.5 if number in (signal.SIGSTOP, signal.SIGKILL) else 0)
        if "again" in fault:
            threading.Timer(fault["again"], os.kill, (os.getpid(), number)).start()
        os.kill(os.getpid(), number)
        time.sleep(3 if fault["phase"] == "loading" else 0)  # the signal is handled in a thread, before the run begins

    def begins(phase: str) -> None:
        if phase == fault["phase"]:
            left[0] -= 1
            if not left[0]:
                strike()

    at, begin = HEARTBEAT.at, run.Run.begin

    @contextmanager
    def at_phase(phase: str) -> Iterator[None]:
        with at(phase):
            begins(phase)
            yield

    def at_begin(*given: Any, **named: Any) -> None:
        begins("loading")
        begin(*given, **named)

    HEARTBEAT.at, run.Run.begin = at_phase, at_begin


if __name__ == "__main__":
    _serve()
