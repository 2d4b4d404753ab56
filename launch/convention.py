"""What one batch is worth under the conventions of six trainers, side by side.

    python launch/convention.py --batch FILE.jsonl

A line a sample: {"group": 0, "reward": 1.0, "logprobs": [...], "old_logprobs": [...], "ref_logprobs": [...],
"values": [...], "old_values": [...], "mask": [1, 1, 0]}. `group` names the prompt. `old_logprobs` may be left out
(equal to `logprobs`), so may `ref_logprobs`, `values` and `old_values` (zeros) and `mask` (all the policy's own words).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trialign.algorithms.convention import PRESETS, Recorded, under


@dataclass(frozen=True)
class Options:
    batch: Path
    """a JSON line a sample"""
    kl_coef: float = 0.05
    """weight of the KL penalty in the reward"""
    clip: float = 0.2
    """PPO's clip of the ratio"""


def numbers(row: dict[str, Any], key: str, length: int, default: list[float], where: str) -> list[float]:
    values = row.get(key, default)
    if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"{where}: {key} must be a list of numbers")
    if len(values) != length:
        raise ValueError(f"{where}: {key} has {len(values)} numbers, logprobs {length}")
    return [float(v) for v in values]


def read(path: Path) -> Recorded:
    """The batch in a file.

    Raises:
        ValueError: no such file, no line, a line that is no such object; names the line and the field.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    columns: dict[str, list[float]] = {
        key: [] for key in ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values", "mask")
    }
    lengths, groups, rewards = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("logprobs"), list) or not row["logprobs"]:
            raise ValueError(f"{where}: needs logprobs, a list of one number a token")
        if not isinstance(row.get("reward"), int | float):
            raise ValueError(f"{where}: reward={row.get('reward')!r}: must be a number")
        length = len(row["logprobs"])
        zeros, ones = [0.0] * length, [1.0] * length
        defaults = {"old_logprobs": row["logprobs"], "old_values": row.get("values", zeros), "mask": ones}
        for key, column in columns.items():
            column += numbers(row, key, length, defaults.get(key, zeros), where)
        lengths.append(length)
        groups.append(row.get("group", len(groups)))
        rewards.append(float(row["reward"]))
    if not lengths:
        raise ValueError(f"{path}: holds no sample")
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}

    def wide(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    tensors = {key: wide(column) for key, column in columns.items()}
    mask = tensors.pop("mask").bool()
    if not mask.any():
        raise ValueError(f"{path}: mask leaves no token of the policy's own")
    group = torch.tensor([names[g] for g in groups])
    return Recorded(torch.tensor(lengths), mask, group, wide(rewards), **tensors)


def main(options: Options) -> None:
    batch = read(options.batch)
    columns = {
        name: under(convention, batch, kl_coef=options.kl_coef, clip=options.clip)
        for name, convention in PRESETS.items()
    }
    table = Table(title=f"{options.batch}: {len(batch.lengths)} samples, {int(batch.mask.sum())} tokens")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    ours = columns["trialign"]
    for quantity, value in ours.items():
        told = [column[quantity] for column in columns.values()]
        marks = ["" if abs(v - value) <= 1e-6 * (1 + abs(value)) else "bold" for v in told]
        cells = [f"[{m}]{v:.6g}[/{m}]" if m else f"{v:.6g}" for v, m in zip(told, marks, strict=True)]
        table.add_row(quantity, *cells)
    console = Console()
    console.print(table)
    console.print("Bold: differs from trialign's by more than 1e-6.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as problem:
        sys.exit(f"convention: {problem}")
