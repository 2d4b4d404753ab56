"""Readers of rows: files, folders, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..extensions import load_function
from .arrow import named, read_parquet
from .columns import own_columns
from .text_files import SourceRow, read_csv, read_json, read_jsonl, read_text

FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
"""File formats; text may be gzipped (.jsonl.gz). A .txt or .md file is one row."""
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
"""File formats of tables."""

Keys = Mapping[str, str]
"""Option -> its column, as {"prompt_key": "prompt"}."""

NO_KEYS: Keys = MappingProxyType({})

Read = Callable[[str, Keys], Iterator[SourceRow]]
"""Reader of a source: `read_rows`, or a `RowReader`."""


class RowReader:
    """`read_rows` with a SHA-256 of the rows of each source, independent of file names, formats and layout.

    Args:
        function: path/to/file.py:function that reads sources instead (`data.reader`); "" for none.

    Attributes:
        digests: by source, in the order they were first read.
    """

    def __init__(self, function: str = "") -> None:
        self.function, self.digests = function, dict[str, str]()

    def __call__(self, source: str, keys: Keys) -> Iterator[SourceRow]:
        digest = sha256()
        for where, row in user_rows(self.function, source, keys) if self.function else read_rows(source, keys):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
            yield where, row
        self.digests[source] = digest.hexdigest()

    def state(self) -> list[str]:
        """The digests in order, for a checkpoint; without names, since a source may be moved."""
        return list(self.digests.values())

    def check(self, state: Sequence[str]) -> None:
        """Refuse other rows than those of a checkpoint, naming the source.

        Args:
            state: of the checkpoint's reader; empty in checkpoints without digests.
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


def user_rows(function: str, source: str, keys: Keys) -> Iterator[SourceRow]:
    """Rows of a source by a user's function; ValueError with the number of a row that is not a dict."""
    rows = load_function(function)(source)
    if not isinstance(rows, Iterable):
        raise ValueError(f"{source}: {function} must return rows, returned {type(rows).__name__}")
    for where, row in ((f"{source}:{number}", row) for number, row in enumerate(rows, 1)):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {function} returned {row!r:.60}: must be a dict of columns")
        yield where, own_columns(where, row, keys)


LISTED = 16
"""Configurations whose splits are listed in messages; each may be a request to the hub."""

NUMBERS = ("label_key", "margin_key", "reward_key")
"""Options of columns that are not text."""


def read_rows(source: str, keys: Keys = NO_KEYS) -> Iterator[SourceRow]:
    """Rows of a file, a folder of files, a saved dataset, or a Hugging Face dataset (name:config:split, name:split).

    Columns of ShareGPT and Alpaca become those that `keys` names; see columns.py.

    Raises:
        ValueError: it does not exist, cannot be read, or a row is malformed; names the file and the line, or the row.
    """
    for where, row in _read(source, keys):
        yield where, own_columns(where, row, keys)


def _read(source: str, keys: Keys) -> Iterator[SourceRow]:
    path = Path(source)
    form = form_of(path)
    if path.is_file() or form and not path.is_dir():
        yield from _read_file(path, form, keys)
    else:
        name, _, chosen = source.partition(":")
        folder = Path(name)
        if not folder.is_dir():
            yield from _read_hub(name, chosen)
        elif any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            yield from _read_saved(name, chosen)
        else:
            yield from _read_folder(folder, chosen, keys)


def form_of(path: Path) -> str:
    """Format of a file by its name, of FORMS; "" for none."""
    name = path.name.removesuffix(".gz")
    form = next((form for form in FORMS if name.endswith(form)), "")
    return "" if form == ".parquet" and name != path.name else form


def _read_file(path: Path, form: str, keys: Keys) -> Iterator[SourceRow]:
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
        raise ValueError(
            f"data source {path}: must be {', '.join(FORMS)}, a folder of these, or a Hugging Face dataset"
        )
    else:
        yield str(path), {keys.get("text_key", "text"): read_text(path)}


