"""Adapters in and out: their names are PEFT's, in checkpoints too; PEFT folders, and weights with adapters merged in.

A checkpoint of a LoRA run holds the adapters alone (and a critic's score head), with a note of what they belong to:
rank, scale, targets, and the base by its folder and a digest of its weights. Merging reads the base again. With a
quantised base it merges into the numbers that the NF4 codes stand for, which are what the adapters were trained on: the
merged model is then the trained one, while adapters on weights they have never seen would be another model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.checkpoint import Reader, read_state
from ..engine.parallel.lora import TARGETS, LoRA, adapted_linears
from ..engine.parallel.shard import shard_of, sinks
from ..engine.safetensors_io import fsync, write_tensors
from ..kernels.nf4 import BLOCK, dequantize_nf4, dequantize_scales, quantize_nf4, quantize_scales
from .config import HeadKind, ModelConfig
from .decoder import Decoder
from .hf import HEADS, Place, hf_name, places
from .source import open_source

PREFIX = "base_model.model."  # PEFT's, before the name of a module of the model it wraps
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LETTERS = {"lora_a": "A", "lora_b": "B"}
_HOLDERS = {
    "q": ("attention.qkv.weight", "q"),
    "k": ("attention.qkv.weight", "k"),
    "v": ("attention.qkv.weight", "v"),
    "output": ("attention.output.weight", ""),
    "gate": ("mlp.gate_up.weight", "gate"),
    "up": ("mlp.gate_up.weight", "up"),
    "down": ("mlp.down.weight", ""),
}  # target -> parameter of a layer and its part

# What PEFT's other kinds of adapters set, and the values under which they are plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # The others begin from weights they have changed themselves: on the plain base they are another model.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def check_lora(config: ModelConfig, lora: LoRA, tp: int) -> None:
    """Refuses adapters or a quantised base that this model cannot have.

    Raises:
        ValueError: naming what and what is allowed.
    """
    if config.moe is not None:
        refused = [target for target in lora.targets if target in ("gate", "up", "down")]
        if refused:
            raise ValueError(f"lora.targets: no adapters for {', '.join(refused)} of experts; allowed: q, k, v, output")
        if lora.quantize:
            raise ValueError("lora.quantize: experts are not kept in NF4; allowed for a model with experts: false")
    if lora.quantize:
        heads = config.num_heads * config.head_dim
        rows = {"hidden_size": (config.hidden_size, 1), "num_heads x head_dim": (heads, tp)}
        rows["ffn_size"] = (config.ffn_size, tp)
        for name, (size, parts) in rows.items():
            if size % (parts * BLOCK):
                over = f" over tp={parts}" if parts > 1 else ""
                raise ValueError(f"lora.quantize: NF4 needs rows of a multiple of {BLOCK}; {name}={size}{over} is not")


def adapter_name(place: Place, letter: str) -> str:
    """PEFT's name of the A or B on a weight. A part of a fused weight keeps its "#part"; PEFT knows no such thing."""
    module, _, part = place.name.partition("#")
    return f"{PREFIX}{module.removesuffix('.weight')}{'#' * bool(part)}{part}.lora_{letter}.weight"


def trained_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """What a checkpoint calls a part of a parameter: `hf_name`, or an adapter's name."""
    module, _, leaf = parameter.rpartition(".")
    if leaf not in _LETTERS:
        return hf_name(parameter, part, config, head)
    return adapter_name(places(config, head)[f"{module}.weight", part], _LETTERS[leaf])


def adapted_places(config: ModelConfig, lora: LoRA) -> dict[str, list[Place]]:
    """Target -> the weights that have its adapters, of all layers."""
    table = places(config)
    keys = {t: [(f"layers.{i}.{_HOLDERS[t][0]}", _HOLDERS[t][1]) for i in range(config.num_layers)] for t in TARGETS}
    return {target: [table[key] for key in keys[target] if key in table] for target in lora.targets}


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, int]]:
    """Every tensor of the adapters: name -> shape."""
    shapes: dict[str, tuple[int, int]] = {}
    for place in (place for found in adapted_places(config, lora).values() for place in found):
        shapes[adapter_name(place, "A")] = lora.rank, place.shape[1]
        shapes[adapter_name(place, "B")] = place.shape[0], lora.rank
    return shapes


def has_peft_form(config: ModelConfig, lora: LoRA) -> bool:
    """Whether PEFT can hold these adapters: none is on a part of a fused weight."""
    return not any("#" in name for name in adapter_shapes(config, lora))


def start_adapter(model: Decoder, seed: int) -> None:
    """Fills a model's adapters as PEFT does: A uniform in ±1/√in (Kaiming with a = √5), B zero, so they change nothing.

    A depends on the seed and its own name alone, not on the layout.
    """
    for linear in adapted_linears(model):
        linear.lora_b.data.zero_()
    for name, parameter in model.named_parameters():
        if shard_of(parameter).adapter and name.endswith("lora_a"):
            for piece, view in sinks(parameter):
                known = f"{seed}:{trained_name(name, piece.part, model.config, model.kind)}"
                key = int.from_bytes(hashlib.sha256(known.encode()).digest()[:7])
                draws = torch.rand(piece.global_shape, generator=torch.Generator().manual_seed(key)) * 2 - 1
                cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
                view.copy_(draws[cut] / piece.global_shape[1] ** 0.5)


