"""Config parsing: frozen dataclasses, filled from TOML files and overridden on the command line.

A section is a dataclass; a field is a bool, int, float, str, Literal, tuple of those, or another section, with a
docstring under it that `--help` shows. None is not used (TOML has none): 0 or "" switches off. A path is a `FilePath`,
a `ContentPath` where a run depends on the files' content, or a `FunctionPath` (file.py:function).

Files are layered: in `--config A.toml B.toml` later files override earlier ones, and the command line all of them. Two
kinds of tables are conditional: [script.NAME.section] applies to launch/NAME.py alone (and to its section in rlhf.py),
so that one file serves several scripts; [after.NAME.section] applies if NAME.toml is an earlier file. Unknown keys and
wrong types are refused in tables that do not apply, too.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

Config = TypeVar("Config")
FilePath = Annotated[str, "path"]
ContentPath = Annotated[str, "path", "content"]
FunctionPath = Annotated[str, "path", "content", "function"]
CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"
"""Folder of config files that are not in the working directory."""
NEW, AUTO = "", "auto"
"""Values of `run.resume` beside folders: a new run; the run in run.output if there is one, else a new one."""


def parse(
    cls: type[Config], argv: Sequence[str], scripts: Mapping[str, type[Any]] = {}, *, quiet: bool = False
) -> Config:
    """Parses a command line: `--config FILE...` gives defaults, `--section.key value` overrides them.

    `--resume RUN` is short for `--run.resume RUN`; without `--config`, RUN/config.toml gives the defaults, unless RUN
    is `auto`.

    Args:
        cls: a dataclass whose every field has a default.
        scripts: config classes by script, for the [script.NAME] tables.
        quiet: print nothing (for all ranks but one).

    Raises:
        SystemExit: code 2 after a message on stderr with the key, its file and the allowed values; 0 for --help.
    """
    try:
        files, rest = _take(list(argv), "--config", several=True)
        run, others = _take(rest, "--resume")
        if run:  # not an alias in tyro: sections may be configs of other scripts
            rest = ["--run.resume", *run, *others]
        run = "".join(_take(rest, "--run.resume")[0])
        resumed = bool(run) and run != AUTO and not files
        default = load(cls, *([Path(run) / "config.toml"] if resumed else files), scripts=scripts)
    except ValueError as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    config = tyro.cli(
        cls,
        args=rest,
        default=default,
        description=f"{(cls.__doc__ or '').strip()}\n\n--config A.toml B.toml gives defaults: later files override"
        " earlier ones, options override both; files not in the working directory are searched for in"
        " launch/configs (presets/verl.toml). --resume RUN resumes a run.",
        use_underscores=True,
        console_outputs=not quiet,
        config=(tyro.conf.FlagConversionOff,),
    )
    section: Any = getattr(config, "run", None)
    if section is not None and getattr(section, "resume", NEW) not in (NEW, AUTO):
        given = section.output != (default if resumed else cls()).run.output  # pyright: ignore[reportAttributeAccessIssue]
        if given and os.path.abspath(section.output) != os.path.abspath(section.resume):
            message = f"run.output={section.output}: a resumed run stays in its folder, run.resume={section.resume}"
            if not quiet:
                print(f"error: {message}; to go on in run.output, give run.resume={AUTO}", file=sys.stderr)
            raise SystemExit(2)
    return config


def load(cls: type[Config], *files: str | Path, scripts: Mapping[str, type[Any]] = {}) -> Config:
    """Loads a config from TOML files; later ones override earlier ones, absent keys keep their defaults.

    Args:
        scripts: config classes by script, for the [script.NAME] tables.

    Raises:
        ValueError: with the file's name: no such file, malformed TOML, an unknown key, a wrong type or value.
    """
    values: dict[str, Any] = {}
    for i, file in enumerate(files):
        try:
            table = _read(_find(Path(file)))
            for part in _parts(cls, table, scripts, [Path(other).stem for other in files], i):
                _merge(values, part)
        except ValueError as error:
            raise ValueError(f"config file {file}: {error}") from None
    try:
        return _replaced(cls(), values, "")
    except ValueError as error:
        raise ValueError(f"config file {', '.join(map(str, files))}: {error}") from None


def _find(file: Path) -> Path:
    """`file` in the working directory if it exists there, else in `CONFIGS`."""
    return CONFIGS / file if not file.exists() and (CONFIGS / file).exists() else file


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid TOML: {error}") from None


def _parts(
    cls: Any, table: dict[str, Any], scripts: Mapping[str, type[Any]], names: Sequence[str], index: int
) -> Iterator[dict[str, Any]]:
    """Converted tables of a file that apply: its plain keys, [script.NAME] of this script, [after.NAME] of earlier
    files. Those that do not apply are checked.

    Args:
        names: of all files, without .toml.
        index: of this file.
    """
    yield _convert_table(cls, {key: value for key, value in table.items() if key not in ("script", "after")}, "")
    hints = typing.get_type_hints(cls)
    presets = dict.fromkeys(sorted({path.stem for path in CONFIGS.glob("presets/*.toml")} | set(names)), cls)
    for kind, classes in (("script", scripts), ("after", presets)):
        for name, part in _table(table.get(kind, {}), kind).items():
            if name not in classes:
                raise ValueError(f"unknown key '{kind}.{name}': {suggest(name, list(classes))}")
            values = _convert_table(classes[name], _table(part, f"{kind}.{name}"), f"{kind}.{name}.")
            if classes[name] is cls and (kind == "script" or name in names[:index]):
                yield values
            elif hints.get(name) is classes[name]:  # a whole script's section, as in rlhf.py
                yield {name: values}


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Overrides `values` with `more`, section by section."""
    for key, value in more.items():
        if isinstance(value, dict):
            _merge(values.setdefault(key, {}), value)
        else:
            values[key] = value


