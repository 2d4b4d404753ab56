"""Work that is kept in parts as it is done: what was killed goes on behind its last part when it is asked for again.

kept = ChunkStore(run, "begun", asked, files)              # what it depends on
kept.check()
for part in range(parts):
    if kept.read(f"part_{part}") is None:
        kept.write(f"part_{part}", rows)
...                                                      # use the parts, write what they come to
kept.drop()
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trialign.algorithms.data.text_files import write_jsonl
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.storage.safetensors_io import sha256

from .fingerprint import changes, chosen
from .run import Run


class ChunkStore:
    """JSONL files in a folder of the run's. Collective, as all its methods are.

    Args:
        name: of the folder.
        asked: options and sections that the parts depend on.
        files: the data they depend on; what is not there, or no file, is passed over.
    """

    def __init__(self, run: Run[Any], name: str, asked: Iterable[str], files: Iterable[str]):
        self.run, self.folder = run, run.folder / name
        self.facts = chosen(run.record.facts, tuple(asked))
        self.facts["contents"]["files"] = run.on_all_ranks(lambda: {f: content(Path(f)) for f in dict.fromkeys(files)})

    def check(self) -> None:
        """Refuses parts of other work, or of files that have changed since.

        Raises:
            ValueError: on every rank; names what is another.
        """
        kept = self.read("asked")
        found = changes(kept[0], self.facts, self.run.name, strict=False) if kept else []
        if found:
            raise ValueError(
                f"{'; '.join(found)}: what {self.folder} keeps was made with another; --run.overwrite True deletes it,"
                " another run.output begins anew"
            )

    def read(self, name: str) -> list[Any] | None:
        """The rows of a part, on every rank; None where it is not there."""
        path, main = self.folder / f"{name}.jsonl", self.run.mesh.is_main
        rows = self.run.on_all_ranks(lambda: read_jsonl(path) if main and path.exists() else None)
        return gather_objects(rows, self.run.mesh.world)[0]

    def write(self, name: str, rows: Iterable[Any]) -> None:
        """Keeps a part, the main rank's."""
        self.run.record.write_begun()

        def write() -> None:
            if not self.folder.exists():
                write_jsonl(self.folder / "asked.jsonl", [self.facts])
            write_jsonl(self.folder / f"{name}.jsonl", rows)

        self.run.on_all_ranks(lambda: write() if self.run.mesh.is_main else None)

    def drop(self, but: Sequence[str] = ()) -> None:
        """Deletes all parts, but those of these names."""
        if self.run.mesh.is_main and self.folder.is_dir():
            for path in [path for path in self.folder.iterdir() if path.stem not in but]:
                path.unlink()
            if not but:
                self.folder.rmdir()


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file that `write_jsonl` wrote."""
    with open(path, encoding="utf-8") as file:  # its lines end at line feeds alone: what is in strings may be others
        return [json.loads(line) for line in file]


def content(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path.parent)): sha256(file) for file in files if file.is_file()}