def read_peft(folder: Path | str, config: ModelConfig, *, quantize: bool = False) -> LoRA:
    """What a PEFT adapter folder holds, for a model of this config.

    Raises:
        ValueError: no such folder or file, another kind of adapter than LoRA, a tensor that is missing, of another
            shape or on a weight that takes no adapter.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no {CONFIG}, so no PEFT adapter")
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON: {error}") from None
    for key, allowed in _PLAIN.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {key}={values[key]!r} is not supported; allowed: {allowed[0]!r}")
    found = _adapter_tensors(folder)
    every = LoRA(1, 1.0)
    modules = {adapter_name(p, "A"): target for target, ps in adapted_places(config, every).items() for p in ps}
    targets = {modules[name] for name in found if name in modules}
    try:
        lora = LoRA(
            values.get("r", 8),
            float(values.get("lora_alpha", 8)),
            tuple(target for target in TARGETS if target in targets),
            rslora=bool(values.get("use_rslora")),
            quantize=quantize,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    expected = adapter_shapes(config, lora)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name != PREFIX + HEADS["score"].theirs]
    for what, names in (("lacks", missing), ("holds what the model has no place for:", extra)):
        if names:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            raise ValueError(f"{folder / TENSORS} {what} {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{folder / TENSORS}: {name} has shape {list(found[name])}, expected {list(shape)}")
    return lora


def _adapter_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    if not (folder / TENSORS).is_file():
        pickled = " (adapter_model.bin is a pickle, which is not loaded: save it again with peft)"
        raise ValueError(f"{folder}: no {TENSORS}{pickled * (folder / 'adapter_model.bin').is_file()}")
    try:
        with safe_open(folder / TENSORS, "pt") as source:
            return {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS}: damaged or truncated: {error}") from None


def load_adapter(model: Decoder, folder: Path | str) -> None:
    """Fills a model's adapters from a PEFT folder, each rank reading only its slices; a score head too, if it is there.

    Raises:
        ValueError: the folder's adapters are not the model's: as `read_peft`, or another rank, scale or targets.
    """
    assert model.lora is not None
    theirs = read_peft(folder, model.config, quantize=model.lora.quantize)
    for key in ("rank", "alpha", "rslora", "targets"):
        one, other = getattr(theirs, key), getattr(model.lora, key)
        if (set(one) != set(other)) if key == "targets" else one != other:
            raise ValueError(f"{folder}: {key}={one}, the model's adapters have {other}")
    with safe_open(Path(folder) / TENSORS, "pt") as source:
        held = set(source.keys())
        for name, parameter in model.named_parameters():
            for piece, view in sinks(parameter) if parameter.requires_grad else ():
                theirs_ = trained_name(name, piece.part, model.config, model.kind)
                key = theirs_ if shard_of(parameter).adapter else PREFIX + theirs_
                if key in held:
                    cut = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
                    view.copy_(source.get_slice(key)[cut])


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
        ValueError: the checkpoint holds whole weights, or adapters on parts of fused weights; a folder that is not
            empty.
    """
    reader, prefix = Reader(checkpoint), f"{role}/{weights}/"
    saved = saved_adapter(reader, role)
    if saved is None:
        raise ValueError(f"{checkpoint}: the {role} has whole weights, no adapters; export it without --adapter")
    lora, facts = saved
    held = sorted(name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix))
    if not held:
        raise ValueError(f"{checkpoint}: no {prefix.rstrip('/')} weights")
    fused = [name for name in held if "#" in name]
    if fused:
        raise ValueError(f"{fused[0]}: PEFT has no adapters on parts of a fused weight; export it merged")
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")
    score = HEADS["score"].theirs
    modules = {n.removesuffix(".lora_A.weight").rpartition(".")[2] for n in held if n.endswith(".lora_A.weight")}
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score in held else "CAUSAL_LM",
        "base_model_name_or_path": facts["base"],
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "modules_to_save": ["score"] if score in held else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    aside.mkdir(parents=True)
    try:
        tensors = {PREFIX + n if n == score else n: reader.read(prefix + n).to(dtype) for n in held}
        write_tensors(aside / TENSORS, tensors)
        (aside / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            fsync(path)
        aside.rename(folder)  # replaces an empty folder
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def merger(
    base: Path, config: ModelConfig, head: HeadKind, lora: LoRA, held: Mapping[str, Tensor]
) -> Callable[[str], Tensor]:
    """A function from a weight's name, as `hf_name` gives it, to the whole weight with its adapter: W + s · B A, fp32.

    Args:
        base: what the adapters belong to, a folder or whatever `open_source` reads.
        held: what was trained, by the names of a checkpoint; weights trained in full come from here.
    """
    source, table = open_source(base), {place.name: place for place in places(config, head).values()}
    linears = {place for found in adapted_places(config, LoRA(1, 1.0)).values() for place in found}

    def read(name: str) -> Tensor:
        if name in held:
            return held[name]
        place = table[name]
        weight = source.read(place)
        if lora.quantize and place in linears:
            codes, absmax = quantize_nf4(weight)
            weight = dequantize_nf4(codes, dequantize_scales(*quantize_scales(absmax)), torch.float32)
        a, b = (adapter_name(place, letter) for letter in "AB")
        return torch.addmm(weight.float(), held[b], held[a], alpha=lora.scale) if a in held else weight

    return read
