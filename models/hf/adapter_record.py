"""Record of a model's adapters in a checkpoint: rank, scale, targets, and the base model they belong to.

A checkpoint of a LoRA run holds the adapters alone (and a critic's score head). The base is named by its folder and a
digest of its weights; merging and resuming read it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...engine.parallel.lora import LoRA
from ...engine.storage.checkpoint import Reader, read_state
from ..decoder import Decoder


@cache
def base_digest(folder: Path | str) -> str:
    """SHA-256 that identifies a model's weights, over every file's size, its beginning and 64 samples of it.

    Args:
        folder: a model as `open_source` reads it.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")) or [Path(folder)]:
        size = file.stat().st_size
        with open(file, "rb") as source:
            digest.update(size.to_bytes(8, "little") + source.read(1 << 20))  # a header and the first numbers
            for i in range(64):
                source.seek(size * i // 64)
                digest.update(source.read(4096))
    return digest.hexdigest()


def adapter_record(model: Decoder, base: Path | str) -> dict[str, Any] | None:
    """The record of a model's adapters for a checkpoint's state; None for a model without adapters."""
    lora = model.lora
    if lora is None:
        return None
    numbers = {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "targets": list(lora.targets)}
    return numbers | {"quantize": lora.quantize, "base": os.path.abspath(base), "digest": base_digest(base)}


def check_same_adapter(saved: Mapping[str, Any] | None, model: Decoder, base: Path | str) -> None:
    """Compares a model's adapters and their base with those of the checkpoint that it resumes from.

    Args:
        saved: `adapter_record` of the checkpoint, None where it had no adapters.

    Raises:
        ValueError: naming what differs.
    """
    now = adapter_record(model, base)
    if (saved is None) != (now is None):
        held, asked = ("whole weights", "adapters") if saved is None else ("adapters", "whole weights")
        raise ValueError(f"the checkpoint holds {held}, this config trains {asked} (lora.rank)")
    for key in ("rank", "alpha", "rslora", "targets", "quantize"):
        if saved and now and saved[key] != now[key]:
            raise ValueError(f"lora.{key}={now[key]}, the checkpoint was made with {saved[key]}")
    if saved:
        find_base(saved, Path(base))


def find_base(facts: Mapping[str, Any], base: Path | None = None) -> Path:
    """The folder of the model that saved adapters belong to: `base`, or the path in the record.

    Raises:
        ValueError: no such folder, or it holds other weights.
    """
    folder = Path(base or facts["base"])
    if not folder.exists():
        raise ValueError(
            f"{folder}: no such folder, but the adapters belong to the model that was in it (--base: its new path)"
        )
    if base_digest(folder) != facts["digest"]:
        raise ValueError(f"{folder}: not the weights that the adapters belong to, which were {facts['base']}")
    return folder


def saved_adapter(reader: Reader, role: str) -> tuple[LoRA, dict[str, Any]] | None:
    """Settings and `adapter_record` of a role's adapters in a checkpoint; None where it has whole weights."""
    reader.check("state.json")
    facts = read_state(reader.path).get("adapters", {}).get(role)
    if facts is None:
        return None
    keys = ("rank", "alpha", "rslora", "quantize")
    return LoRA(**{key: facts[key] for key in keys}, targets=tuple(facts["targets"])), facts
