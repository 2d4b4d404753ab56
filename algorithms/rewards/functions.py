"""Reward functions of users, each in its own process.

A function that raises, hangs, dies or returns invalid scores stops the run, naming the row, or leaves the row without a
score. A failure never counts as a reward of 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..batch import Prompt, Score

CHECKED = 1000
"""Rows per check before the run, each within the time limit."""


class RewardFunction:
    """A Python function `(prompts, completions, **columns) -> one float or None each` in its own process.

    The process is persistent. A call beyond the time limit kills it with all its children. It imports neither torch nor
    this package, and ends with the thread that created this object (on Linux by the kernel).

    Args:
        spec: path/to/file.py:function or module:function (modules are also searched for in the working directory).
        time_limit: seconds for importing the file, and for each call.
        gpus: the process's CUDA_VISIBLE_DEVICES; "": it sees no GPU.
        skip_failures: a call that fails leaves rows without a score, NaN, instead of raising. A function that raises
            is called again with each row alone; one that hangs or dies is restarted at the next call.

    Attributes:
        failures: reasons for rows without a score, until emptied.

    Raises:
        ValueError: the file, module or function does not exist or cannot be imported.
    """

    def __init__(self, spec: str, time_limit: float = 60.0, *, gpus: str = "", skip_failures: bool = False):
        self._name = f"reward.functions={spec}"  # of the option, until it is loaded
        self.spec, self.time_limit, self.gpus, self.skip_failures = spec, time_limit, gpus, skip_failures
        self.failures: list[str] = []
        self._start()

    def _start(self) -> None:
        worker = Path(__file__).with_name("worker.py")
        mode = ["skip"] if self.skip_failures else []
        self._process = subprocess.Popen(
            # -P: the worker's folder must not shadow modules
            [sys.executable, "-P", str(worker), self.spec, str(os.getpid()), self.gpus, *mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a process group, killed as a whole
        )
        self._closed = False
        about = self._response("while it was imported")
        self._name = f"reward function {self.spec}"
        self._needed, self._taken, self._checks = about["needed"], about["taken"], about["checks"]

    def check(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Check rows before the run: their columns, and their values by the function `check_NAME`, if it exists.

        Args:
            rows: source and columns of each.

        Raises:
            ValueError: a column has the name of an argument, a required column is in no row, or a row cannot be scored
                (with skip_failures only added to `failures`); names the row.
        """
        for name in self._taken:
            for where, fields in rows:
                if name in fields:
                    raise ValueError(
                        f"{where}: the column {name!r} has the name of an argument of reward function {self.spec}:"
                        " give it another name"
                    )
        named = dict.fromkeys(key for _, fields in rows for key in fields)
        for name in self._needed:
            if rows and name not in named:
                raise ValueError(
                    f"reward function {self.spec} needs the column {name!r}, which no row has from {rows[0][0]} on;"
                    f" they have {', '.join(named) or 'none'}"
                )
        failures: list[str] = []
        for start in range(0, len(rows) if self._checks else 0, CHECKED):
            part = rows[start : start + CHECKED]
            columns = {key: [fields.get(key) for _, fields in part] for key in named}
            self._ask({"sources": [where for where, _ in part], "fields": columns})
            response = self._response(f"while {len(part)} rows from {part[0][0]} on were checked")
            failures += [f"{part[row][0]}: {reason}" for row, reason in response["failures"]]
        if failures:
            more = f"; and {len(failures) - 3} more rows" if len(failures) > 3 else ""
            reason = f"reward function {self.spec}: {'; '.join(failures[:3])}{more}"
            if not self.skip_failures:
                raise ValueError(reason)
            self.failures.append(reason)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        """One score for each completion. Columns that a row lacks are None.

        Raises:
            ValueError: the function raised, took too long, died, or did not return a finite number for each row;
                names the rows. After a timeout or death the object is unusable. Not with skip_failures.
        """
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.fields)
        request = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": list(completions),
            "sources": [prompt.where for prompt in prompts],
            "fields": {key: [prompt.fields.get(key) for prompt in prompts] for key in columns},
        }
        sources = request["sources"]
        more = f" and {len(sources) - 8} more" if len(sources) > 8 else ""
        try:
            if self.skip_failures and self._closed:
                self._start()
            self._ask(request)
            response = self._response(f"for {len(sources)} rows: {', '.join(sources[:8])}{more}")
            self.failures += [f"reward function {self.spec}: {reason}" for reason in response.get("failures", ())]
            return response["scores"]
        except ValueError as error:
            if not self.skip_failures:
                raise
            self.failures.append(str(error))
            return [math.nan] * len(completions)

    def close(self) -> None:
        """Kill the process and its children; may be called twice."""
        if self._closed:  # its pid may be reused
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()

    def __enter__(self) -> RewardFunction:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None and not self._closed
        with contextlib.suppress(BrokenPipeError):  # it died between calls: reading the response fails
            pickle.dump(request, stdin)
            stdin.flush()

    def _response(self, doing: str) -> dict[str, Any]:
        """Wait for the next response; `doing` describes the request in messages."""
        line = self._line(doing)
        if not line.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            code = self._process.poll()
            how = "it closed its output" if code is None else f"exit code {code}"
            if code is not None and code < 0:
                how = f"killed by {signal.Signals(-code).name}"
            self.close()
            raise ValueError(f"{self._name}: its process ended ({how}) {doing}")
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            if doing.startswith("while"):
                self.close()
            raise ValueError(f"{self._name}: {response['error']}")
        return response

    def _line(self, doing: str) -> bytes:
        """The next line of the process, incomplete if it ends."""
        stdout = self._process.stdout
        assert stdout is not None
        line, deadline = b"", time.monotonic() + self.time_limit
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    limit = f"reward.time_limit={self.time_limit:g} seconds"
                    raise ValueError(f"{self._name}: took longer than {limit} {doing}")
                part = os.read(stdout.fileno(), 1 << 16)
                if not part:
                    break
                line += part
        return line
