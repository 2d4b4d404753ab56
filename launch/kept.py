"""Work that is kept in parts as it is done: what was killed goes on behind its last part when it is asked for again.

kept = Kept(session, "begun", asked, files)              # what it depends on
for part in range(parts):
    if kept.read(f"part_{part}") is None:
        kept.write(f"part_{part}", rows)
...                                                      # use the parts, write what they come to
kept.drop()
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from session import Session
from trialign.algorithms.config import RewardConfig
from trialign.algorithms.rounds import write_rows
from trialign.engine.parallel.collectives import gather_objects


class Kept:
    """JSONL files in a folder of the run's. Collective, as all its methods are.

    Parts of other work, or of files that have changed since, are not gone on with but deleted.

    Args:
        name: of the folder.
        asked: knobs that the parts depend on.
        files: files and folders that they depend on; those that are not there say nothing.
    """

    def __init__(self, session: Session[Any], name: str, asked: Mapping[str, Any], files: Iterable[str]):
        self.session, self.folder = session, session.folder / name
        facts = [{"asked": asked, "files": [stamp for file in dict.fromkeys(files) for stamp in stamps(Path(file))]}]
        self.facts = json.loads(json.dumps(facts))
        if self.read("asked") != self.facts:
            self.drop()

    def read(self, name: str) -> list[Any] | None:
        """The rows of a part, on every rank; None where it is not there."""
        path, main = self.folder / f"{name}.jsonl", self.session.mesh.is_main
        rows = self.session.together(lambda: read_jsonl(path) if main and path.exists() else None)
        return gather_objects(rows, self.session.mesh.world)[0]

    def write(self, name: str, rows: Iterable[Any]) -> None:
        """Keeps a part, the main rank's."""

        def write() -> None:
            if not self.folder.exists():
                write_rows(self.folder / "asked.jsonl", self.facts)
            write_rows(self.folder / f"{name}.jsonl", rows)

        self.session.together(lambda: write() if self.session.mesh.is_main else None)

    def drop(self) -> None:
        """Deletes all parts."""
        if self.session.mesh.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file that `write_rows` wrote."""
    with open(path, encoding="utf-8") as file:  # its lines end at line feeds alone: what is in strings may be others
        return [json.loads(line) for line in file]


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change in ns) of a file, or of every file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def scorer_files(reward: RewardConfig) -> list[str]:
    """The files of reward functions and the folders of reward models."""
    return [*(spec.rpartition(":")[0] for spec in reward.functions), *reward.models]
