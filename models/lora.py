"""LoRA on a decoder: the weights that take adapters, how adapters begin, and weights with their adapters merged in.

Adapters go by PEFT's names, in checkpoints too. Merging into a quantized base adds to the numbers that the NF4 codes
stand for, which are what the adapters were trained on: the merged model is then the trained one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..engine.mesh import mesh_as
from ..engine.parallel.lora import LoRA
from ..engine.parallel.shard import Slot, slots, split
from ..kernels.nf4 import BLOCK, dequantize_nf4, dequantize_scales, quantize_nf4, quantize_scales
from .config import HeadKind, ModelConfig
from .decoder import Decoder, Heads
from .hf.lazy import LazyTensor, blocks
from .hf.source import Source, open_source
from .hf.table import HEADS, TensorSlice, hf_name, hf_slices

Target = Literal[
    "q", "k", "v", "output", "gate", "up", "down",
    "experts.gate", "experts.up", "experts.down", "router",
    "shared.gate", "shared.up", "shared.down", "shared.router", "head",
]  # fmt: skip
"""Every linear of a decoder: attention, a dense MLP, experts with their router, the shared expert with its, the head"""
TARGETS: tuple[Target, ...] = ("q", "k", "v", "output", "gate", "up", "down")
"""The linears of a decoder without experts, the head left out"""
MOE_TARGETS: tuple[Target, ...] = ("q", "k", "v", "output")
"""The linears that every MoE model has"""
EVERY_TARGET: tuple[Target, ...] = get_args(Target)
Choice = Literal[Target, "all"]

PREFIX = "base_model.model."  # PEFT's, before the name of a module of the model it wraps
ADAPTER_LETTERS = {"lora_a": "A", "lora_b": "B"}
_TARGETS: dict[tuple[str, str], Target] = {
    ("attention.qkv.weight", "q"): "q",
    ("attention.qkv.weight", "k"): "k",
    ("attention.qkv.weight", "v"): "v",
    ("attention.output.weight", ""): "output",
    ("mlp.gate_up.weight", "gate"): "gate",
    ("mlp.gate_up.weight", "up"): "up",
    ("mlp.down.weight", ""): "down",
    ("mlp.experts.gate_up.weight", "gate"): "experts.gate",
    ("mlp.experts.gate_up.weight", "up"): "experts.up",
    ("mlp.experts.down.weight", ""): "experts.down",
    ("mlp.router.weight", ""): "router",
    ("mlp.shared.gate_up.weight", "gate"): "shared.gate",
    ("mlp.shared.gate_up.weight", "up"): "shared.up",
    ("mlp.shared.down.weight", ""): "shared.down",
    ("mlp.shared_gate.weight", ""): "shared.router",
    ("head.weight", ""): "head",
}  # (parameter without the layer's number, part without the expert's number) -> target
_FLOATS = ("router", "shared.router", "head")  # not quantized

ALL = LoRA(1, 1.0, ("all",))


def check_lora(config: ModelConfig, lora: LoRA, tp: int) -> None:
    """Checks adapters and a quantized base against the model.

    Raises:
        ValueError: naming a target that the model lacks, or a size that NF4's blocks do not divide.
    """
    held = adapted_weights(config, ALL)
    absent = [target for target in lora.targets if target not in ("all", *held)]
    if absent:
        raise ValueError(f"lora.targets: the model has no {', '.join(absent)}; allowed: {', '.join(held)}, all")
    if lora.quantize:
        axis = mesh_as(0, tp=tp, pp=1).tp
        queries = Heads.of(config, axis).queries.times(config.head_dim)
        rows = {"hidden_size": [config.hidden_size], "num_heads x head_dim": queries.sizes}
        if "down" in held:
            rows["ffn_size"] = split(config.ffn_size, axis).sizes
        if config.moe is not None:
            rows["moe.ffn_size"] = split(config.moe.ffn_size, axis).sizes
            rows["moe.shared_ffn_size"] = split(config.moe.shared_ffn_size, axis).sizes
        for name, sizes in rows.items():
            if any(size % BLOCK for size in sizes):
                over = f" over tp={tp}" if len(sizes) > 1 else ""
                raise ValueError(
                    f"lora.quantize: NF4 needs rows of a multiple of {BLOCK}; {name}={sum(sizes)}{over} is not"
                )


def adapter_name(weight: str, letter: str) -> str:
    """PEFT's name of the A or B on a weight. A part of a fused weight keeps its "#part"; PEFT knows no such thing."""
    module, _, part = weight.partition("#")
    return f"{PREFIX}{module.removesuffix('.weight')}{'#' * bool(part)}{part}.lora_{letter}.weight"


