"""Run lock: a second run in a folder is refused, a killed one holds no lock."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripts import options
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.engine.storage.run_lock import run_lock

HOLDER = """
import sys
from pathlib import Path
from trialign.engine.storage.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed."""
    words = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        try:
            yield process
        finally:
            process.kill()


def test_second_run_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "runs" / "a"
    with another_run(folder):
        with pytest.raises(ValueError, match="runs/a: another run"), run_lock(folder):
            pytest.fail("two runs in one folder")
        with run_lock(tmp_path / "runs" / "b"):
            pass
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "empty" / "a"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_file_system_without_locks_is_accepted(tmp_path, monkeypatch, capsys):
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(tmp_path / "a"):
        assert "No locks available" in capsys.readouterr().err


def test_scripts_lock_their_folder(tmp_path, launched):
    start, started = launched("common.run").start, []
    given = options(run_output=tmp_path / "run", parallel_device="cpu", model_path="m", data_sources="p.jsonl")

    def main(run: Any) -> None:
        started.append(run.folder)
        run.folder.joinpath("started").touch()
        with pytest.raises(AssertionError), another_run(run.folder):
            pass

    with another_run(tmp_path / "run"), pytest.raises(SystemExit, match="run: another run"):
        start(EvaluateConfig, main, "evaluate", given)
    assert not started
    start(EvaluateConfig, main, "evaluate", given)
    assert started == [tmp_path / "run"] and [path.name for path in started[0].iterdir()] == ["started"]
