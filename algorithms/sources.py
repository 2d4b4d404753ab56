"""Rows of data, out of whatever they are kept in: files, folders, data sets on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from .arrow import named, read_parquet
from .columns import own_columns
from .text_files import Row, read_csv, read_json, read_jsonl, read_text

FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
"""Of files; those of text may be gzipped (.jsonl.gz). A .txt or .md file is one row."""
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
"""Those that hold rows and nothing else."""

Keys = Mapping[str, str]
"""Option -> the column that it names, as {"prompt_key": "prompt"}."""

NO_KEYS: Keys = MappingProxyType({})

Read = Callable[[str, Keys], Iterator[Row]]
"""Gives a source's rows: `read_rows`, or a `RowReader`."""


class RowReader:
    """`read_rows` that keeps the SHA-256 of the rows of each source it has read to the end.

    The digest is of the rows as they were read, in order: of no file's name, format or compression, and of no layout.

    Attributes:
        digests: by source, in the order they were first read.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def __call__(self, source: str, keys: Keys) -> Iterator[Row]:
        digest = sha256()
        for where, row in read_rows(source, keys):
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


NUMBERS = ("label_key", "margin_key", "reward_key")
"""Options whose columns hold something else than text."""


def read_rows(source: str, keys: Keys = NO_KEYS) -> Iterator[Row]:
    """The rows of a file, of a folder of files, of one that `datasets` wrote, or of a data set on the hub (name:split).

    Columns of ShareGPT and Alpaca become those that `keys` names; see columns.py.

    Raises:
        ValueError: it does not exist, cannot be read, or a row is malformed; names the file and the line, or the row.
    """
    for where, row in _read(source, keys):
        yield where, own_columns(where, row, keys)


def _read(source: str, keys: Keys) -> Iterator[Row]:
    path = Path(source)
    form = form_of(path)
    if path.is_file() or form and not path.is_dir():
        yield from _read_file(path, form, keys)
    else:
        name, _, split = source.partition(":")
        folder = Path(name)
        if folder.is_dir() and not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            yield from _read_folder(folder, split, keys)
        else:
            yield from _read_datasets(source)


def form_of(path: Path) -> str:
    """Which of FORMS a file has by its name; "" for none."""
    name = path.name.removesuffix(".gz")
    form = next((form for form in FORMS if name.endswith(form)), "")
    return "" if form == ".parquet" and name != path.name else form


def _read_file(path: Path, form: str, keys: Keys) -> Iterator[Row]:
    if form == ".jsonl":
        yield from read_jsonl(path)
    elif form == ".json":
        yield from read_json(path)
    elif form == ".parquet":
        yield from read_parquet(path)
    elif form in (".csv", ".tsv"):
        text = [column for option, column in keys.items() if option not in NUMBERS]
        yield from read_csv(path, "," if form == ".csv" else "\t", text)
    elif not form:
        raise ValueError(f"data source {path}: must be {', '.join(FORMS)}, a folder of these, or a name on the hub")
    else:
        yield str(path), {keys.get("text_key", "text"): read_text(path)}


def _read_folder(folder: Path, split: str, keys: Keys) -> Iterator[Row]:
    """The rows of a folder of files; `datasets` says by their names which files are of which split."""
    import datasets

    try:
        splits = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"data source {folder}: no folder of {', '.join(FORMS)} files: {error}") from None
    kinds = sorted({form_of(file) for file in folder.rglob("*") if file.is_file()} & set(TABLES))
    if len(kinds) > 1:  # `datasets` would read one kind and say nothing of the other
        raise ValueError(
            f"data source {folder}: holds {' and '.join(kinds)} files: name the files, or give each a folder"
        )
    files = {str(name): [Path(file) for file in own] for name, own in splits.items()}
    split = split or (next(iter(files)) if len(files) == 1 else "")
    if split not in files:
        raise ValueError(f"data source {folder}: has splits, name one: {', '.join(f'{folder}:{key}' for key in files)}")
    for file in files[split]:
        yield from _read_file(file, form_of(file), keys)


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
    yield from named(source, loaded.with_format("arrow").iter(1000))
