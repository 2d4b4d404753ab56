"""Record of a model's adapters in a checkpoint: LoRA options, and path and digest of the base model.

A checkpoint of a LoRA run holds adapters (and a critic's score head) only; merging and resuming read the base again.
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
    """SHA-256 that identifies a model's weights: of every file's size, first MiB and 64 samples.

    Args:
        folder: for `open_source`.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")) or [Path(folder)]:
        size = file.stat().st_size
        with open(file, "rb") as source:
            digest.update(size.to_bytes(8, "little") + source.read(1 << 20))
            for i in range(64):
                source.seek(size * i // 64)
                digest.update(source.read(4096))
    return digest.hexdigest()


def adapter_record(model: Decoder, base: Path | str) -> dict[str, Any] | None:
    """Record of a model's adapters for a checkpoint's state; None for a model without adapters."""
    lora = model.lora
    if lora is None:
        return None
    options = {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "targets": list(lora.targets)}
    return options | {"quantize": lora.quantize, "base": os.path.abspath(base), "digest": base_digest(base)}


def check_same_adapter(saved: Mapping[str, Any] | None, model: Decoder, base: Path | str) -> None:
    """Checks that a checkpoint's adapters have the options and the base of the model that resumes from it.

    Args:
        saved: `adapter_record` of the checkpoint; None without adapters.

    Raises:
        ValueError: naming the difference.
    """
    record = adapter_record(model, base)
    if (saved is None) != (record is None):
        kinds = ("full weights", "adapters") if saved is None else ("adapters", "full weights")
        raise ValueError(f"the checkpoint has {kinds[0]}, this config trains {kinds[1]} (lora.rank)")
    if saved is None or record is None:
        return
    for key in ("rank", "alpha", "rslora", "targets", "quantize"):
        if saved[key] != record[key]:
            raise ValueError(f"lora.{key}={record[key]}, but the checkpoint was trained with {saved[key]}")
    find_base(saved, Path(base))


def find_base(record: Mapping[str, Any], base: Path | None = None) -> Path:
    """Folder of the base model of saved adapters: `base`, or the path in the record.

    Raises:
        ValueError: no such folder, or it holds other weights.
    """
    folder = Path(base or record["base"])
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder, and the adapters need their base model (--base: its new path)")
    if base_digest(folder) != record["digest"]:
        raise ValueError(f"{folder}: not the weights that the adapters were trained on, {record['base']}")
    return folder


def saved_adapter(reader: Reader, role: str) -> tuple[LoRA, dict[str, Any]] | None:
    """LoRA options and `adapter_record` of a role in a checkpoint; None where it has full weights."""
    reader.check("state.json")
    record = read_state(reader.path).get("adapters", {}).get(role)
    if record is None:
        return None
    options = {key: record[key] for key in ("rank", "alpha", "rslora", "quantize")}
    return LoRA(**options, targets=tuple(record["targets"])), record
