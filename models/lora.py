"""LoRA on a decoder (https://arxiv.org/abs/2106.09685): targets, initialization and merging.

Adapters have PEFT's names, in checkpoints too. They are merged into the dequantized NF4 weights of a quantized base,
on which they were trained.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

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
"""The linears of a decoder: attention, dense MLP, experts and router, shared expert and its gate, LM head"""
TARGETS: tuple[Target, ...] = ("q", "k", "v", "output", "gate", "up", "down")
"""Default targets of a dense model"""
MOE_TARGETS: tuple[Target, ...] = ("q", "k", "v", "output")
"""Default targets of an MoE model"""
EVERY_TARGET: tuple[Target, ...] = get_args(Target)
Choice = Literal[Target, "all"]

PREFIX = "base_model.model."  # PEFT's, of the wrapped model's module names
ADAPTER_LETTERS = {"lora_a": "A", "lora_b": "B"}
_TARGETS = {  # linear, without its layer index -> target; with a final dot or empty: of each part, by its name
    "attention.qkv": "",
    "attention.output": "output",
    "mlp.gate_up": "",
    "mlp.down": "down",
    "mlp.experts.gate_up": "experts.",
    "mlp.experts.down": "experts.down",
    "mlp.router": "router",
    "mlp.shared.gate_up": "shared.",
    "mlp.shared.down": "shared.down",
    "mlp.shared_gate": "shared.router",
    "head": "head",
}
_FLOATS = ("router", "shared.router", "head")  # not quantized

ALL = LoRA(1, 1.0, ("all",))


def check_lora(config: ModelConfig, lora: LoRA, tp: int) -> None:
    """Checks LoRA options against the model.

    Raises:
        ValueError: naming a target that the model lacks, or a size that is not a multiple of NF4's block.
    """
    allowed = adapted_weights(config, ALL)
    absent = [target for target in lora.targets if target not in ("all", *allowed)]
    if absent:
        raise ValueError(f"lora.targets: the model has no {', '.join(absent)}; allowed: {', '.join(allowed)}, all")
    if lora.quantize:
        axis = mesh_as(0, tp=tp, pp=1).tp
        queries = Heads.of(config, axis).queries.times(config.head_dim)
        rows = {"hidden_size": [config.hidden_size], "num_heads x head_dim": queries.sizes}
        if "down" in allowed:
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
    """PEFT's name of the A or B of a weight. Parts of fused weights, which PEFT does not have, keep their "#part"."""
    module, _, part = weight.partition("#")
    return f"{PREFIX}{module.removesuffix('.weight')}{'#' * bool(part)}{part}.lora_{letter}.weight"


def trained_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """Name of a part of a parameter in a checkpoint: `hf_name`, or an adapter's name."""
    module, _, leaf = parameter.rpartition(".")
    if leaf not in ADAPTER_LETTERS:
        return hf_name(parameter, part, config, head)
    weight = _untied(f"{module}.weight", hf_slices(config, head)[f"{module}.weight", part])
    return adapter_name(weight.name, ADAPTER_LETTERS[leaf])


def _untied(parameter: str, weight: TensorSlice) -> TensorSlice:
    """The weight, but a tied head under the name lm_head, which its adapter has."""
    return replace(weight, name=HEADS["lm"].tensor) if parameter == HEADS["lm"].parameter else weight


def adapted_weights(config: ModelConfig, lora: LoRA, head: HeadKind = "lm") -> dict[Target, list[TensorSlice]]:
    """Target -> weights with an adapter, for `lora`'s targets in the model. A score head has none: it is trained in
    full."""
    found: dict[Target, list[TensorSlice]] = {target: [] for target in EVERY_TARGET}
    for (parameter, part), weight in hf_slices(config, head).items():
        module, _, leaf = re.sub(r"^layers\.\d+\.", "", parameter).rpartition(".")
        if leaf != "weight" or module not in _TARGETS:
            continue
        suffix = part.rpartition(".")[2]  # without the expert's index
        target = cast(Target, _TARGETS[module] + ("" if suffix.isdigit() else suffix))
        if lora.adapts(target) and (target != "head" or head == "lm"):
            found[target].append(_untied(parameter, weight))
    return {target: weights for target, weights in found.items() if weights}


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, int]]:
    """Name -> shape of every adapter tensor of a language model."""
    shapes: dict[str, tuple[int, int]] = {}
    for weight in (weight for found in adapted_weights(config, lora).values() for weight in found):
        shapes[adapter_name(weight.name, "A")] = lora.rank, weight.shape[1]
        shapes[adapter_name(weight.name, "B")] = weight.shape[0], lora.rank
    return shapes


def init_adapters(model: Decoder, seed: int, into: Iterable[Slot] | None = None) -> None:
    """Initializes adapters as PEFT does: A uniform in ±1/√in (Kaiming with a = √5), B zero.

    A depends on the seed and its name alone, not on the layout.

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
    base: Path, config: ModelConfig, head: HeadKind, lora: LoRA, trained: Mapping[str, Tensor]
) -> Callable[[str], Tensor | LazyTensor]:
    """Function from a weight's `hf_name` to the whole weight with its adapter merged: W + s · B A, fp32.

    Args:
        base: the model that the adapters were trained on, for `open_source`.
        trained: the checkpoint's tensors by name: adapters, and weights trained in full.
    """
    linears = adapted_weights(config, ALL, head)
    quantized = {weight for target, found in linears.items() if target not in _FLOATS for weight in found}
    # An adapted head has its own name, also where it is tied.
    weights = (*hf_slices(config, head).values(), *linears.get("head", ()))
    source, table = open_source(base), {weight.name: weight for weight in weights}

    def read(name: str) -> Tensor | LazyTensor:
        if name in trained:
            return trained[name]
        weight = table[name]
        merged = LazyTensor(weight.shape, partial(_read_rows, source, weight))
        a, b = (trained.get(adapter_name(name, letter)) for letter in "AB")
        if lora.quantize and weight in quantized:
            merged = _in_nf4(merged)
        if a is None or b is None:
            return merged
        return LazyTensor(weight.shape, lambda rows: torch.addmm(merged[rows].float(), b[rows], a, alpha=lora.scale))

    return read


def _read_rows(source: Source, weight: TensorSlice, rows: slice) -> Tensor:
    width = weight.shape[1:]
    return source.read(weight, (rows.start, *(0 for _ in width)), (rows.stop - rows.start, *width))


def _in_nf4(weight: LazyTensor) -> LazyTensor:
    """A weight quantized to NF4 with double quantization, read as fp32; in less than a sixth of fp32's memory."""
    quantized = zip(*(quantize_nf4(weight[rows]) for rows in blocks(weight.shape)), strict=True)
    codes, absmax = map(torch.cat, quantized)
    scales = dequantize_scales(*quantize_scales(absmax))
    return LazyTensor(weight.shape, lambda rows: dequantize_nf4(codes[rows], scales[rows], torch.float32))