def trained_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """Name of a part of a parameter in a checkpoint: `hf_name`, or an adapter's name."""
    module, _, leaf = parameter.rpartition(".")
    if leaf not in ADAPTER_LETTERS:
        return hf_name(parameter, part, config, head)
    weight = _own(f"{module}.weight", hf_slices(config, head)[f"{module}.weight", part])
    return adapter_name(weight.name, ADAPTER_LETTERS[leaf])


def _own(parameter: str, weight: TensorSlice) -> TensorSlice:
    """The weight under the name of its adapter: a tied head's is not the embedding's."""
    return replace(weight, name=HEADS["lm"].tensor) if parameter == HEADS["lm"].parameter else weight


def adapted_weights(config: ModelConfig, lora: LoRA, head: HeadKind = "lm") -> dict[Target, list[TensorSlice]]:
    """Target -> the weights that have its adapters, for the targets that the model has; a score head has none, as it
    is trained in full."""
    found: dict[Target, list[TensorSlice]] = {target: [] for target in EVERY_TARGET}
    for (parameter, part), weight in hf_slices(config, head).items():
        last = part.rpartition(".")[2]
        key = re.sub(r"^layers\.\d+\.", "", parameter), "" if last.isdigit() else last
        target = _TARGETS.get(key)
        if target is not None and lora.wants(target) and (target != "head" or head == "lm"):
            found[target].append(_own(parameter, weight))
    return {target: held for target, held in found.items() if held}


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, int]]:
    """Every tensor of a language model's adapters: name -> shape."""
    shapes: dict[str, tuple[int, int]] = {}
    for weight in (weight for found in adapted_weights(config, lora).values() for weight in found):
        shapes[adapter_name(weight.name, "A")] = lora.rank, weight.shape[1]
        shapes[adapter_name(weight.name, "B")] = weight.shape[0], lora.rank
    return shapes


def init_adapters(model: Decoder, seed: int, into: Iterable[Slot] | None = None) -> None:
    """Fills a model's adapters as PEFT does: A uniform in ±1/√in (Kaiming with a = √5), B zero, so they change nothing.

    A depends on the seed and its own name alone, not on the layout.

    Args:
        into: as in `load_hf`.
    """
    for name, piece, sink in slots(model) if into is None else into:
        if name.endswith("lora_b"):
            sink.copy_(torch.zeros(piece.shape))
        elif name.endswith("lora_a"):
            label = f"{seed}:{trained_name(name, piece.part, model.config, model.kind)}"
            key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7])
            draws = torch.rand(piece.global_shape, generator=torch.Generator().manual_seed(key)) * 2 - 1
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(draws[cut] / piece.global_shape[1] ** 0.5)


def merged_reader(
    base: Path, config: ModelConfig, head: HeadKind, lora: LoRA, held: Mapping[str, Tensor]
) -> Callable[[str], Tensor | LazyTensor]:
    """A function from a weight's name, as `hf_name` gives it, to the whole weight with its adapter: W + s · B A, fp32.

    Args:
        base: the model that the adapters belong to, as `open_source` reads it.
        held: trained tensors by their names in the checkpoint; weights trained in full come from here.
    """
    linears = adapted_weights(config, ALL, head)
    quantized = {weight for target, found in linears.items() if target not in _FLOATS for weight in found}
    # An adapted head has a name of its own, also where it is tied.
    weights = (*hf_slices(config, head).values(), *linears.get("head", ()))
    source, table = open_source(base), {weight.name: weight for weight in weights}

    def read(name: str) -> Tensor | LazyTensor:
        if name in held:
            return held[name]
        weight = table[name]
        merged = LazyTensor(weight.shape, partial(_rows_at, source, weight))
        a, b = (held.get(adapter_name(name, letter)) for letter in "AB")
        if lora.quantize and weight in quantized:
            merged = _in_nf4(merged)
        if a is None or b is None:
            return merged
        return LazyTensor(weight.shape, lambda rows: torch.addmm(merged[rows].float(), b[rows], a, alpha=lora.scale))

    return read


def _rows_at(source: Source, weight: TensorSlice, rows: slice) -> Tensor:
    width = weight.shape[1:]
    return source.read(weight, (rows.start, *(0 for _ in width)), (rows.stop - rows.start, *width))


def _in_nf4(weight: LazyTensor) -> LazyTensor:
    """A weight rounded to NF4 with double quantization, read as fp32; held in less than a sixth of float32's memory."""
    quantized = zip(*(quantize_nf4(weight[rows]) for rows in blocks(weight.shape)), strict=True)
    codes, absmax = map(torch.cat, quantized)
    scales = dequantize_scales(*quantize_scales(absmax))
    return LazyTensor(weight.shape, lambda rows: dequantize_nf4(codes[rows], scales[rows], torch.float32))
