"""A peer library's script, started once in the interpreter of its own environment, which runs timed turns on request.

The script gets a JSON file with its job. It writes one JSON object a line to standard output: any number before the
turns, then one for each line it reads. Output of libraries goes to standard error, kept in a file and shown if the
script ends early.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any


class Peer:
    """The running script.

    Args:
        python: the interpreter.
        job: content of the script's JSON file.
        folder: where the job and the messages are written.
    """

    def __init__(self, python: str, script: Path, job: dict[str, Any], folder: Path):
        task, self.messages = folder / "job.json", folder / "messages.txt"
        task.write_text(json.dumps(job), encoding="utf-8")
        outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment = outside | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
        with self.messages.open("w") as messages:
            command = [python, "-P", str(script), str(task)]
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=messages, text=True, env=environment)

    def read(self) -> dict[str, Any]:
        """The script's next line.

        Raises:
            RuntimeError: the script has ended; with the end of its messages.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended early:\n{self.messages.read_text()[-4000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        """Runs one more turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Ends the script."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
