"""Adapters in and out: their names are PEFT's, in checkpoints too; PEFT folders, and weights with adapters merged in.

A checkpoint of a LoRA run holds the adapters alone (and a critic's score head), with a note of what they belong to:
rank, scale, targets, and the base by its folder and a digest of its weights. Merging reads the base again. With a
quantized base it merges into the numbers that the NF4 codes stand for, which are what the adapters were trained on: the
merged model is then the trained one, while adapters on weights they have never seen would be another model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.mesh import mesh_as
from ..engine.parallel.lora import EVERY_TARGET, LoRA, Target
from ..engine.parallel.shard import Slot, slots, split
from ..engine.storage.atomic import atomic_folder
from ..engine.storage.checkpoint import Reader, read_state
from ..engine.storage.safetensors_io import write_stream
from ..kernels.nf4 import BLOCK, dequantize_nf4, dequantize_scales, quantize_nf4, quantize_scales
from .config import HeadKind, ModelConfig
from .decoder import Decoder, Heads
from .hf.peft_config import CONFIG, check_targets, read_peft_config
from .hf.peft_file import PREFIX, TENSORS, PeftFile, adapter_name
from .hf.source import Source, open_source
from .hf.table import HEADS, Place, Rows, blocks, hf_name, places

_LETTERS = {"lora_a": "A", "lora_b": "B"}
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
}  # parameter, a layer's without its number, and its part, an expert's without its number
_BOTH = r".*\.gate_up_proj"  # PEFT's pattern for the parameter that holds experts' gate and up
_FLOATS = ("router", "shared.router", "head")  # what a quantized base leaves as it is

ALL = LoRA(1, 1.0, ("all",))


def check_lora(config: ModelConfig, lora: LoRA, tp: int) -> None:
    """Refuses adapters or a quantized base that this model cannot have.

    Raises:
        ValueError: naming what and what is allowed.
    """
    held = adapted_places(config, ALL)
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


def trained_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """What a checkpoint calls a part of a parameter: `hf_name`, or an adapter's name."""
    module, _, leaf = parameter.rpartition(".")
    if leaf not in _LETTERS:
        return hf_name(parameter, part, config, head)
    place = _own(f"{module}.weight", places(config, head)[f"{module}.weight", part])
    return adapter_name(place.name, _LETTERS[leaf])


def _own(parameter: str, place: Place) -> Place:
    """The place under the name that the parameter's adapter goes by: that of a tied head is not the embedding's."""
    return replace(place, name=HEADS["lm"].theirs) if parameter == HEADS["lm"].ours else place


def adapted_places(config: ModelConfig, lora: LoRA, head: HeadKind = "lm") -> dict[Target, list[Place]]:
    """Target -> the weights that have its adapters; without targets that the model lacks, and without a score head,
    which is trained in full."""
    found: dict[Target, list[Place]] = {target: [] for target in EVERY_TARGET}
    for (parameter, part), place in places(config, head).items():
        last = part.rpartition(".")[2]
        key = re.sub(r"^layers\.\d+\.", "", parameter), "" if last.isdigit() else last
        target = _TARGETS.get(key)
        if target is not None and lora.wants(target) and (target != "head" or head == "lm"):
            found[target].append(_own(parameter, place))
    return {target: held for target, held in found.items() if held}


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, int]]:
    """Every tensor of a language model's adapters: name -> shape."""
    shapes: dict[str, tuple[int, int]] = {}
    for place in (place for found in adapted_places(config, lora).values() for place in found):
        shapes[adapter_name(place.name, "A")] = lora.rank, place.shape[1]
        shapes[adapter_name(place.name, "B")] = place.shape[0], lora.rank
    return shapes


def no_peft_form(config: ModelConfig, lora: LoRA) -> str | None:
    """Why PEFT (0.21) cannot hold these adapters; None where it can."""
    held = adapted_places(config, lora)
    fused = [place.name for found in held.values() for place in found if "#" in place.name]
    if fused:
        return f"{fused[0]}: PEFT has no adapters on parts of a fused weight"
    experts = {target for target in held if target.startswith("experts.")}
    if experts not in (set(), {"experts.down"}, {"experts.gate", "experts.up", "experts.down"}):
        return f"{', '.join(sorted(experts))}: PEFT reads adapters of experts.down alone, or of all three"
    dense = [target for target in held if target in ("gate", "up", "down")]
    if dense and config.family.name == "Qwen3-MoE":
        return f"{', '.join(dense)}: PEFT takes modules of these names in a Qwen3-MoE for those of experts"
    return None


def has_peft_form(config: ModelConfig, lora: LoRA) -> bool:
    """Whether PEFT can hold these adapters."""
    return no_peft_form(config, lora) is None


