"""Hugging Face name and rows of every weight: a family's conversion table (models/families/) expanded for a config.

Loading, export, checkpoints and adapters all use the functions below.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from ..config import HeadKind, ModelConfig
from ..families.family import WeightRow
from ..families.registry import family_of

HEADS: dict[HeadKind, WeightRow] = {
    "lm": WeightRow("head.weight", "", "lm_head.weight", "vocab hidden"),
    "score": WeightRow("head.weight", "", "score.weight", "one hidden"),
}


@dataclass(frozen=True)
class TensorSlice:
    """Rows of a Hugging Face tensor that are one part of a Decoder parameter: all rows, unless the tensor is fused.

    Attributes:
        name: the tensor's, plus "#part" if it is fused; the part's name in checkpoints.
        tensor: name of the tensor.
        start: first row.
        shape: of the part.
    """

    name: str
    tensor: str
    start: int
    shape: tuple[int, ...]


def _sizes(config: ModelConfig) -> dict[str, int]:
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "q": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "ffn": config.ffn_size,
        "one": 1,
    }
    if config.moe is not None:
        moe = config.moe
        sizes |= {"experts": moe.experts, "expert_ffn": moe.ffn_size, "shared": moe.shared_ffn_size}
    return sizes


@cache
def hf_slices(config: ModelConfig, head: HeadKind = "lm") -> dict[tuple[str, str], TensorSlice]:
    """(parameter, part) -> its rows in a Hugging Face folder, layer by layer."""
    table, sizes = family_of(config).table(config), _sizes(config)
    found: dict[tuple[str, str], TensorSlice] = {}
    lengths: dict[str, int] = {}  # rows of each tensor so far

    def add(row: WeightRow, i: int = 0) -> None:
        shape = tuple(sizes[dim] for dim in row.shape.split())
        for e in range(sizes["experts"] if "{e}" in row.part else 1):
            part, tensor = row.part.format(e=e), row.tensor.format(i=i, e=e)
            start = lengths.get(tensor, 0)
            lengths[tensor] = start + shape[0]
            found[row.parameter.format(i=i), part] = TensorSlice(f"{tensor}#{part}", tensor, start, shape)

    embedding = next(row for row in table if row.parameter == "embedding.weight")
    add(embedding)
    for i in range(config.num_layers):
        sparse = config.moe is not None and i not in config.moe.dense_layers
        for row in table:
            if "{i}" in row.parameter and row.layers in ("all", "moe" if sparse else "dense"):
                add(row, i)
    for row in table:
        if "{i}" not in row.parameter and row is not embedding:
            add(row)
    for key, rows in found.items():
        if lengths[rows.tensor] == rows.shape[0]:  # not fused
            found[key] = replace(rows, name=rows.tensor)
    if head == "lm" and config.tie_embeddings:
        found[HEADS["lm"].parameter, ""] = found["embedding.weight", ""]
    else:
        row = HEADS[head]
        shape = tuple(sizes[dim] for dim in row.shape.split())
        found[row.parameter, ""] = TensorSlice(row.tensor, row.tensor, 0, shape)
    return found


def hf_name(parameter: str, part: str, config: ModelConfig, head: HeadKind = "lm") -> str:
    """Hugging Face's name of a part of a parameter, plus "#part" if fused; a tied head has the embedding's."""
    return hf_slices(config, head)[parameter, part].name


def hf_shapes(config: ModelConfig, head: HeadKind = "lm") -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a folder with this config and head, in the table's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rows in dict.fromkeys(hf_slices(config, head).values()):
        stop = rows.start + rows.shape[0]
        shapes[rows.tensor] = (max(stop, shapes.get(rows.tensor, (0,))[0]), *rows.shape[1:])
    return shapes


def part_shapes(config: ModelConfig, head: HeadKind = "lm") -> dict[str, tuple[int, ...]]:
    """`hf_name` -> shape of every part, as in checkpoints: fused tensors are split."""
    return {rows.name: rows.shape for rows in hf_slices(config, head).values()}


def parts_by_tensor(names: Iterable[str], config: ModelConfig, head: HeadKind = "lm") -> dict[str, list[str]]:
    """Tensor -> the given names that make it up: its own, or those of all parts of a fused one, in order."""
    names = dict.fromkeys(names)
    fused: dict[str, list[str]] = {}
    for rows in dict.fromkeys(hf_slices(config, head).values()):
        if rows.name != rows.tensor:
            fused.setdefault(rows.tensor, []).append(rows.name)
    fused = {tensor: parts for tensor, parts in fused.items() if all(part in names for part in parts)}
    joined = {part for parts in fused.values() for part in parts}
    return {name: [name] for name in names if name not in joined} | fused


def check_tensors(
    where: object, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], hint: str = ""
) -> None:
    """Compares expected tensors with those found, both name -> shape.

    Args:
        where: file or folder, for the message.
        hint: appended to the names of missing and unknown tensors.

    Raises:
        ValueError: naming up to three tensors that are missing or unknown, or one of another shape.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    for fault, names in (("missing tensors", missing), ("tensors unknown to the model", unknown)):
        if names:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            raise ValueError(f"{where}: {fault}: {', '.join(names[:3])}{more}{hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}")


def check_layer_count(config: ModelConfig, tensors: Collection[str], where: object) -> None:
    """Compares the numbers of layers and experts with that of tensors, before their table is built.

    Raises:
        ValueError: there are more layers or experts than tensors.
    """
    experts = config.moe.experts if config.moe is not None else 0
    sparse = config.num_layers - len(config.moe.dense_layers) if config.moe is not None else 0
    for number, counted in ((config.num_layers, "num_hidden_layers"), (sparse * experts, "experts in all layers")):
        if number > len(tensors):
            raise ValueError(f"{where}: config.json has {number} {counted}, but there are only {len(tensors)} tensors")
