"""PEFT adapter folders, read and written.

transformers 5 has a layer's experts in two parameters [experts, ...], one of gate and up, one of down; the router's
weight is a bare parameter too. PEFT's adapter of such a parameter with E experts is A [E r, in] and B [out, r E], the
expert being the fastest index of B's columns. That of gate and up has either rank r and one A for both, or rank 2 r,
the first half for gate, the second for up (how PEFT loads adapters of single experts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...engine.parallel.lora import LoRA
from ...engine.parallel.shard import Slot, slots
from ...engine.storage.atomic import atomic_folder
from ...engine.storage.safetensors_io import write_stream
from ..config import HeadKind, ModelConfig
from ..decoder import Decoder
from ..families.registry import read_config
from ..folder import open_checkpoint, write_json
from ..lora import (
    ADAPTER_LETTERS,
    ALL,
    EVERY_TARGET,
    PREFIX,
    adapted_weights,
    adapter_name,
    adapter_shapes,
    trained_name,
)
from .adapter_record import saved_adapter
from .peft_config import CONFIG, TENSORS, check_targets, number, peft_targets, read_peft_config, unsupported_by_peft
from .source import tensor_shapes
from .table import HEADS, check_tensors, hf_slices


def read_peft(folder: Path | str, config: ModelConfig, *, quantize: bool = False) -> LoRA:
    """LoRA options of a PEFT folder, for a model of this config.

    Raises:
        ValueError: as `read_peft_config`; a tensor that is missing, of another shape or dtype, not finite, or on a
            weight that takes no adapter or is not in target_modules.
    """
    folder = Path(folder)
    values = read_peft_config(folder)
    file = PeftTensors(folder, values, config)
    found = file.shapes
    names = {adapter_name(w.name, "A"): target for target, ws in adapted_weights(config, ALL).items() for w in ws}
    targets = {names[name] for name in found if name in names}
    try:
        lora = LoRA(
            values.get("r", 8),
            float(values.get("lora_alpha", 8)),
            tuple(target for target in EVERY_TARGET if target in targets),
            rslora=bool(values.get("use_rslora")),
            quantize=quantize,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    patterns = peft_targets(config, lora, "lm")
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key) and values[key] != patterns[key]:
            allowed = f"{patterns[key]!r} or none" if patterns[key] else "none"
            raise ValueError(f"{folder / CONFIG}: {key}={values[key]!r} is not supported; allowed: {allowed}")
    expected: dict[str, tuple[int, ...]] = dict(adapter_shapes(config, lora))
    score = PREFIX + HEADS["score"].tensor
    if score in found:
        expected[score] = 1, config.hidden_size
    check_tensors(folder / TENSORS, expected, found)
    check_targets(folder, values, adapted_weights(config, ALL), found)
    file.check_finite()
    return lora


def check_adapter(folder: Path | str, config: ModelConfig, lora: LoRA, head: HeadKind = "lm") -> None:
    """Checks that a PEFT folder fits the LoRA options of a model with this head.

    Raises:
        ValueError: as `read_peft`, or another rank, alpha, rslora or targets.
    """
    saved = read_peft(folder, config, quantize=lora.quantize)
    targets = tuple(adapted_weights(config, lora, head))
    for key in ("rank", "alpha", "rslora", "targets"):
        value, expected = getattr(saved, key), targets if key == "targets" else getattr(lora, key)
        if value != expected:
            raise ValueError(f"{folder}: {key}={value}, the model's adapters have {expected}")


def load_adapter(model: Decoder, folder: Path | str, into: Iterable[Slot] | None = None) -> None:
    """Loads a model's adapters, and a score head where the folder has one; each rank reads only its slices.

    Args:
        into: as in `load_hf`.

    Raises:
        ValueError: as `check_adapter`.
    """
    assert model.lora is not None
    check_adapter(folder, model.config, model.lora, model.kind)
    file = PeftTensors(Path(folder), read_peft_config(Path(folder)), model.config)
    for name, piece, sink in slots(model) if into is None else into:
        key = trained_name(name, piece.part, model.config, model.kind)
        key = key if name.rpartition(".")[2] in ADAPTER_LETTERS else PREFIX + key
        if key in file.shapes:
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(file.read(key, cut))


def export_adapter(
    checkpoint: Path, folder: Path, *, role: str = "actor", weights: str = "master", dtype: torch.dtype = torch.float32
) -> None:
    """Writes the adapters of a checkpoint's role as a PEFT folder, atomically.

    Raises:
        ValueError: the checkpoint has full weights, or adapters that PEFT cannot hold; a folder that is not empty.
    """
    reader, prefix = open_checkpoint(checkpoint), f"{role}/{weights}/"
    saved = saved_adapter(reader, role)
    if saved is None:
        raise ValueError(f"{checkpoint}: the {role} has full weights, no adapters; export it without --adapter")
    lora, record = saved
    names = sorted(name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix))
    if not names:
        raise ValueError(f"{checkpoint}: no {prefix.rstrip('/')} weights")
    config = read_config(checkpoint / "assets" / role)
    reason = unsupported_by_peft(config, lora)
    if reason is not None:
        raise ValueError(f"{reason}; export it merged")
    score = HEADS["score"].tensor
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score in names else "CAUSAL_LM",
        "base_model_name_or_path": record["base"],
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        **peft_targets(config, lora, "score" if score in names else "lm"),
        "modules_to_save": ["score"] if score in names else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic_folder(folder) as aside:
        shapes = {n: tuple(reader.tensors[prefix + n]["shape"]) for n in names}
        described = {PREFIX + n if n == score else n: (dtype, shape) for n, shape in shapes.items()}
        write_stream(aside / TENSORS, described, (reader.read(prefix + n).to(dtype) for n in names))
        write_json(aside / CONFIG, values)


class PeftTensors:
    """Tensors of a PEFT folder by their `adapter_name`; those of all experts are split by expert.

    Args:
        values: the folder's adapter_config.json.

    Attributes:
        shapes: name -> shape; unknown tensors keep their own name.

    Raises:
        ValueError: no such file, a corrupt one, a tensor that is not floating point, or adapters of experts in another
            form than those above.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], config: ModelConfig):
        if not (folder / TENSORS).is_file():
            pickled = " (adapter_model.bin is a pickle, which is not loaded: save it again with peft)"
            raise ValueError(f"{folder}: no {TENSORS}{pickled * (folder / 'adapter_model.bin').is_file()}")
        self.path = folder / TENSORS
        self.shapes = tensor_shapes(self.path)
        self.source = safe_open(self.path, "pt")
        self.fused = lru_cache(2)(self.source.get_tensor)  # read once for all experts in turn
        self.parts: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}  # name -> fused tensor, its part of it
        if config.moe is not None:
            self._split_experts(config, values)

    def read(self, name: str, cut: Sequence[slice]) -> Tensor:
        """A rectangle of a tensor."""
        if name not in self.parts:
            return self.source.get_slice(name)[tuple(cut)]
        fused_name, part = self.parts[name]
        return part(self.fused(fused_name))[tuple(cut)]

    def check_finite(self) -> None:
        """Reads every tensor; raises ValueError naming one with a NaN or an infinity."""
        for name in self.source.keys():
            if not self.source.get_tensor(name).isfinite().all():
                raise ValueError(f"{self.path}: {name} has NaN or infinity; allowed: finite numbers")

    def _split_experts(self, config: ModelConfig, values: Mapping[str, Any]) -> None:
        assert config.moe is not None
        adapted = {str(name).rpartition(".")[2] for name in values.get("target_parameters") or ()}
        module = {
            "router": "gate.",
            "experts.down": "experts.",
            "experts.gate_up": "experts.base_layer." if "down_proj" in adapted else "experts.",
        }
        needed = {"router": "weight", "experts.down": "down_proj", "experts.gate_up": "gate_up_proj"}
        fused = self.shapes.copy()
        for (parameter, part), weight in hf_slices(config).items():
            match = re.fullmatch(r"layers\.(\d+)\.mlp\.(router|experts\.gate_up|experts\.down)\.weight", parameter)
            if match is None or needed[match[2]] not in adapted:
                continue
            for letter in "AB":
                fused_name = f"{PREFIX}model.layers.{match[1]}.mlp.{module[match[2]]}lora_{letter}.weight"
                name = adapter_name(weight.name, letter)
                if fused_name not in fused or fused_name == name:
                    continue
                expert, _, half = part.partition(".")
                sizes = {"experts": config.moe.experts, "rank": values.get("r", 8)}
                take = partial(_of_expert, letter=letter, half=half, expert=expert, **sizes)
                self.parts[name] = fused_name, take
                self.shapes.pop(fused_name, None)
                self.shapes[name] = tuple(take(torch.empty(fused[fused_name], device="meta")).shape)


def _of_expert(fused: Tensor, *, letter: str, half: str, expert: str, experts: int, rank: int) -> Tensor:
    """One expert's A [r, in] or B [out, r] of that of all; `half`: "gate", "up" or, of down, ""; expert "": router."""
    if not expert:
        return fused
    if fused.shape[letter == "B"] % experts:
        raise ValueError(f"an adapter {list(fused.shape)} on {experts} experts: its rank does not divide by {experts}")
    if letter == "A":
        a = fused.reshape(experts, -1, fused.shape[1])[int(expert)]
        return a.chunk(2)[half == "up"] if half and len(a) == 2 * rank else a
    b = fused.reshape(len(fused), -1, experts)[..., int(expert)]
    if not half:
        return b
    rows = b.chunk(2)[half == "up"]
    if rows.shape[1] != 2 * rank:
        return rows
    own, other = rows.chunk(2, 1) if half == "gate" else reversed(rows.chunk(2, 1))
    if not fused.is_meta and other.any():
        raise ValueError(f"an adapter of rank {2 * rank} on gate and up together is not one of rank {rank} on each")
    return own
