"""Run lock: a second run in a folder is refused, a killed one holds no lock."""

import errno
import fcntl
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
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
    with run_lock(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_empty_folder_is_deleted(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "runs" / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_locks_is_accepted(tmp_path, monkeypatch, capsys):
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(tmp_path / "a"):
        assert "No locks available" in capsys.readouterr().err


def test_scripts_lock_their_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    session = importlib.import_module("common.run")
    folder, started = tmp_path / "run", []
    given = options(run_output=folder, parallel_device="cpu", model_path="m", data_sources="p.jsonl")

    def main(session: Any) -> None:
        started.append(session.folder)
        session.folder.joinpath("started").touch()
        words = [sys.executable, "-c", HOLDER, str(session.folder)]
        other = subprocess.run(words, input="", capture_output=True, text=True, check=False)
        assert other.returncode != 0 and "another run" in other.stderr

    with another_run(folder), pytest.raises(SystemExit, match="run: another run"):
        session.start(EvaluateConfig, main, "evaluate", given)
    assert not started
    session.start(EvaluateConfig, main, "evaluate", given)
    assert started == [folder] and [path.name for path in folder.iterdir()] == ["started"]