def _read_folder(folder: Path, chosen: str, keys: Keys) -> Iterator[SourceRow]:
    """Rows of a folder of files; `datasets` finds the splits by file names or the configurations in README.md."""
    import datasets  # optional, and slow to import

    try:
        config, split = configuration(str(folder), chosen)
        splits = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
        declared = len(datasets.get_dataset_config_names(str(folder))) > 1
    except OSError as error:
        raise ValueError(f"data source {folder}: no folder of {', '.join(FORMS)} files: {error}") from None
    kinds = sorted({form_of(file) for file in folder.rglob("*") if file.is_file()} & set(TABLES))
    if len(kinds) > 1 and not declared:  # `datasets` would silently read one kind only
        raise ValueError(
            f"data source {folder}: holds {' and '.join(kinds)} files: name the files, or give each a folder"
        )
    files = {str(name): [Path(file) for file in own] for name, own in splits.items()}
    if split not in files:  # a slice of one, which only `datasets` cuts
        raise ValueError(f"data source {folder}:{chosen}: the splits of a folder of files are {', '.join(files)}")
    for file in files[split]:
        yield from _read_file(file, form_of(file), keys)


def _read_saved(name: str, split: str) -> Iterator[SourceRow]:
    """Rows of a folder saved by `datasets`."""
    import datasets  # optional, and slow to import

    try:
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            splits = ", ".join(f"{name}:{key}" for key in loaded)
            if split not in loaded:
                raise ValueError(f"has splits, name one: {splits}")
            loaded = loaded[split]
    except (OSError, ValueError) as error:
        raise ValueError(f"data source {name}{':' * bool(split)}{split}: {error}") from None
    yield from _table_rows(f"{name}{':' * bool(split)}{split}", loaded)


def _read_hub(name: str, chosen: str) -> Iterator[SourceRow]:
    """Rows of a Hugging Face dataset."""
    import datasets  # optional, and slow to import

    source = f"{name}{':' * bool(chosen)}{chosen}"
    try:
        config, split = configuration(name, chosen, default="train")
        loaded = datasets.load_dataset(name, config, split=split)
    except OSError as error:
        raise ValueError(
            f"data source {source}: no such file or folder, and not available from the Hugging Face hub: {error}"
        ) from None
    yield from _table_rows(source, loaded)


def _table_rows(source: str, table: Any) -> Iterator[SourceRow]:
    """Rows of a dataset, read in blocks."""
    yield from named(source, table.with_format("arrow").iter(1000))


def configuration(name: str, chosen: str, default: str = "") -> tuple[str, str]:
    """Configuration and split of a dataset, chosen by `config:split`, `split`, `config` or nothing.

    A split may be a slice, such as train[:100].

    Args:
        default: split of datasets with several, if none is chosen.

    Raises:
        ValueError: there are several, or none of that name; lists them.
        OSError: no such dataset.
    """
    import datasets  # optional, and slow to import

    try:
        configs = datasets.get_dataset_config_names(name)
        first, colon, rest = chosen.partition(":")
        if "[" in first:
            first, colon, rest = "", "", chosen
        if not colon and first not in configs:
            first, rest = "", chosen
        config = first or (configs[0] if len(configs) == 1 else datasets.get_dataset_default_config_name(name) or "")
        splits = datasets.get_dataset_split_names(name, config) if config in configs else []
    except ValueError as error:  # of `datasets`
        raise ValueError(f"data source {name}{':' * bool(chosen)}{chosen}: {error}") from None
    split = rest or (splits[0] if len(splits) == 1 else default)
    if split.partition("[")[0].partition("+")[0] in splits:
        return config, split
    prefix = {config: f"{name}:" if len(configs) == 1 else f"{name}:{config}:" for config in configs}
    whole = [f"{prefix[config]}{split}" for config in configs[:LISTED] for split in _splits_of(name, config)]
    more = [f"and {len(configs) - LISTED} more: {', '.join(configs[LISTED:])}"] if len(configs) > LISTED else []
    kinds_named = "configurations and splits" if len(configs) > 1 else "splits"
    raise ValueError(
        f"data source {name}{':' * bool(chosen)}{chosen}: has {kinds_named}, name one: {', '.join([*whole, *more])}"
    )


def _splits_of(name: str, config: str) -> list[str]:
    import datasets  # optional, and slow to import

    try:
        return datasets.get_dataset_split_names(name, config)
    except (OSError, ValueError):  # a corrupt one must not hide the others' names
        return ["..."]
