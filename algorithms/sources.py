"""Rows of data, out of whatever they are kept in: files, folders that `datasets` wrote, data sets on the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

Row = tuple[str, dict[str, Any]]
"""(where it was read, as prompts.jsonl:12, and its columns)."""

TEXT_FILES = (".txt", ".md")
"""A file of text is one row, with the column `text`."""

Read = Callable[[str], Iterator[Row]]
"""Gives a source's rows: `read_rows`, or a `RowReader`."""


class RowReader:
    """`read_rows` that keeps the SHA-256 of the rows of each source it has read to the end.

    The digest is of the rows as they were read, in order: of no file's name, format or compression, and of no layout.

    Attributes:
        digests: by source, in the order they were first read.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def __call__(self, source: str) -> Iterator[Row]:
        digest = sha256()
        for where, row in read_rows(source):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
            yield where, row
        self.digests[source] = digest.hexdigest()

    def state(self) -> list[str]:
        """The digests in order, for a checkpoint: without names, for a source may be moved."""
        return list(self.digests.values())

    def check(self, state: Sequence[str]) -> None:
        """Refuses rows that are not those of a checkpoint.

        Args:
            state: of the checkpoint's reader; empty in one of before digests were kept, which is taken at its word.

        Raises:
            ValueError: other rows, or more or fewer sources; names the source.
        """
        if state and len(state) != len(self.digests):
            raise ValueError(
                f"the run was begun with {len(state)} data sources, now it has {len(self.digests)}:"
                f" {', '.join(self.digests)}"
            )
        for was, (source, digest) in zip(state, self.digests.items(), strict=False):
            if was != digest:
                raise ValueError(
                    f"data source {source}: its rows have changed since the checkpoint (SHA-256 {was[:12]}, now"
                    f" {digest[:12]})"
                )


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a .jsonl(.gz) or .parquet file, a folder `datasets` wrote, or a data set on the hub (name:split); a
    file of text is one row.

    Raises:
        ValueError: it does not exist, cannot be read, or a line is not a JSON object; names the file and the line.
    """
    path = Path(source)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif source.endswith(TEXT_FILES):
        yield source, {"text": _read_text(path)}
    elif path.is_file() or path.suffix in (".json", ".csv"):
        raise ValueError(f"data source {source}: must be a .jsonl or .parquet file, a folder or a name on the hub")
    else:
        yield from _read_datasets(source)


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: must be an object such as {{...}}, not {type(row).__name__}")
                if "\\ud" in line.lower():
                    _refuse_half_pairs(f"{path}:{number}", row)
                yield f"{path}:{number}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"data source {path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data source {path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise ValueError(f"data source {path}: {error.strerror or error}") from None


def _refuse_half_pairs(where: str, row: dict[str, Any]) -> None:
    """JSON may write half of a surrogate pair, which no tokenizer takes: it is no text."""
    for key, value in row.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{where}: {key!r} holds {half!a}, half of a surrogate pair: not text") from None


def _open_text(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data source {path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"data source {path}: {error.strerror or error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for part in file.iter_batches() for row in part.to_pylist())
            yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data source {path}: not a parquet file: {error}") from None
    except OSError as error:
        raise ValueError(f"data source {path}: {error.strerror or error}") from None


def _read_datasets(source: str) -> Iterator[Row]:
    import datasets

    name, _, split = source.partition(":")
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                splits = ", ".join(f"{name}:{key}" for key in loaded)
                if split not in loaded:
                    raise ValueError(f"has splits, name one: {splits}")
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        hub = "" if Path(name).is_dir() else "no such file or folder, and not to be had from the Hugging Face hub: "
        raise ValueError(f"data source {source}: {hub}{error}") from None
    for number in range(len(loaded)):
        yield f"{source}:{number + 1}", loaded[number]