def _peft_targets(config: ModelConfig, lora: LoRA, head: HeadKind) -> dict[str, Any]:
    """What a PEFT config says of the adapted weights.

    transformers 5 has all experts' gate and up in one parameter and their down in another, and the router's weight is
    a parameter without a linear. PEFT reads tensors named by the single expert into adapters of such parameters: on
    gate and up together that is one of twice the rank, whose scale must be the same.
    """
    modules, parameters = set(), set()
    for target, found in adapted_places(config, lora, head).items():
        if target.startswith("experts."):
            parameters.add("experts.down_proj" if target == "experts.down" else "experts.gate_up_proj")
        elif target == "router":
            parameters.add("mlp.gate.weight")
        else:  # in a mixture other modules have the names of an expert's
            words = 2 if config.moe is not None and target.rpartition(".")[2] in ("gate", "up", "down") else 1
            modules |= {".".join(place.name.removesuffix(".weight").split(".")[-words:]) for place in found}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    if "experts.gate_up_proj" in parameters:
        ranks[_BOTH], alphas[_BOTH] = 2 * lora.rank, _number(lora.alpha * (math.sqrt(2) if lora.rslora else 2))
    return {
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters, reverse=True) or None,  # PEFT wraps gate and up first
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _number(alpha: float) -> float:
    """PEFT writes whole numbers without a point."""
    return int(alpha) if alpha.is_integer() else alpha


def start_adapter(model: Decoder, seed: int, into: Iterable[Slot] | None = None) -> None:
    """Fills a model's adapters as PEFT does: A uniform in ±1/√in (Kaiming with a = √5), B zero, so they change nothing.

    A depends on the seed and its own name alone, not on the layout.

    Args:
        into: as in `load_hf`.
    """
    for name, piece, sink in slots(model) if into is None else into:
        if name.endswith("lora_b"):
            sink.copy_(torch.zeros(piece.shape))
        elif name.endswith("lora_a"):
            known = f"{seed}:{trained_name(name, piece.part, model.config, model.kind)}"
            key = int.from_bytes(hashlib.sha256(known.encode()).digest()[:7])
            draws = torch.rand(piece.global_shape, generator=torch.Generator().manual_seed(key)) * 2 - 1
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(draws[cut] / piece.global_shape[1] ** 0.5)


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
    modules = {adapter_name(p.name, "A"): target for target, ps in adapted_places(config, ALL).items() for p in ps}
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
    known = _peft_targets(config, lora, "lm")
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key) and values[key] != known[key]:
            allowed = f"{known[key]!r} or none" if known[key] else "none"
            raise ValueError(f"{folder / CONFIG}: {key}={values[key]!r} is not supported; allowed: {allowed}")
    expected: dict[str, tuple[int, ...]] = dict(adapter_shapes(config, lora))
    score = PREFIX + HEADS["score"].theirs
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
    check_targets(folder, values, adapted_places(config, ALL), found)
    file.check_finite()
    return lora


def check_adapter(folder: Path | str, config: ModelConfig, lora: LoRA, head: HeadKind = "lm") -> None:
    """Refuses a PEFT folder whose adapters are not those that `lora` gives a model with this head.

    Raises:
        ValueError: as `read_peft`, or another rank, scale or targets.
    """
    theirs = read_peft(folder, config, quantize=lora.quantize)
    own = tuple(adapted_places(config, lora, head))
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
        key = theirs_ if name.rpartition(".")[2] in _LETTERS else PREFIX + theirs_
        if key in held.shapes:
            cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            sink.copy_(held.read(key, cut))


@cache
def base_digest(folder: Path | str) -> str:
    """Tells one model's weights from another's: SHA-256 over every file's size, its beginning and 64 samples of it.

    Args:
        folder: whatever `open_source` reads.
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


def adapter_facts(model: Decoder, base: Path | str) -> dict[str, Any] | None:
    """What a checkpoint must say of a model's adapters beside their numbers; None for a model without."""
    lora = model.lora
    if lora is None:
        return None
    numbers = {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "targets": list(lora.targets)}
    return numbers | {"quantize": lora.quantize, "base": os.path.abspath(base), "digest": base_digest(base)}


