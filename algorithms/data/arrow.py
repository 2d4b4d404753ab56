"""Rows out of Arrow tables: parquet files and data sets of `datasets`.

An Arrow struct has all the fields that any row of the table has, and null in those a row lacks. Those nulls are no part
of the row: learned, they would be arguments that a call does not have. A null that a row holds in JSON text, or in a
map, whose keys are its own, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text_files import Row, parse_json

if TYPE_CHECKING:
    import pyarrow

Restore = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a parquet file.

    Raises:
        ValueError: it is none, or holds what is no text in a column of text; names the file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from named(str(path), file.iter_batches())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(f"data source {path}: not a parquet file that can be read: {error}") from None
    except OSError as error:
        raise ValueError(f"data source {path}: {error.strerror or error}") from None


def named(source: str, tables: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[Row]:
    """The rows of tables with their numbers, from 1."""
    number = 0
    for table in tables:
        try:
            columns = {name: table.column(name) for name in table.schema.names}
            values = {name: _values(column) for name, column in columns.items()}
        except ValueError as error:  # text that is not UTF-8, JSON that is none, two columns of one name
            raise ValueError(f"data source {source}: rows from {number + 1} on: {error}") from None
        for i in range(len(table)):
            number += 1
            yield f"{source}:{number}", {name: column[i] for name, column in values.items()}


def _values(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    restore, values = restorer(column.type), column.to_pylist()
    return values if restore is None else [None if value is None else restore(value) for value in values]


def restorer(kind: pyarrow.DataType) -> Restore | None:
    """What makes a value of this type, as to_pylist gives it, what the row held; None where it is that already."""
    import pyarrow.types as types

    if types.is_struct(kind):
        fields = {field.name: restorer(field.type) for field in kind}
        return lambda value: {
            name: value[name] if restore is None else restore(value[name])
            for name, restore in fields.items()
            if value[name] is not None
        }
    if types.is_map(kind):
        return _pairs(restorer(kind.item_type))
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if any(is_one(kind) for is_one in lists):
        item = restorer(kind.value_type)
        return None if item is None else lambda value: [None if v is None else item(v) for v in value]
    if hasattr(kind, "storage_type"):
        return parse_json if kind.extension_name == "arrow.json" else restorer(kind.storage_type)
    return None


def _pairs(item: Restore | None) -> Restore:
    return lambda value: {
        key if isinstance(key, str | int) else str(key): v if item is None or v is None else item(v) for key, v in value
    }
