"""Faults planted into functions of the product, at their own lines."""

import __future__

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from fake_ledger import ROOT


def plant(function: Callable[..., Any], old: str, new: str) -> None:
    """Replaces `old` by `new` in the source of a function without closure, for the rest of this process."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"the planted fault no longer fits {function.__qualname__}"
    code = function.__code__
    lines = "\n" * (code.co_firstlineno - 1) + source.replace(old, new)
    names: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(lines, code.co_filename, "exec", flags, dont_inherit=True), dict(function.__globals__), names)
    function.__code__ = names[function.__name__].__code__


def line_of(function: Callable[..., Any], text: str) -> str:
    """`engine/mesh.py:12`, the line of a function that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    (place,) = [number for number, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(function)}:{first + place}".removeprefix(f"{ROOT}/")