def to_toml(config: Any, prefix: str = "") -> str:
    """`config` as TOML text, which `load` reads back: plain keys first, then one table a section."""
    fields = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    plain = [(name, value) for name, value in fields if not dataclasses.is_dataclass(value)]
    text = "".join(f"{name} = {_literal(value)}\n" for name, value in plain)
    if prefix and plain:
        text = f"[{prefix}]\n{text}\n"
    sections = [(name, value) for name, value in fields if dataclasses.is_dataclass(value)]
    return text + "".join(to_toml(value, f"{prefix}.{name}" if prefix else name) for name, value in sections)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for loggers."""
    flat = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        flat |= flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return flat


def paths(config: Any, prefix: str = "") -> dict[str, bool]:
    """Dotted keys of path options -> whether a run depends on the files' content (`ContentPath`)."""
    found = {f"{prefix}{name}": "content" in kind for name, kind in _paths_of(type(config)).items()}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            found |= paths(value, f"{prefix}{field.name}.")
    return found


def absolute(config: Config) -> Config:
    """`config` with absolute paths in every path option, so that it does not depend on the working directory.

    A path that does not exist is left unchanged: it may be a name on a hub, or a module.
    """
    marks, changes = _paths_of(type(config)), {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = absolute(value)
        elif field.name in marks and isinstance(value, tuple):
            changes[field.name] = tuple(map(_absolute, value))
        elif field.name in marks and ("function" not in marks[field.name] or ":" in value):
            changes[field.name] = _absolute(value)
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


def _paths_of(cls: Any) -> dict[str, tuple[str, ...]]:
    """Path options of a section -> the marks of their type."""
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        for kind in (hint, *typing.get_args(hint)):  # of tuple[FilePath, ...] too
            if "path" in getattr(kind, "__metadata__", ()):
                found[name] = kind.__metadata__
    return found


def _absolute(path: str) -> str:
    """The absolute form of PATH, FILE.py:FUNCTION or FOLDER:SPLIT, if the path exists."""
    if os.path.exists(path):
        return os.path.abspath(path)
    base, colon, name = path.partition(":")
    # A folder must be a saved data set: BASE may also be a package of the same name.
    exists = os.path.isfile(base) or os.path.isfile(os.path.join(base, "dataset_dict.json"))
    return os.path.abspath(base) + colon + name if exists else path


def suggest(name: str, allowed: Sequence[str]) -> str:
    """End of a message about an unknown name: the closest match, if any, and the allowed names."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def option_value(argv: Sequence[str], flag: str) -> str:
    """The value of `flag` on a command line; "" where it is absent, or malformed, which `parse` refuses."""
    try:
        return "".join(_take(list(argv), flag)[0])
    except ValueError:
        return ""


def _take(argv: list[str], flag: str, *, several: bool = False) -> tuple[list[str], list[str]]:
    """The values of `flag VALUE...` or `flag=VALUE` (empty if absent), and the other arguments."""
    indices = [i for i, argument in enumerate(argv) if argument == flag or argument.startswith(f"{flag}=")]
    if not indices:
        return [], argv
    if len(indices) > 1:
        more = f"; write {flag} A.toml B.toml" if several else ""
        raise ValueError(f"{flag} is given twice{more}")
    (i,) = indices
    if argv[i] != flag:
        values, end = [argv[i].removeprefix(f"{flag}=")], i + 1
    else:
        end = next((j for j in range(i + 1, len(argv)) if argv[j].startswith("--")), len(argv))
        end = end if several else min(end, i + 2)
        values = argv[i + 1 : end]
    if not all(values) or not values:
        raise ValueError(f"{flag} needs a path")
    return values, argv[:i] + argv[end:]


def _convert_table(cls: Any, table: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Converts a parsed TOML table to the field types of `cls`. `prefix` is its dotted path, for messages."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in names:
            raise ValueError(f"unknown key {name!r}: {suggest(key, names)}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _convert_table(hints[key], _table(value, name), f"{name}.")
        else:
            values[key] = _convert(hints[key], value, name)
    return values


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a section: write [{name}], not {name} = {_literal(value)}")
    return value


def _replaced(config: Any, values: dict[str, Any], prefix: str) -> Any:
    """`config` with `values` replaced, section by section."""
    changes = {
        key: _replaced(getattr(config, key), value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
    }
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ValueError(f"[{prefix[:-1]}] {error}" if prefix else str(error)) from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Checks that a TOML value has the type `hint`; an int is accepted for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = [str(argument) for argument in arguments]
            raise ValueError(f"{name} = {_literal(value)}: not a choice; {suggest(str(value), allowed)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} = {_literal(value)}: must be a list")
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            raise ValueError(f"{name} = {_literal(value)}: must be a list of {len(arguments)} values, not {len(value)}")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_convert(kind, item, f"{name}[{i}]") for i, (kind, item) in pairs)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: a bool is an int there
        raise ValueError(f"{name} = {_literal(value)}: must be {_KIND[hint]}, not {_KIND.get(type(value), 'a table')}")
    return value


_KIND = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def _literal(value: Any) -> str:
    """A TOML literal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
