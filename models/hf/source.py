"""Sources of weights: Hugging Face folders and checkpoints, read by rectangles.

Files are closed after each read: pages of a memory-mapped file count as memory of the process once read.
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
from .lazy import blocks
from .table import HEADS, TensorSlice, check_layer_count, check_tensors, hf_shapes, hf_slices, part_shapes

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Source(Protocol):
    """Weights of a whole model: exactly the tensors of its config, checked on opening."""

    config: ModelConfig

    def dtype(self, part: TensorSlice) -> torch.dtype:
        """Stored dtype of a part."""
        ...

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Rectangle of `shape` at `offset` in the part, on the CPU."""
        ...


def open_source(path: Path | str) -> Source:
    """Source of a GGUF file, a checkpoint's `checkpoint_role`, or a Hugging Face folder.

    Raises:
        ValueError: naming a file or tensor that is missing, corrupt, of another shape or unknown.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    return FolderSource(path) if checkpoint_role(path) is None else CheckpointSource(path)


class FolderSource:
    """Hugging Face folder: config.json and safetensors, one file or several with an index."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_config(folder)
        self.files = tensor_files(folder)
        check_layer_count(self.config, self.files, folder)
        _check_folder(self.files, self.config, folder)

    def dtype(self, part: TensorSlice) -> torch.dtype:
        with safe_open(self.folder / self.files[part.tensor][0], "pt") as file:
            return _DTYPES[file.get_slice(part.tensor).get_dtype()]

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        start = (part.start + offset[0], *offset[1:])
        cut = tuple(slice(o, o + n) for o, n in zip(start, shape, strict=True))
        with safe_open(self.folder / self.files[part.tensor][0], "pt") as file:
            return file.get_slice(part.tensor)[cut]


class CheckpointSource:
    """Checkpoint of any layout: the masters of one role."""

    def __init__(self, path: Path):
        role = checkpoint_role(path)
        self.reader, self.prefix = Reader(path), f"{role}/master/"
        for name in (name for name in self.reader.sums if name.startswith(f"assets/{role}/")):
            self.reader.check(name)
        self.config = read_config(path)
        names = sorted(n.removeprefix(self.prefix) for n in self.reader.tensors if n.startswith(self.prefix))
        check_layer_count(self.config, names, path)
        found = {name: tuple(self.reader.tensors[self.prefix + name]["shape"]) for name in names}
        hint = "; adapters are exported first (launch/export_hf.py)"
        check_tensors(f"{path}, {role}", part_shapes(self.config, head_of(self.config)), found, hint)

    def dtype(self, part: TensorSlice) -> torch.dtype:
        return self.reader.dtype(self.prefix + part.name)

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return self.reader.read(self.prefix + part.name, offset, shape)


def read_finite(
    source: Source, where: Path | str, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    """`source.read`; raises ValueError naming a tensor with a NaN or an infinity.

    Args:
        where: path of the source, for the message.
    """
    tensor = source.read(part, offset, shape)
    if tensor.numel() and not all(math.isfinite(limit) for limit in tensor.aminmax()):  # a NaN becomes both limits
        raise ValueError(f"{where}: {part.tensor} has NaN or infinity; allowed: finite numbers")
    return tensor


def tensor_files(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (file, shape), from the headers of a folder's safetensors."""
    if (folder / "model.safetensors").is_file():
        files, indexed = ["model.safetensors"], {}
    elif (folder / INDEX).is_file():
        try:
            indexed = dict(read_json(folder / INDEX)["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / INDEX}: not an index of safetensors files: {error!r}") from None
        for name, file in indexed.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{folder / INDEX}: weight_map, {name}: {file!r} is not a file name")
        files = sorted(set(indexed.values()))
    else:
        raise ValueError(f"{folder}: no model.safetensors and no {INDEX}{_pickle_hint(folder)}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing, but named in {INDEX}")
        for name, shape in tensor_shapes(folder / file).items():
            if name in found:
                raise ValueError(f"{folder / file}: {name} is also in {found[name][0]}")
            found[name] = file, shape
    for name, file in indexed.items():
        actual = found.get(name, ("no file",))[0]
        if actual != file:
            raise ValueError(f"{folder / file}: no tensor {name}, expected by {INDEX}; it is in {actual}")
    return found


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the header of one safetensors file.

    Raises:
        ValueError: a corrupt file, or a tensor that is not floating point.
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
        raise ValueError(f"{file}: corrupt or truncated: {error}") from None
    return shapes


def _pickle_hint(folder: Path) -> str:
    """Hint for a folder of pickles; "" where there are none."""
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if not pickles:
        return ""
    return (
        f" (found {', '.join(pickles[:3])}; pickles are not loaded, since loading one can run code."
        " docs/conversion.md, Pickles: how to convert them to safetensors)"
    )


def _check_folder(found: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig, folder: Path) -> None:
    """Checks that a folder holds exactly the tensors of its config; raises ValueError otherwise."""
    kind = head_of(config)
    expected = hf_shapes(config, kind)
    tied = kind == "lm" and config.tie_embeddings
    head, embedding = HEADS["lm"].tensor, hf_slices(config)["embedding.weight", ""].tensor
    # Old files have rotary frequencies, which follow from rope_theta.
    counted = (n for n in found if not n.endswith("rotary_emb.inv_freq") and not (tied and n == head))
    check_tensors(folder, expected, {name: found[name][1] for name in counted})
    if tied and head in found:
        with safe_open(folder / found[head][0], "pt") as one, safe_open(folder / found[embedding][0], "pt") as other:
            pair = one.get_slice(head), other.get_slice(embedding)
            if not all(torch.equal(pair[0][rows], pair[1][rows]) for rows in blocks(found[head][1])):
                raise ValueError(f"{folder}: config.json ties the embeddings, but {head} differs from {embedding}")
