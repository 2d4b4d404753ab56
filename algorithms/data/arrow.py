"""Rows of Arrow tables: parquet files and Hugging Face datasets.

An Arrow struct has the fields of all rows, null where a row lacks one. These nulls are removed: in a tool call they
would be arguments that the row does not have. Nulls in JSON text and in maps are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text_files import SourceRow, parse_json

if TYPE_CHECKING:
    import pyarrow

Restore = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[SourceRow]:
    """Rows of a parquet file; ValueError with the file if it is corrupt."""
    import pyarrow  # optional, and slow to import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from named(str(path), file.iter_batches())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(f"data source {path}: not a parquet file that can be read: {error}") from None
    except OSError as error:
        raise ValueError(f"data source {path}: {error.strerror or error}") from None


def named(source: str, tables: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[SourceRow]:
    """The rows of tables with their numbers, from 1."""
    number = 0
    for table in tables:
        try:
            columns = {name: table.column(name) for name in table.schema.names}
            values = {name: _values(column) for name, column in columns.items()}
        except ValueError as error:  # invalid UTF-8 or JSON, or two columns of one name
            raise ValueError(f"data source {source}: rows from {number + 1} on: {error}") from None
        for i in range(len(table)):
            number += 1
            yield f"{source}:{number}", {name: column[i] for name, column in values.items()}


def _values(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    restore, values = restorer(column.type), column.to_pylist()
    return values if restore is None else [None if value is None else restore(value) for value in values]


def restorer(kind: pyarrow.DataType) -> Restore | None:
    """Function from a value of this type by to_pylist to the row's own value; None for the identity."""
    import pyarrow.types as types  # optional, and slow to import

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
