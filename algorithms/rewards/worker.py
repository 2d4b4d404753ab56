"""The process a reward function runs in: `python -P worker.py path/to/file.py:function PARENT GPUS [skip]`.
Standard library only.

GPUS is its CUDA_VISIBLE_DEVICES: with "" no GPU is visible, or every function's memory would be on that of rank 0.

It ends with PARENT, the process that started it, even during a call that holds the interpreter lock.

Requests on stdin are pickled dicts (prompts, completions, sources, fields); responses on stdout are JSON lines,
{"scores": [...]} or {"error": "..."}. The function's own prints go to stderr. A score is null if the function returned
None: it does not score the row. With the last argument `skip` failed rows get NaN, with reasons in {"failures": [...]}.

The first response has the columns that the function requires, those with names of its arguments, and whether the file
has a function `check_NAME`: called before the run with columns only, it returns the reason why a row cannot be scored,
or None, for each. Requests without completions are for it; the reasons are {"failures": [[row, reason], ...]}.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

RANK = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""Variables of a rank, besides TORCHELASTIC_*."""


def load(spec: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The function of `path/to/file.py:function` or `module:function`, and its `check_` function or None.

    Raises:
        ValueError: no such file, module or function, or an error of the import.
    """
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            if not os.path.isfile(place):
                raise FileNotFoundError("no such file")
            sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
            own = f"user_file_{os.path.abspath(place)}"
            module_spec = importlib.util.spec_from_file_location(own, place)
            assert module_spec is not None and module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[own] = module
            module_spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(place)
    except BaseException as error:
        raise ValueError(f"cannot import {place}: {describe_error(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        named = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        raise ValueError(f"{place} has no function {name!r}; it has: {', '.join(named) or 'none'}")
    return function, getattr(module, f"check_{name}", None)


def columns(function: Callable[..., Any]) -> dict[str, list[str]]:
    """Required columns, and column names taken by the first two arguments."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())
    needed = [p.name for p in parameters[2:] if p.kind in named and p.default is inspect.Parameter.empty]
    return {"needed": needed, "taken": [p.name for p in parameters[:2] if p.kind in named]}


def accepted(function: Callable[..., Any], fields: dict[str, list]) -> dict[str, list]:
    """The columns that a function has arguments for."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return fields
    return {key: fields[key] for key in fields if key in {parameter.name for parameter in parameters}}


def check(function: Callable[..., Any], fields: dict[str, list], count: int) -> list[tuple[int, str]]:
    """(row, reason) of the rows that cannot be scored.

    Raises:
        ValueError: the function raised, or did not return `count` reasons or Nones.
    """
    try:
        reasons = list(function(**accepted(function, fields)))
    except Exception as error:
        raise ValueError(f"its check raised {describe_error(error)}") from None
    if len(reasons) != count or not all(reason is None or isinstance(reason, str) for reason in reasons):
        raise ValueError(f"its check returned {shown(reasons)}: must be None or a reason for each of {count} rows")
    return [(row, reason) for row, reason in enumerate(reasons) if reason is not None]


def describe_error(error: BaseException) -> str:
    """An exception in one line, with its file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{where}"


class Raised(ValueError):
    """An exception of a reward function, and its row."""


def score(
    function: Callable[..., Any], request: dict[str, Any], failures: list[str] | None = None
) -> list[float | None]:
    """Call the function and check its result.

    Args:
        failures: if given, invalid scores become NaN and their reasons are added to it.

    Returns:
        A finite number for each completion, or None for rows that it does not score.

    Raises:
        Raised: it raised; names the row.
        ValueError: a wrong number of scores, or neither a finite number nor None; names the row.
    """
    prompts, completions, sources = request["prompts"], request["completions"], request["sources"]
    fields = accepted(function, request["fields"])
    try:
        given = call(function, prompts, completions, fields)
    except Exception as error:
        raise Raised(
            f"raised {describe_error(error)} for {culprit(function, prompts, completions, sources, fields)}"
        ) from None
    try:
        given = list(given)
    except TypeError:
        raise ValueError(f"returned {shown(given)}: must be one float for each completion") from None
    if len(given) != len(sources):
        rows = f"{sources[0]} to {sources[-1]}" if sources else "no row"
        raise ValueError(f"returned {len(given)} scores for {len(sources)} completions, of {rows}")
    numbers: list[float | None] = []
    for value, source, prompt in zip(given, sources, prompts, strict=True):
        number = None if value is None else as_number(value)
        if number is not None and not math.isfinite(number):
            reason = f"returned {shown(value)} for {source} (prompt {prompt!r:.80}): must be a finite number, or None"
            if failures is None:
                raise ValueError(reason)
            failures.append(reason)
            number = math.nan
        numbers.append(number)
    return numbers


def call(function: Callable[..., Any], prompts: list, completions: list, fields: dict[str, list]) -> Any:
    """Result of the function on copies of the lists; a generator as a list, so that its errors are raised here."""
    given = function(list(prompts), list(completions), **{key: list(values) for key, values in fields.items()})
    return list(given) if inspect.isgenerator(given) else given


def score_or_skip(function: Callable[..., Any], request: dict[str, Any]) -> tuple[list[float | None], list[str]]:
    """Scores, NaN for rows that failed, and the reasons.

    A function that raises is called again with one row at a time. After a wrong number of scores all rows are NaN.
    """
    scores: list[float | None] = []
    failures: list[str] = []
    try:
        return score(function, request, failures), failures
    except Raised as error:
        reason = str(error)
    except ValueError as error:
        return [math.nan] * len(request["sources"]), [str(error)]
    names = ("prompts", "completions", "sources")
    for i in range(len(request["completions"])):
        row = {name: request[name][i : i + 1] for name in names}
        row["fields"] = {key: values[i : i + 1] for key, values in request["fields"].items()}
        try:
            scores += score(function, row, failures)
        except ValueError as error:
            scores.append(math.nan)
            failures.append(str(error))
    return scores, failures or [reason]


def as_number(value: Any) -> float:
    """A Python, NumPy or torch number as a float; NaN for anything else."""
    with contextlib.suppress(Exception):  # the caller refuses NaN
        value = value.item()
    with contextlib.suppress(OverflowError):  # an integer may be larger than any float
        return float(value) if isinstance(value, int | float) else math.nan
    return math.nan


def shown(value: Any) -> str:
    """A value, shortened for messages."""
    try:
        return f"{value!r:.60}"
    except Exception:  # integers of more than 4300 digits, or an error in __repr__
        return f"a value of type {type(value).__name__}"


def culprit(function: Any, prompts: list, completions: list, sources: list, fields: dict[str, list]) -> str:
    """The first row that fails by itself; not found if the function is stateful or random."""
    for i, source in enumerate(sources):
        try:
            row = {key: value[i : i + 1] for key, value in fields.items()}
            call(function, prompts[i : i + 1], completions[i : i + 1], row)
        except Exception:
            return f"{source} (prompt {prompts[i]!r:.80}, completion {completions[i]!r:.80})"
    return f"the {len(sources)} rows from {sources[0]} to {sources[-1]}, but for none of them alone"


def leave_job(gpus: str) -> None:
    """Set the visible GPUs, and remove the launcher's variables: this process is no rank, and a library that takes it
    for one would wait for the others."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    for name in [name for name in os.environ if name in RANK or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def end_with_parent(parent: int) -> None:
    """End this process with `parent`, which started it, even during a call."""
    by_kernel = signal_at_end_of_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
    if not by_kernel:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def signal_at_end_of_parent(number: signal.Signals) -> bool:
    """Request a signal to this process when the thread that started it ends (Linux); whether it is supported."""
    pr_set_pdeathsig = 1
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(pr_set_pdeathsig, number.value, 0, 0, 0) == 0


def _watch_parent(parent: int) -> None:
    """Poll for the end of the parent; blocked while a call holds the interpreter lock."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of the function must not mix with responses
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and it must not read requests
    end_with_parent(int(sys.argv[2]))
    leave_job(sys.argv[3])

    def answer(**message: Any) -> None:
        sys.stdout.flush()  # or a later kill would lose the prints
        print(json.dumps(message), file=replies, flush=True)

    try:
        function, checks = load(sys.argv[1])
        answer(scores=[], checks=checks is not None, **columns(function))
    except ValueError as error:
        answer(error=str(error))
        return
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        if "completions" not in request:
            assert checks is not None
            try:
                answer(scores=[], failures=check(checks, request["fields"], len(request["sources"])))
            except ValueError as error:
                answer(error=str(error))
            continue
        if sys.argv[4:] == ["skip"]:
            scores, failures = score_or_skip(function, request)
            answer(scores=scores, failures=failures)
            continue
        try:
            answer(scores=score(function, request))
        except ValueError as error:
            answer(error=str(error))


if __name__ == "__main__":
    main()
