"""Rewards: functions of the user's in processes of their own, and what is done to scores before they are rewards.

A function that raises, hangs, dies or gives nonsense stops the run with the row named, or leaves the row without a
score: a reward of 0 in its place would teach the model something nobody meant.
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
"""Rows that are checked before the run within one time limit."""


class RewardFunction:
    """A Python function `(prompts, completions, **fields) -> one float or None each` in a process of its own.

    The process starts once and stays, so that what the function loads stays loaded; a call that takes longer than the
    limit ends with the process and all its children killed. The process imports neither torch nor this package, and
    ends with the thread that made this object (on Linux the kernel sees to it), so with the run, however that ends.

    Args:
        spec: path/to/file.py:function or module:function (modules are looked for in the working directory too).
        time_limit: seconds for importing the file, and for each call.
        skip_failures: a call that fails leaves rows without a score, NaN, instead of raising. A function that raises
            is called again with each row alone; one that hangs or dies is restarted at the next call.

    Attributes:
        failures: why rows are without a score, since it was last emptied.

    Raises:
        ValueError: the file, module or function is not there or cannot be imported.
    """

    def __init__(self, spec: str, time_limit: float = 60.0, *, skip_failures: bool = False):
        self.spec, self.time_limit, self.skip_failures = spec, time_limit, skip_failures
        self.failures: list[str] = []
        self._start()

    def _start(self) -> None:
        worker = Path(__file__).with_name("worker.py")
        mode = ["skip"] if self.skip_failures else []
        self._process = subprocess.Popen(
            # -P: the worker's own folder is not to shadow modules
            [sys.executable, "-P", str(worker), self.spec, str(os.getpid()), *mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a process group of its own, killed whole
        )
        self._closed = False
        about = self._answer("while it was imported")
        self._needed, self._taken, self._checks = about["needed"], about["taken"], about["checks"]

    def check(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Before the run, finds rows that cannot be scored: their columns, and what a function `check_NAME` beside the
        function says of them.

        Args:
            rows: where each was read, and its columns.

        Raises:
            ValueError: a column has the name of an argument, one that is needed is in no row, or a row cannot be scored
                (which is only noted in `failures` where the function abstains); names the row.
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
            answer = self._answer(f"while {len(part)} rows from {part[0][0]} on were checked")
            failures += [f"{part[row][0]}: {reason}" for row, reason in answer["failures"]]
        if failures:
            more = f"; and {len(failures) - 3} more rows" if len(failures) > 3 else ""
            reason = f"reward function {self.spec}: {'; '.join(failures[:3])}{more}"
            if not self.skip_failures:
                raise ValueError(reason)
            self.failures.append(reason)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        """One score for each completion. A column that a row lacks is None there.

        Raises:
            ValueError: the function raised, took too long, died, or did not return a finite number for each row;
                names the rows. After a time limit or a death the object is of no more use. Not where it abstains.
        """
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.fields)
        request = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": list(completions),
            "sources": [prompt.source or f"prompt {prompt.index}" for prompt in prompts],
            "fields": {key: [prompt.fields.get(key) for prompt in prompts] for key in columns},
        }
        sources = request["sources"]
        more = f" and {len(sources) - 8} more" if len(sources) > 8 else ""
        try:
            if self.skip_failures and self._closed:
                self._start()
            self._ask(request)
            answer = self._answer(f"for {len(sources)} rows: {', '.join(sources[:8])}{more}")
            self.failures += [f"reward function {self.spec}: {reason}" for reason in answer.get("failures", ())]
            return answer["scores"]
        except ValueError as error:
            if not self.skip_failures:
                raise
            self.failures.append(str(error))
            return [math.nan] * len(completions)

    def close(self) -> None:
        """Ends the process and everything it started; may be called twice."""
        if self._closed:  # its number may be another process's by now
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
        with contextlib.suppress(BrokenPipeError):  # it died between calls: the missing answer tells
            pickle.dump(request, stdin)
            stdin.flush()

    def _answer(self, doing: str) -> dict[str, Any]:
        """Waits for the next answer; `doing` says in messages what it is the answer to."""
        line = self._line(doing)
        if not line.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            code = self._process.poll()
            how = "it closed its output" if code is None else f"exit code {code}"
            if code is not None and code < 0:
                how = f"killed by {signal.Signals(-code).name}"
            self.close()
            raise ValueError(f"reward function {self.spec}: its process ended ({how}) {doing}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            if doing.startswith("while"):
                self.close()
            raise ValueError(f"reward function {self.spec}: {answer['error']}")
        return answer

    def _line(self, doing: str) -> bytes:
        """The next line of the process, or what there is of it when it ends."""
        stdout = self._process.stdout
        assert stdout is not None
        line, deadline = b"", time.monotonic() + self.time_limit
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    limit = f"reward.time_limit={self.time_limit:g} seconds"
                    raise ValueError(f"reward function {self.spec}: took longer than {limit} {doing}")
                part = os.read(stdout.fileno(), 1 << 16)
                if not part:
                    break
                line += part
        return line
