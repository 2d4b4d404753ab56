"""Two runs into one folder: the second is refused, a killed one is in nobody's way."""

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
    """A process that has the folder, until it is killed."""
    words = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "runs" / "a"
    with another_run(folder):
        with pytest.raises(ValueError, match="runs/a: another run writes to it; wait until it has ended, or name"):
            with run_lock(folder):
                pytest.fail("two in one folder")
        with run_lock(tmp_path / "runs" / "b"):
            pass
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with run_lock(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_folder_into_which_nothing_was_written_is_gone(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "runs" / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_keeps_no_run_from_starting(tmp_path, monkeypatch, capsys):
    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", without)
    with run_lock(tmp_path / "a"):
        assert "the file system has no locks (No locks available)" in capsys.readouterr().err


def test_a_script_has_its_folder_to_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "launch")
    session = importlib.import_module("common.run")
    folder, begun = tmp_path / "run", []

    def main(session: Any) -> None:
        begun.append(session.folder)
        session.folder.joinpath("begun").touch()
        words = [sys.executable, "-c", HOLDER, str(session.folder)]
        other = subprocess.run(words, input="", capture_output=True, text=True, check=False)
        assert other.returncode != 0 and "another run writes to it" in other.stderr

    def start() -> None:
        words = [
            "--run.output",
            str(folder),
            "--parallel.device",
            "cpu",
            "--model.path",
            "m",
            "--data.sources",
            "p.jsonl",
        ]
        session.start(EvaluateConfig, main, "evaluate", words)

    with another_run(folder), pytest.raises(SystemExit, match="error: .*run: another run writes to it"):
        start()
    assert not begun
    start()
    assert begun == [folder] and [path.name for path in folder.iterdir()] == ["begun"]
