"""Readers of text files: JSON Lines, JSON lists, CSV, plain text; each may be gzipped, with a byte-order mark or CRLF.

Errors are ValueErrors with the file and the line (of a JSON list the row).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ...engine.storage.atomic import atomic_file

MAX_DEPTH = 100  # nesting: far more than any row has, far less than Python's recursion limit
TOO_DEEP = f"nested more than {MAX_DEPTH} lists or objects deep"
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?|-?inf|nan", re.IGNORECASE)

SourceRow = tuple[str, dict[str, Any]]
"""(where it was read, as prompts.jsonl:12, and its columns)."""


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError with a short reason."""
    with _in_words():
        value = json.loads(text)
    _check_depth(value, text)
    return value


@contextmanager
def _in_words() -> Iterator[None]:
    """Errors of json as ValueErrors with a short reason."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
        raise ValueError(f"not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError:
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"not readable: a whole number of more than {digits} digits") from None


def _check_depth(value: Any, text: str) -> None:
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise ValueError(TOO_DEEP)


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    layer = [value]
    for _ in range(depth):
        layer = [own for v in layer if isinstance(v, list | dict) for own in (v.values() if isinstance(v, dict) else v)]
    return any(isinstance(v, list | dict) for v in layer)


def read_jsonl(path: Path) -> Iterator[SourceRow]:
    """An object a line; blank lines are skipped."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                yield where, _row(where, row, line)


def read_json(path: Path) -> Iterator[SourceRow]:
    """A list of objects, or JSON Lines in a .json file. A row of a list is named by its number."""
    with _opened(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        try:
            yield from read_jsonl(path)
        except ValueError as error:
            raise ValueError(f"{error}; a .json file must hold a list of objects, or an object a line") from None
        return
    decoder, number = json.JSONDecoder(), 0
    place = _skip_space(text, text.index("[") + 1)
    while number or text[place : place + 1] != "]":
        number, begin, where = number + 1, place, f"{path}:{number + 1}"
        try:
            with _in_words():
                row, place = decoder.raw_decode(text, begin)
            _check_depth(row, text[begin:place])
        except ValueError as error:
            raise ValueError(f"{where} (line {_line(text, begin)}): {error}") from None
        yield where, _row(where, row, text[begin:place])
        place = _skip_space(text, place)
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            raise ValueError(f"{where}: not valid JSON: no , or ] after the row, at line {_line(text, place)}")
        place = _skip_space(text, place + 1)
    if text[place + 1 :].strip():
        raise ValueError(f"{path}: not valid JSON: text after the list, at line {_line(text, place)}")


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def read_csv(path: Path, separator: str, text: Collection[str]) -> Iterator[SourceRow]:
    """Lines of a table whose first line has the column names. An empty cell is None.

    A column of numbers only holds numbers, of true and false only booleans, any other text.

    Args:
        text: columns that hold text in any case.
    """
    with _opened(path) as file:
        names, lines = _cells(path, csv.reader(file, delimiter=separator, strict=True))
    columns = {name: [cells[i] for _, cells in lines] for i, name in enumerate(names)}
    typed = {name: cells if name in text else _typed(cells) for name, cells in columns.items()}
    for i, (number, _) in enumerate(lines):
        yield f"{path}:{number}", {name: cells[i] for name, cells in typed.items()}


def _cells(path: Path, reader: Any) -> tuple[list[str], list[tuple[int, list[str | None]]]]:
    """(names of the columns, number and cells of each line)."""
    csv.field_size_limit(sys.maxsize)
    names: list[str] = []
    lines: list[tuple[int, list[str | None]]] = []
    begin = 1
    try:
        for cells in reader:
            number, begin = begin, reader.line_num + 1
            if not cells:  # a blank line
                continue
            if not names:
                names = cells
                if len(set(names)) < len(names) or not all(names):
                    raise ValueError(f"{path}:{number}: the column names must differ and not be empty, not {names}")
                continue
            if len(cells) != len(names):
                named = ", ".join(map(repr, names))
                raise ValueError(f"{path}:{number}: {len(cells)} cells for {len(names)} columns ({named})")
            lines.append((number, [cell or None for cell in cells]))
    except csv.Error as error:
        raise ValueError(f"{path}:{begin}: not valid CSV: {error}") from None
    return names, lines


def _typed(cells: Sequence[str | None]) -> Sequence[Any]:
    """The cells of a column with their common type."""
    filled = [cell for cell in cells if cell is not None]
    if filled and all(cell.lower() in ("true", "false") for cell in filled):
        return [None if cell is None else cell.lower() == "true" for cell in cells]
    if not filled or not all(len(cell) <= 300 and NUMBER.fullmatch(cell) for cell in filled):
        return cells
    whole = all(cell.lstrip("-").isdigit() for cell in filled)
    return [None if cell is None else int(cell) if whole else float(cell) for cell in cells]


def read_text(path: Path) -> str:
    """A file's text."""
    with _opened(path) as file:
        return file.read()


def _row(where: str, row: Any, text: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object such as {{...}}, not {type(row).__name__}")
    if "\\ud" in text.lower():
        refuse_half_pairs(where, row)
    return row


def refuse_half_pairs(where: str, row: dict[str, Any]) -> None:
    """Refuse half of a surrogate pair, which JSON can write but no tokenizer reads."""
    for key, value in row.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{where}: {key!r} holds {half!a}, half of a surrogate pair: not valid text") from None


def _undecodable(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    with suppress(UnicodeDecodeError, EOFError, OSError, zlib.error), opened(path, "rb") as file:
        for line in file:
            number += 1
            line.decode()
    return number


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, decompressed, without byte-order mark and with line feeds only, in quotes too."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:  # its position is relative to the decoded block
        raise ValueError(f"{path}:{_undecodable(path)}: not UTF-8: {error.reason}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data source {path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise ValueError(f"data source {path}: {error.strerror or error}") from None


def json_line(row: object) -> str:
    """A row as a line of JSONL; values that are not JSON, such as dates, become strings."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write JSONL atomically."""
    with atomic_file(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(map(json_line, rows))
