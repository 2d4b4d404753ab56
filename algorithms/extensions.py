"""User functions of options, path/to/file.py:function or module:function, loaded and checked before the run.

Reward functions run in their own processes (rewards/worker.py); advantage estimators, policy losses and row readers in
every rank's. Examples: docs/extending.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from .rewards.worker import load

READER = ("source",)
"""-> iterable of dicts, the rows of a source."""
TOKEN_LOSS = ("logprobs", "old_logprobs", "advantages", "sample")
"""-> losses; all [targets]. `sample` is int64, the sample of each token; samples are whole."""
PPO_ESTIMATOR = ("rewards", "values", "mask", "cu_seqlens", "gamma", "lam")
"""-> (advantages, returns); all [total], `mask` bool, true at the policy's tokens; cu_seqlens [samples + 1] int32."""
GROUP_ESTIMATOR = ("scores", "group")
"""-> advantages; all [samples], `group` int64, one number a prompt. The score NaN marks a response without one."""


@cache
def load_function(spec: str) -> Callable[..., Any]:
    """The function of path/to/file.py:function or module:function; ValueError if it cannot be loaded."""
    before = sys.path.copy()
    try:
        return load(spec)[0]
    finally:  # its folder goes last: files in it must not shadow other modules
        sys.path[:] = before + [folder for folder in sys.path if folder not in before]


def check_function(option: str, spec: str, arguments: tuple[str, ...], own: tuple[str, ...] = ()) -> None:
    """Refuse a function that cannot be loaded or called with `arguments`, naming the option.

    Args:
        own: built-in values of the option.
    """
    if spec in own:
        return
    if not all(spec.rpartition(":")[::2]):
        names = "".join(f"{name}, " for name in own)
        raise ValueError(f"{option}={spec!r}: must be {names}path/to/file.py:function or module:function")
    try:
        function = load_function(spec)
    except ValueError as error:
        raise ValueError(f"{option}={spec}: {error}") from None
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        has, given = inspect.signature(function), ", ".join(arguments)
        raise ValueError(f"{option}={spec}: has arguments {has}, is called with ({given}): {error}") from None


def check_shape(spec: str, name: str, result: Any, like: Any) -> Any:
    """Refuse a result without the shape and dtype of the tensor `like`; otherwise return it."""
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape != like.shape or dtype != like.dtype:
        given = type(result).__name__ if shape is None else f"{list(shape)} {dtype}"
        raise ValueError(f"{spec}: {name} must be {list(like.shape)} {like.dtype}, the function returned {given}")
    return result
