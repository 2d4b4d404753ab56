"""Sources of weights: Hugging Face folders and checkpoints, read rectangle by rectangle.

Files are closed between two reads: a mapped file counts as memory of the process, page by page as it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...engine.storage.checkpoint import Reader
from ...engine.storage.safetensors_io import DTYPES
from ..config import ModelConfig
from ..families.registry import head_of, read_config
from ..folder import INDEX, checkpoint_role, read_json
from .gguf import GGUFFile
from .table import HEADS, TensorSlice, check_layer_count, check_tensors, hf_shapes, hf_slices, part_shapes

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Source(Protocol):
    """A whole model's weights: exactly the tensors of its config, checked when it was opened."""

    config: ModelConfig

    def dtype(self, part: TensorSlice) -> torch.dtype:
        """The stored type of a part's numbers."""
        ...

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The rectangle of `shape` at `offset` in the part, on the host."""
        ...


def open_source(path: Path | str) -> Source:
    """A source for a GGUF file, a checkpoint (the weights of its `checkpoint_role`), or a Hugging Face folder.

    Raises:
        ValueError: a file or tensor that is missing, damaged, of another shape or not of the model; naming it.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    return FolderSource(path) if checkpoint_role(path) is None else CheckpointSource(path)


class FolderSource:
    """config.json and safetensors, one file or several with an index."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_config(folder)
        self.files = tensor_files(folder)
        check_layer_count(self.config, self.files, folder)
        _same_tensors(self.files, self.config, folder)

    def dtype(self, part: TensorSlice) -> torch.dtype:
        with safe_open(self.folder / self.files[part.tensor][0], "pt") as file:
            return _DTYPES[file.get_slice(part.tensor).get_dtype()]

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        begin = (part.start + offset[0], *offset[1:])
        cut = tuple(slice(o, o + n) for o, n in zip(begin, shape, strict=True))
        with safe_open(self.folder / self.files[part.tensor][0], "pt") as file:
            return file.get_slice(part.tensor)[cut]


class CheckpointSource:
    """The masters of one role in a checkpoint of any layout."""

    def __init__(self, path: Path):
        role = checkpoint_role(path)
        self.reader, self.prefix = Reader(path), f"{role}/master/"
        for name in (name for name in self.reader.sums if name.startswith(f"assets/{role}/")):
            self.reader.check(name)
        self.config = read_config(path)
        held = sorted(n.removeprefix(self.prefix) for n in self.reader.tensors if n.startswith(self.prefix))
        check_layer_count(self.config, held, path)
        found = {name: tuple(self.reader.tensors[self.prefix + name]["shape"]) for name in held}
        hint = "; adapters are exported first (launch/export_hf.py)"
        check_tensors(f"{path}, {role}", part_shapes(self.config, head_of(self.config)), found, hint)

    def dtype(self, part: TensorSlice) -> torch.dtype:
        return self.reader.dtype(self.prefix + part.name)

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return self.reader.read(self.prefix + part.name, offset, shape)


def read_finite(
    source: Source, where: Path | str, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    """`source.read`; raises ValueError naming the tensor where it holds a NaN or an infinity.

    Args:
        where: the source, as the message names it.
    """
    numbers = source.read(part, offset, shape)
    if numbers.numel() and not all(math.isfinite(limit) for limit in numbers.aminmax()):  # a NaN is both
        raise ValueError(f"{where}: {part.tensor} holds NaN or infinity; allowed: finite numbers")
    return numbers


def tensor_files(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (file, shape), from the headers of all files."""
    if (folder / "model.safetensors").is_file():
        files, indexed = ["model.safetensors"], {}
    elif (folder / INDEX).is_file():
        try:
            indexed = dict(read_json(folder / INDEX)["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / INDEX}: not an index of safetensors files: {error!r}") from None
        for name, file in indexed.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{folder / INDEX}: weight_map, {name}: {file!r} is not the name of a file beside it")
        files = sorted(set(indexed.values()))
    else:
        raise ValueError(f"{folder}: no model.safetensors and no {INDEX}{_other_formats(folder)}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing, but named in {INDEX}")
        for name, shape in tensor_shapes(folder / file).items():
            if name in found:
                raise ValueError(f"{folder / file}: holds {name}, as {found[name][0]} does")
            found[name] = file, shape
    for name, file in indexed.items():
        if name not in found:
            raise ValueError(f"{folder / file}: no tensor {name}, which {INDEX} puts there")
        if found[name][0] != file:
            raise ValueError(f"{folder / file}: no tensor {name}, which {INDEX} puts there; it is in {found[name][0]}")
    return found


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the header of one safetensors file.

    Raises:
        ValueError: the file is damaged, or a tensor is not of floating point.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(file, "pt") as source:
            for name in source.keys():
                view = source.get_slice(name)
                if view.get_dtype() not in DTYPES.values():
                    raise ValueError(f"{file}: {name} is {view.get_dtype()}; allowed: {[*DTYPES.values()]}")
                shapes[name] = tuple(view.get_shape())
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated: {error}") from None
    return shapes


def _other_formats(folder: Path) -> str:
    """Hint at pickles in the folder and at their conversion; "" where there are none."""
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if pickles:
        return (
            f" (found {', '.join(pickles[:3])}; pickles are not loaded, since loading one can run code."
            " docs/conversion.md, Pickles, has ten lines that convert them to safetensors without)"
        )
    return ""


def _same_tensors(found: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig, folder: Path) -> None:
    """Refuses a folder that does not hold exactly the tensors of its own config."""
    kind = head_of(config)
    expected = hf_shapes(config, kind)
    tied = kind == "lm" and config.tie_embeddings
    head, embedding = HEADS["lm"].tensor, hf_slices(config)["embedding.weight", ""].tensor
    # Old files carry the rotary frequencies, which follow from rope_theta.
    counted = (n for n in found if not n.endswith("rotary_emb.inv_freq") and not (tied and n == head))
    check_tensors(folder, expected, {name: found[name][1] for name in counted})
    if tied and head in found:
        with safe_open(folder / found[head][0], "pt") as one, safe_open(folder / found[embedding][0], "pt") as other:
            if not torch.equal(one.get_tensor(head), other.get_tensor(embedding)):
                raise ValueError(f"{folder}: config.json ties the embeddings, but {head} differs from {embedding}")
