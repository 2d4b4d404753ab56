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
from .table import HEADS, hf_slices


def read_peft(folder: Path | str, config: ModelConfig, *, quantize: bool = False) -> LoRA:
    """What a PEFT adapter folder holds, for a model of this config.

    Raises:
        ValueError: as `read_peft_config`; a tensor that is missing, of another shape or type, with a NaN, or on a
            weight that takes no adapter or that the config does not name.
    """
    folder = Path(folder)
    values = read_peft_config(folder)
    file = PeftFile(folder, values, config)
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
    known = peft_targets(config, lora, "lm")
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key) and values[key] != known[key]:
            allowed = f"{known[key]!r} or none" if known[key] else "none"
            raise ValueError(f"{folder / CONFIG}: {key}={values[key]!r} is not supported; allowed: {allowed}")
    expected: dict[str, tuple[int, ...]] = dict(adapter_shapes(config, lora))
    score = PREFIX + HEADS["score"].tensor
    if score in found:
        expected[score] = 1, config.hidden_size
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    for what, names in (("lacks", missing), ("holds what the model has no place for:", extra)):
        if names:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            raise ValueError(f"{folder / TENSORS} {what} {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{folder / TENSORS}: {name} has shape {list(found[name])}, expected {list(shape)}")
    check_targets(folder, values, adapted_weights(config, ALL), found)
    file.check_finite()
    return lora


def check_adapter(folder: Path | str, config: ModelConfig, lora: LoRA, head: HeadKind = "lm") -> None:
    """Refuses a PEFT folder whose adapters are not those that `lora` gives a model with this head.

    Raises:
        ValueError: as `read_peft`, or another rank, scale or targets.
    """
    theirs = read_peft(folder, config, quantize=lora.quantize)
    own = tuple(adapted_weights(config, lora, head))
    for key in ("rank", "alpha", "rslora", "targets"):
        one, other = getattr(theirs, key), own if key == "targets" else getattr(lora, key)
        if one != other:
            raise ValueError(f"{folder}: {key}={one}, the model's adapters have {other}")


def load_adapter(model: Decoder, folder: Path | str, into: Iterable[Slot] | None = None) -> None:
    """Fills a model's adapters from a PEFT folder, each rank reading only its slices; a score head too, if it is there.

    Args:
        into: as in `load_hf`.

    Raises:
        ValueError: as `check_adapter`.
    """
    assert model.lora is not None
    check_adapter(folder, model.config, model.lora, model.kind)
    held = PeftFile(Path(folder), read_peft_config(Path(folder)), model.config)
    for name, piece, sink in slots(model) if into is None else into:
        theirs_ = trained_name(name, piece.part, model.config, model.kind)
        key = theirs_ if name.rpartition(".")[2] in ADAPTER_LETTERS else PREFIX + theirs_
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


class PeftFile:
    """What a folder holds.

    Args:
        values: the folder's adapter_config.json.

    Attributes:
        shapes: name, as `adapter_name` gives it, -> shape; what no weight of the model is adapted by keeps its own.

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
        theirs, part = self.parts[name]
        return part(self.whole(theirs))[tuple(cut)]

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
        for (parameter, part), place in hf_slices(config).items():
            match = re.fullmatch(r"layers\.(\d+)\.mlp\.(router|experts\.gate_up|experts\.down)\.weight", parameter)
            if match is None or needed[match[2]] not in adapted:
                continue
            for letter in "AB":
                theirs = f"{PREFIX}model.layers.{match[1]}.mlp.{module[match[2]]}lora_{letter}.weight"
                ours = adapter_name(place.name, letter)
                if theirs not in fused or theirs == ours:
                    continue
                take = _itself
                if match[2] != "router":
                    expert, _, half = part.partition(".")
                    numbers = {"expert": int(expert), "experts": config.moe.experts, "rank": values.get("r", 8)}
                    take = partial(_of_expert, letter=letter, half=half, **numbers)
                self.parts[ours] = theirs, take
                self.shapes.pop(theirs, None)
                self.shapes[ours] = tuple(take(torch.empty(fused[theirs], device="meta")).shape)


def _itself(tensor: Tensor) -> Tensor:
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