def same_adapter(saved: Mapping[str, Any] | None, model: Decoder, base: Path | str) -> None:
    """Refuses to go on with adapters on another base, or of another kind, than those that were saved.

    Args:
        saved: `adapter_facts` of the checkpoint, None where it had no adapters.

    Raises:
        ValueError: naming what differs.
    """
    now = adapter_facts(model, base)
    if (saved is None) != (now is None):
        held, asked = ("whole weights", "adapters") if saved is None else ("adapters", "whole weights")
        raise ValueError(f"the checkpoint holds {held}, this config trains {asked} (lora.rank)")
    for key in ("rank", "alpha", "rslora", "targets", "quantize"):
        if saved and now and saved[key] != now[key]:
            raise ValueError(f"lora.{key}={now[key]}, the checkpoint was made with {saved[key]}")
    if saved:
        same_base(saved, Path(base))


def same_base(facts: Mapping[str, Any], base: Path | None = None) -> Path:
    """The folder that saved adapters belong to, looked for where it was, or at `base`.

    Raises:
        ValueError: it is not there, or holds other weights.
    """
    folder = Path(base or facts["base"])
    if not folder.exists():
        raise ValueError(
            f"{folder}: is not there; the adapters belong to the model that was (--base names another place)"
        )
    if base_digest(folder) != facts["digest"]:
        raise ValueError(f"{folder}: not the weights that the adapters belong to, which were {facts['base']}")
    return folder


def open_checkpoint(path: Path) -> Reader:
    """A checkpoint to export from.

    Raises:
        ValueError: naming the path; of a run's folder, a checkpoint in it.
    """
    if path.is_dir() and not (path / "SHA256SUMS").is_file():
        found = [*path.glob("step_*"), *path.glob("checkpoints/step_*")]
        steps = (p for p in found if p.name.removeprefix("step_").isdigit())
        last = max(steps, key=lambda p: int(p.name.removeprefix("step_")), default=None)
        hint = f"; {last} is one" if last else "; a run's are RUN/checkpoints/step_N"
        raise ValueError(f"{path}: no checkpoint, SHA256SUMS is missing{hint}")
    return Reader(path)


def saved_adapter(reader: Reader, role: str) -> tuple[LoRA, dict[str, Any]] | None:
    """The adapters of a role in a checkpoint and their `adapter_facts`; None where it has whole weights."""
    reader.check("state.json")
    facts = read_state(reader.path).get("adapters", {}).get(role)
    if facts is None:
        return None
    keys = ("rank", "alpha", "rslora", "quantize")
    return LoRA(**{key: facts[key] for key in keys}, targets=tuple(facts["targets"])), facts


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
    config = ModelConfig.from_hf(checkpoint / "assets" / role)
    why = no_peft_form(config, lora)
    if why is not None:
        raise ValueError(f"{why}; export it merged")
    score = HEADS["score"].theirs
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score in held else "CAUSAL_LM",
        "base_model_name_or_path": facts["base"],
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        **_peft_targets(config, lora, "score" if score in held else "lm"),
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
        (aside / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def merger(
    base: Path, config: ModelConfig, head: HeadKind, lora: LoRA, held: Mapping[str, Tensor]
) -> Callable[[str], Tensor | Rows]:
    """A function from a weight's name, as `hf_name` gives it, to the whole weight with its adapter: W + s · B A, fp32.

    Args:
        base: what the adapters belong to, a folder or whatever `open_source` reads.
        held: what was trained, by the names of a checkpoint; weights trained in full come from here.
    """
    linears = adapted_places(config, ALL, head)
    quantized = {place for target, found in linears.items() if target not in _FLOATS for place in found}
    known = (*places(config, head).values(), *linears.get("head", ()))  # a tied head has a name of its own, adapted
    source, table = open_source(base), {place.name: place for place in known}

    def read(name: str) -> Tensor | Rows:
        if name in held:
            return held[name]
        place = table[name]
        weight = Rows(place.shape, partial(_rows_at, source, place))
        a, b = (held.get(adapter_name(name, letter)) for letter in "AB")
        if lora.quantize and place in quantized:
            weight = _in_nf4(weight)
        if a is None or b is None:
            return weight
        return Rows(place.shape, lambda rows: torch.addmm(weight[rows].float(), b[rows], a, alpha=lora.scale))

    return read


def _rows_at(source: Source, place: Place, rows: slice) -> Tensor:
    width = place.shape[1:]
    return source.read(place, (rows.start, *(0 for _ in width)), (rows.stop - rows.start, *width))


def _in_nf4(weight: Rows) -> Rows:
    """What a weight is in NF4 with double quantization, fp32; a sixth of float32's memory and less."""
    quantized = zip(*(quantize_nf4(weight[rows]) for rows in blocks(weight.shape)), strict=True)
    codes, absmax = map(torch.cat, quantized)
    scales = dequantize_scales(*quantize_scales(absmax))
    return Rows(weight.shape, lambda rows: dequantize_nf4(codes[rows], scales[rows], torch.float32))
