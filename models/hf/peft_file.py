"""The tensors of a PEFT adapter folder, by the name of the single weight that each belongs to.

transformers 5 holds a layer's experts in two parameters [experts, ...], gate with up in one and down in the other, and
the router's weight is a parameter too. PEFT's adapter of E experts is A [E r, in] and B [out, r E], where B's columns
are numbered by the expert last. One for gate and up has either a rank like the others', and an A for both; or twice
that, with the first half for gate and the second for up, as PEFT makes of adapters of single experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import ModelConfig
from .source import tensor_shapes
from .table import places

PREFIX = "base_model.model."  # PEFT's, before the name of a module of the model it wraps
TENSORS = "adapter_model.safetensors"


def adapter_name(weight: str, letter: str) -> str:
    """PEFT's name of the A or B on a weight. A part of a fused weight keeps its "#part"; PEFT knows no such thing."""
    module, _, part = weight.partition("#")
    return f"{PREFIX}{module.removesuffix('.weight')}{'#' * bool(part)}{part}.lora_{letter}.weight"


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
        for (parameter, part), place in places(config).items():
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
