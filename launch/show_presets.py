"""Table of one batch under every preset of a trainer (launch/configs/presets): KL, rewards, advantages, losses.

    python launch/show_presets.py --batch FILE.jsonl

One sample a line: {"group": 0, "reward": 1.0, "logprobs": [...], "old_logprobs": [...], "rollout_logprobs": [...],
"ref_logprobs": [...], "values": [...], "old_values": [...], "mask": [1, 1, 0]}. `group` names the prompt; groups are of
one size. `old_logprobs` may be left out (equal to `logprobs`), so may `rollout_logprobs` (equal to the old ones),
`ref_logprobs`, `values` and `old_values` (zeros) and `mask` (all tokens are the policy's).
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from report.preset_batch import RecordedBatch, quantities
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trialign.algorithms.batch import Batch
from trialign.algorithms.data.text_files import parse_json


@dataclass(frozen=True)
class Options:
    batch: Path
    """a JSON line a sample"""
    kl_coef: float = 0.05
    """weight of the KL penalty in rewards and advantages"""
    clip: float = 0.2
    """clip of the ratio on both sides; GSPO and CISPO have their own"""


PRESETS = {
    "trialign": (),
    **{name: (f"presets/{name}.toml",) for name in ("openrlhf", "trl", "verl", "nemo_rl", "slime")},
}
COLUMNS = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "old_values", "mask")


def numbers(row: dict[str, Any], key: str, length: int, default: list[float], where: str) -> list[float]:
    """A column of a line after a 0 for the prompt."""
    values = row.get(key, default)
    if not isinstance(values, list) or not all(is_number(v) for v in values):
        raise ValueError(f"{where}: {key} must be a list of finite numbers")
    if len(values) != length:
        raise ValueError(f"{where}: {key} has {len(values)} numbers, logprobs {length}")
    if key.endswith("logprobs") and max(values) > 0:
        raise ValueError(f"{where}: {key} holds {max(values)}: a log-probability is at most 0")
    if key == "mask" and not set(values) <= {0, 1}:
        raise ValueError(f"{where}: mask must hold 0 and 1 only")
    return [0.0, *(float(v) for v in values)]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that is finite as a float; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_line(line: str, where: str) -> dict[str, Any]:
    """A line's sample: every column, `group` and `reward`.

    Raises:
        ValueError: a line that is no such object; names the field.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("logprobs"), list) or not row["logprobs"]:
        raise ValueError(f"{where}: needs logprobs, a list of one number a token")
    if unknown := row.keys() - {"group", "reward", *COLUMNS}:
        allowed = ", ".join(("group", "reward", *COLUMNS))
        raise ValueError(f"{where}: {', '.join(sorted(unknown))}: unknown; allowed are {allowed}")
    if not is_number(row.get("reward")):
        raise ValueError(f"{where}: reward={row.get('reward')!r:.60}: must be a finite number")
    if not isinstance(row.get("group", ""), str | int):
        raise ValueError(f"{where}: group={row['group']!r}: must be a whole number or a name")
    length = len(row["logprobs"])
    old = row.get("old_logprobs", row["logprobs"])
    defaults = {"old_logprobs": old, "rollout_logprobs": old, "mask": [1.0] * length}
    defaults["old_values"] = row.get("values", [0.0] * length)
    columns = {key: numbers(row, key, length, defaults.get(key, [0.0] * length), where) for key in COLUMNS}
    return columns | {"group": row.get("group"), "reward": float(row["reward"])}


def group_numbers(samples: dict[int, dict[str, Any]], path: Path) -> list[int]:
    """The number of each sample's group; a sample that names none is a group of its own.

    Args:
        samples: by line.

    Raises:
        ValueError: groups of different size; names the first line of one that differs from the first group.
    """
    names = [(number, None) if row["group"] is None else row["group"] for number, row in samples.items()]
    sizes = Counter(names)
    for number, name in zip(samples, names, strict=True):
        if sizes[name] != sizes[names[0]]:
            first = f"{path}:{next(iter(samples))}: group={samples[next(iter(samples))]['group']!r}"
            raise ValueError(
                f"{path}:{number}: group={samples[number]['group']!r} has {sizes[name]} samples, {first} has"
                f" {sizes[names[0]]}: groups must be of one size"
            )
    order = {name: i for i, name in enumerate(sizes)}
    return [order[name] for name in names]


def read(path: Path) -> RecordedBatch:
    """The batch in a file.

    Raises:
        ValueError: no such file, no line, a line that is no such object, groups of different size; names the line and
            the field.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines = enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
    samples = {number: read_line(line, f"{path}:{number}") for number, line in lines if line.strip()}
    if not samples:
        raise ValueError(f"{path}: holds no sample")
    rows = list(samples.values())

    def column(key: str) -> Tensor:
        return torch.tensor([value for row in rows for value in row[key]], dtype=torch.float64)

    mask = column("mask").bool()
    if not mask.any():
        raise ValueError(f"{path}: mask leaves no token of the policy")
    batch = Batch(
        torch.zeros_like(mask, dtype=torch.int64),
        tuple(len(row["mask"]) for row in rows),
        mask,
        rollout_logprobs=column("rollout_logprobs"),
        logprobs=column("old_logprobs"),
        ref_logprobs=column("ref_logprobs"),
        values=column("old_values"),
    )
    scores = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    group = torch.tensor(group_numbers(samples, path))
    return RecordedBatch(batch, group, scores, column("logprobs"), column("values"))


def main(options: Options) -> None:
    batch = read(options.batch)
    how = {"kl_coef": options.kl_coef, "clip": options.clip}
    columns = {name: quantities(files, batch, **how) for name, files in PRESETS.items()}
    table = Table(title=f"{options.batch}: {len(batch.scores)} samples, {len(batch.batch.response)} tokens")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for quantity, value in columns["trialign"].items():
        cells = [column[quantity] for column in columns.values()]
        marks = ["" if abs(v - value) <= 1e-6 * (1 + abs(value)) else "bold" for v in cells]
        texts = [f"[{m}]{v:.6g}[/{m}]" if m else f"{v:.6g}" for v, m in zip(cells, marks, strict=True)]
        table.add_row(quantity, *texts)
    console = Console(width=None if sys.stdout.isatty() else 1000)  # a file or a pipe gets whole numbers
    console.print(table)
    console.print("Bold: differs from trialign's by more than 1e-6.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as problem:
        sys.exit(f"error: {problem}")
