"""Resumable chunked work: finished chunks are skipped on restart.

chunks = ChunkStore(run, "begun", options, files)        # the work depends on these
chunks.check()
for i in range(count):
    if chunks.read(f"part_{i}") is None:
        chunks.write(f"part_{i}", rows)
...                                                      # write the results
chunks.drop()
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trialign.algorithms.data.text_files import write_jsonl
from trialign.engine.storage.safetensors_io import sha256

from .fingerprint import changes, chosen
from .run import Run


class ChunkStore:
    """JSONL files in a folder of the run's. Collective, as all its methods are.

    Args:
        name: of the folder.
        options: options and sections that the chunks depend on.
        files: data files that they depend on; names that are no files are ignored.
    """

    def __init__(self, run: Run[Any], name: str, options: Iterable[str], files: Iterable[str]):
        self.run, self.folder = run, run.folder / name
        self.facts = chosen(run.record.facts, tuple(options))
        self.facts["contents"]["files"] = run.on_main_rank(lambda: {f: content(Path(f)) for f in dict.fromkeys(files)})

    def check(self) -> None:
        """Refuses chunks of other options or files.

        Raises:
            ValueError: on every rank; names the difference.
        """
        facts = self.read("asked")
        found = changes(facts[0], self.facts, self.run.name, strict=False) if facts else []
        if found:
            raise ValueError(
                f"{'; '.join(found)}: the chunks in {self.folder} depend on it; --run.overwrite True deletes them,"
                " another run.output begins a new run"
            )

    def read(self, name: str) -> list[Any] | None:
        """The rows of a chunk, on every rank; None where it is not finished."""
        path = self.folder / f"{name}.jsonl"
        return self.run.on_main_rank(lambda: read_jsonl(path) if path.exists() else None)

    def write(self, name: str, rows: Iterable[Any]) -> None:
        """Writes the main rank's rows as a chunk."""
        self.run.record.write_begun()

        def write() -> None:
            if not (self.folder / "asked.jsonl").exists():
                write_jsonl(self.folder / "asked.jsonl", [self.facts])
            write_jsonl(self.folder / f"{name}.jsonl", rows)

        self.run.on_main_rank(write)

    def drop(self, keep: Sequence[str] = ()) -> None:
        """Deletes all chunks but those of these names."""
        if self.run.mesh.is_main and self.folder.is_dir():
            for path in [path for path in self.folder.iterdir() if path.stem not in keep]:
                path.unlink()
            if not keep:
                self.folder.rmdir()


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file of `write_jsonl`."""
    with open(path, encoding="utf-8") as file:  # split at line feeds alone: other line separators may be in strings
        return [json.loads(line) for line in file]


def content(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path.parent)): sha256(file) for file in files if file.is_file()}
