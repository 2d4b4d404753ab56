"""PEFT adapter folders: read into a model's adapters, and written from a checkpoint.

transformers 5 holds a layer's experts in two parameters [experts, ...], gate with up in one and down in the other, and
the router's weight is a parameter too. PEFT's adapter of E experts is A [E r, in] and B [out, r E], where B's columns
are numbered by the expert last. One for gate and up has either a rank like the others', and an A for both; or twice
that, with the first half for gate and the second for up, as PEFT makes of adapters of single experts.
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
from .peft_config import CONFIG, TENSORS, check_targets, no_peft_form, number, peft_targets, read_peft_config
from .source import tensor_shapes
from .table import HEADS, check_tensors, hf_slices


def read_peft(folder: Path | str, config: ModelConfig, *, quantize: bool = False) -> LoRA:
    """Settings of the adapters in a PEFT folder, for a model of this config.

    Raises:
        ValueError: as `read_peft_config`; a tensor that is missing, of another shape or type, with a NaN, or on a
            weight that takes no adapter or that the config does not name.
    """
    folder = Path(folder)
    values = read_peft_config(folder)
    file = PeftTensors(folder, values, config)
    found = file.shapes
    modules = {adapter_name(p.name, "A"): target for target, ps in adapted_weights(config, ALL).items() for p in ps}
    targets = {modules[name] for name in found if name in modules}
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
    """Compares a PEFT folder with the adapters that `lora` gives a model with this head.

    Raises:
        ValueError: as `read_peft`, or another rank, scale or targets.
    """
    saved = read_peft(folder, config, quantize=lora.quantize)
    own = tuple(adapted_weights(config, lora, head))
    for key in ("rank", "alpha", "rslora", "targets"):
        one, other = getattr(saved, key), own if key == "targets" else getattr(lora, key)
        if one != other:
            raise ValueError(f"{folder}: {key}={one}, the model's adapters have {other}")


def load_adapter(model: Decoder, folder: Path | str, into: Iterable[Slot] | None = None) -> None:
    """Fills a model's adapters, and its score head where the folder has one; each rank reads only its slices.

    Args:
        into: as in `load_hf`.

    Raises:
        ValueError: as `check_adapter`.
    """
    assert model.lora is not None
    check_adapter(folder, model.config, model.lora, model.kind)
    held = PeftTensors(Path(folder), read_peft_config(Path(folder)), model.config)
    for name, piece, sink in slots(model) if into is None else into:
        key = trained_name(name, piece.part, model.config, model.kind)
        key = key if name.rpartition(".")[2] in ADAPTER_LETTERS else PREFIX + key
        if key in held.shapes:
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(held.read(key, cut))


def export_adapter(
    checkpoint: Path, folder: Path, *, role: str = "actor", weights: str = "master", dtype: torch.dtype = torch.float32
) -> None:
    """Writes the adapters of a role of a checkpoint as a PEFT folder: whole, or not at all.

    Raises:
        ValueError: the checkpoint holds whole weights, or adapters that PEFT has no form for; a folder that is not
            empty.
    """
    reader, prefix = open_checkpoint(checkpoint), f"{role}/{weights}/"
    saved = saved_adapter(reader, role)
    if saved is None:
        raise ValueError(f"{checkpoint}: the {role} has whole weights, no adapters; export it without --adapter")
    lora, facts = saved
    held = sorted(name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix))
    if not held:
        raise ValueError(f"{checkpoint}: no {prefix.rstrip('/')} weights")
    config = read_config(checkpoint / "assets" / role)
    why = no_peft_form(config, lora)
    if why is not None:
        raise ValueError(f"{why}; export it merged")
    score = HEADS["score"].tensor
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score in held else "CAUSAL_LM",
        "base_model_name_or_path": facts["base"],
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        **peft_targets(config, lora, "score" if score in held else "lm"),
        "modules_to_save": ["score"] if score in held else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic_folder(folder) as aside:
        shapes = {n: tuple(reader.tensors[prefix + n]["shape"]) for n in held}
        described = {PREFIX + n if n == score else n: (dtype, shape) for n, shape in shapes.items()}
        write_stream(aside / TENSORS, described, (reader.read(prefix + n).to(dtype) for n in held))
        write_json(aside / CONFIG, values)


class PeftTensors:
    """Tensors of a PEFT folder, by the single weight that each belongs to; those of all experts are taken apart.

    Args:
        values: the folder's adapter_config.json.

    Attributes:
        shapes: name, as `adapter_name` gives it, -> shape; tensors of no weight of the model keep their own name.

    Raises:
        ValueError: no such file, a damaged one, a tensor that is not of floating point, or adapters on experts of
            another kind than those above.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], config: ModelConfig):
        if not (folder / TENSORS).is_file():
            pickled = " (adapter_model.bin is a pickle, which is not loaded: save it again with peft)"
            raise ValueError(f"{folder}: no {TENSORS}{pickled * (folder / 'adapter_model.bin').is_file()}")
        self.path = folder / TENSORS
        self.shapes = tensor_shapes(self.path)
        self.source = safe_open(self.path, "pt")
        self.whole = lru_cache(2)(self.source.get_tensor)  # experts are read one after the other out of one tensor
        self.parts: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}  # name -> its tensor, and its part of that
        if config.moe is not None:
            self._unfold(config, values)

    def read(self, name: str, cut: Sequence[slice]) -> Tensor:
        """A rectangle of a tensor."""
        if name not in self.parts:
            return self.source.get_slice(name)[tuple(cut)]
        fused_name, part = self.parts[name]
        return part(self.whole(fused_name))[tuple(cut)]

    def check_finite(self) -> None:
        """Reads every tensor once; raises ValueError naming one that holds a NaN or an infinity."""
        for name in self.source.keys():
            if not self.source.get_tensor(name).isfinite().all():
                raise ValueError(f"{self.path}: {name} holds NaN or infinity; allowed: finite numbers")

    def _unfold(self, config: ModelConfig, values: Mapping[str, Any]) -> None:
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
                take = _whole
                if match[2] != "router":
                    expert, _, half = part.partition(".")
                    numbers = {"expert": int(expert), "experts": config.moe.experts, "rank": values.get("r", 8)}
                    take = partial(_of_expert, letter=letter, half=half, **numbers)
                self.parts[name] = fused_name, take
                self.shapes.pop(fused_name, None)
                self.shapes[name] = tuple(take(torch.empty(fused[fused_name], device="meta")).shape)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _of_expert(fused: Tensor, *, letter: str, half: str, expert: int, experts: int, rank: int) -> Tensor:
    """One expert's A [r, in] or B [out, r] out of that of all; `half`: "gate" or "up" of both, "" of down."""
    if fused.shape[letter == "B"] % experts:
        raise ValueError(f"an adapter {list(fused.shape)} on {experts} experts: its ranks do not divide by them")
    if letter == "A":
        own = fused.reshape(experts, -1, fused.shape[1])[expert]
        return own.chunk(2)[half == "up"] if half and len(own) == 2 * rank else own
    own = fused.reshape(len(fused), -1, experts)[..., expert]
    if not half:
        return own
    rows = own.chunk(2)[half == "up"]
    if rows.shape[1] != 2 * rank:
        return rows
    mine, others = rows.chunk(2, 1) if half == "gate" else reversed(rows.chunk(2, 1))
    if not fused.is_meta and others.any():
        raise ValueError(f"an adapter of rank {2 * rank} on gate and up together: not one of rank {rank} on each")
    return mine
