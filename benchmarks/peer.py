"""A peer that is timed beside us: a script in the interpreter of its own environment, started once, asked for turns.

The script is given a JSON file that says what to do. On its standard output it writes one JSON object a line: some
before the turns, as it likes, then one for each line it reads. What libraries print goes to its standard error, which
is kept in a file and shown where the script ends before its time.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Peer:
    """The running script.

    Args:
        python: the interpreter.
        job: what the script is to do.
        folder: where the job and the messages are written.
    """

    def __init__(self, python: str, script: Path, job: dict[str, Any], folder: Path):
        task, self.messages = folder / "job.json", folder / "messages.txt"
        task.write_text(json.dumps(job), encoding="utf-8")
        outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment = outside | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
        with self.messages.open("w") as messages:
            self.process = subprocess.Popen(
                [python, "-P", str(script), str(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=environment,
            )

    def read(self) -> dict[str, Any]:
        """The script's next line.

        Raises:
            RuntimeError: it has ended; with the end of what it printed.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended early:\n{self.messages.read_text()[-4000:]}")
        return json.loads(line)

    def ask(self) -> dict[str, Any]:
        """One more turn."""
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
