"""Rows of data, out of whatever they are kept in: files, folders, data sets on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..extensions import load_function
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

    Args:
        function: path/to/file.py:function that reads a source instead (`data.reader`); "" for none.

    Attributes:
        digests: by source, in the order they were first read.
    """

    def __init__(self, function: str = "") -> None:
        self.function, self.digests = function, dict[str, str]()

    def __call__(self, source: str, keys: Keys) -> Iterator[Row]:
        digest = sha256()
        for where, row in user_rows(self.function, source, keys) if self.function else read_rows(source, keys):
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


def user_rows(function: str, source: str, keys: Keys) -> Iterator[Row]:
    """The rows of a source by a function of the user's; ValueError where one is no dict, naming its number."""
    for number, row in enumerate(load_function(function)(source), 1):
        where = f"{source}:{number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {function} gave {row!r:.60}: must be a dict of columns")
        yield where, own_columns(where, row, keys)


LISTED = 16
"""Configurations whose splits are listed, for each may take a request to the hub."""

NUMBERS = ("label_key", "margin_key", "reward_key")
"""Options whose columns hold something else than text."""


def read_rows(source: str, keys: Keys = NO_KEYS) -> Iterator[Row]:
    """The rows of a file, of a folder of files, of one that `datasets` wrote, or of a data set on the hub
    (name:config:split, name:split).

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
        name, _, chosen = source.partition(":")
        folder = Path(name)
        if not folder.is_dir():
            yield from _read_hub(name, chosen)
        elif any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            yield from _read_saved(name, chosen)
        else:
            yield from _read_folder(folder, chosen, keys)


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


def _read_folder(folder: Path, chosen: str, keys: Keys) -> Iterator[Row]:
    """The rows of a folder of files; `datasets` says by their names, or by the configurations that a README.md
    declares, which files are of which split."""
    import datasets

    try:
        config, split = configuration(str(folder), chosen)
        splits = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
        declared = len(datasets.get_dataset_config_names(str(folder))) > 1
    except OSError as error:
        raise ValueError(f"data source {folder}: no folder of {', '.join(FORMS)} files: {error}") from None
    kinds = sorted({form_of(file) for file in folder.rglob("*") if file.is_file()} & set(TABLES))
    if len(kinds) > 1 and not declared:  # `datasets` would read one kind and say nothing of the other
        raise ValueError(
            f"data source {folder}: holds {' and '.join(kinds)} files: name the files, or give each a folder"
        )
    files = {str(name): [Path(file) for file in own] for name, own in splits.items()}
    if split not in files:  # a slice of one, which only `datasets` cuts
        raise ValueError(f"data source {folder}:{chosen}: the splits of a folder of files are {', '.join(files)}")
    for file in files[split]:
        yield from _read_file(file, form_of(file), keys)


def _read_saved(name: str, split: str) -> Iterator[Row]:
    """The rows of a folder that `datasets` saved."""
    import datasets

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


def _read_hub(name: str, chosen: str) -> Iterator[Row]:
    """The rows of a data set on the hub."""
    import datasets

    source = f"{name}{':' * bool(chosen)}{chosen}"
    try:
        config, split = configuration(name, chosen, default="train")
        loaded = datasets.load_dataset(name, config, split=split)
    except OSError as error:
        raise ValueError(
            f"data source {source}: no such file or folder, and not to be had from the Hugging Face hub: {error}"
        ) from None
    yield from _table_rows(source, loaded)


def _table_rows(source: str, table: Any) -> Iterator[Row]:
    """Its rows, read a thousand at a time."""
    yield from named(source, table.with_format("arrow").iter(1000))


def configuration(name: str, chosen: str, default: str = "") -> tuple[str, str]:
    """The configuration of a data set and the split that are chosen by `config:split`, `split`, `config` or nothing.

    A split may be a slice, as `datasets` writes it: train[:100].

    Args:
        default: the split of those that have several, where none is chosen.

    Raises:
        ValueError: there are several, or none of that name; lists them.
        OSError: there is no such data set.
    """
    import datasets

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
    what = "configurations and splits" if len(configs) > 1 else "splits"
    raise ValueError(
        f"data source {name}{':' * bool(chosen)}{chosen}: has {what}, name one: {', '.join([*whole, *more])}"
    )


def _splits_of(name: str, config: str) -> list[str]:
    import datasets

    try:
        return datasets.get_dataset_split_names(name, config)
    except (OSError, ValueError):  # a damaged one must not hide the others' names
        return ["..."]
