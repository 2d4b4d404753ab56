"""Layout-independent checkpoints: whole tensors by name, in the rectangles that the ranks hold.

A DP rank's shard of a flat buffer is a run of numbers in a 2-D piece of a weight, and such a run is at most three
rectangles: the end of a row, whole rows, the start of a row. So masters, moments and averages of every layout are
lists of (name, rectangle), and loading intersects rectangles.

    root/step_N/actor.master.00000.safetensors   rank 0's rectangles of the tensors actor/master/*
                index.json                       name -> shape, rectangles (file, key, offset, shape)
                state.json, assets/...           non-tensor state, and files needed to read the model
                SHA256SUMS                       of all of these; `sha256sum -c` checks it too

The folder is written under a temporary name, fsynced and renamed: step_N is always complete.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..mesh import Mesh
from ..parallel.collectives import gather_objects, gather_objects_on_first, run_on_all_ranks, run_on_first_rank
from ..parallel.shard import Entry
from .atomic import atomic_folder, delete_folder, fsync, replace_folder
from .safetensors_io import DTYPES, sha256, write_stream

_SUMS = "SHA256SUMS"


def save(
    root: Path,
    step: int,
    entries: Iterable[Entry],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    keep: int,
    assets: Mapping[str, Path],
) -> Path:
    """Writes `root`/step_`step` and deletes all but the newest `keep` checkpoints. Collective over the world.

    Args:
        root: a folder on a file system that all ranks share.
        entries: this rank's rectangles; over all ranks the owned ones must tile every named tensor.
        state: rank 0's is saved; JSON must preserve it (dicts with str keys, lists, str, numbers, None).
        assets: name under assets/ -> file to copy.

    Raises:
        ValueError, OSError: on every rank, if any rank failed (a full disk); the text has the rank unless it is 0.
            Nothing of the new checkpoint is left; older ones are unchanged.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint must be kept")
    final, aside = root / f"step_{step}", root / f".step_{step}.unfinished"
    on_all: Any = partial(run_on_all_ranks, axis=mesh.world, prefix=f"{final}: ")
    try:
        on_all(lambda: _begin_step(root, aside, state, assets) if mesh.is_main else None)
        parts = gather_objects_on_first(on_all(lambda: _write_shard(aside, entries, mesh.world.rank)), mesh.world)
        on_all(lambda: _finish(aside, final, parts, step) if mesh.is_main else None)
    finally:
        if mesh.is_main:  # renamed after a success
            shutil.rmtree(aside, ignore_errors=True)
    on_all(lambda: _prune(root, step, keep) if mesh.is_main else None)
    return final


def write(
    folder: Path,
    ranks: Iterable[Iterable[Entry]],
    numbers: Callable[[Entry], Tensor],
    state: dict[str, Any],
    assets: Mapping[str, Path],
) -> None:
    """Writes a checkpoint atomically in one process, as ranks with these entries would.

    Args:
        folder: the checkpoint itself; see `atomic_folder`.
        ranks: each rank's entries; of their tensors only shape and dtype are used (device "meta" suffices).
        numbers: gives an entry's numbers; those of one entry at a time are in memory.

    Raises:
        ValueError: the folder is not empty, or the entries do not tile every tensor.
        OSError: the disk is full.
    """
    with atomic_folder(folder) as aside:
        _fill(aside, state, assets)
        _write_index(aside, [_write_shard(aside, entries, rank, numbers) for rank, entries in enumerate(ranks)], step=0)


def _fill(aside: Path, state: dict[str, Any], assets: Mapping[str, Path]) -> None:
    """Writes state and assets."""
    (aside / "state.json").write_text(json.dumps(_checked(state, "state")), encoding="utf-8")
    for name, source in assets.items():
        target = aside / "assets" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _begin_step(root: Path, aside: Path, state: dict[str, Any], assets: Mapping[str, Path]) -> None:
    """Deletes leftovers of killed runs and creates the temporary folder."""
    for left in root.glob(".step_*"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    _fill(aside, state, assets)


def _checked(value: Any, path: str) -> Any:
    """`value`, if JSON preserves it; ValueError otherwise."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path} has the key {key!r}: must be a str, for JSON")
            _checked(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _checked(inner, f"{path}[{i}]")
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{path} is a {type(value).__name__}, which JSON does not preserve")
    return value


Index = dict[str, dict[str, Any]]  # name -> {"shape": [...], "rectangles": [[file, key, offset, shape], ...]}


def _write_shard(
    aside: Path, entries: Iterable[Entry], rank: int, numbers: Callable[[Entry], Tensor] = lambda entry: entry.tensor
) -> tuple[Index, dict[str, str]]:
    """Writes a rank's owned entries, a file for each role and kind; returns its part of the index and the checksums."""
    index: Index = {}
    files: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if not entry.owned:
            continue
        shape, offset = tuple(entry.tensor.shape), tuple(entry.offset)
        group, _, weight = entry.name.rpartition("/")
        file = f"{group.replace('/', '.')}.{rank:05d}.safetensors"
        # A rectangle that is the whole tensor keeps the weight's name: such a file reads as a plain state dict.
        key = weight if shape == tuple(entry.global_shape) else f"{weight}@{','.join(map(str, offset))}"
        keys = files.setdefault(file, {})
        assert key not in keys, f"{entry.name} at {offset} twice on rank {rank}"
        keys[key] = entry
        described = index.setdefault(entry.name, {"shape": list(entry.global_shape), "rectangles": []})
        described["rectangles"].append([file, key, list(offset), list(shape)])
    sums = {}
    for file, keys in files.items():
        described = {key: (entry.tensor.dtype, tuple(entry.tensor.shape)) for key, entry in keys.items()}
        sums[file] = write_stream(aside / file, described, map(numbers, keys.values()))
    return index, sums


def _write_index(aside: Path, parts: list[tuple[Index, dict[str, str]]], step: int) -> None:
    """Merges the ranks' indices, writes them and the checksums, and fsyncs all files."""
    index: Index = {}
    sums: dict[str, str] = {}
    for part, written in parts:
        sums |= written
        for name, described in part.items():
            index.setdefault(name, {"shape": described["shape"], "rectangles": []})
            index[name]["rectangles"] += described["rectangles"]
    for name, described in index.items():
        held = sum(math.prod(shape) for *_, shape in described["rectangles"])
        if held != math.prod(described["shape"]):
            raise ValueError(f"{name} {described['shape']}: the ranks own {held} of {math.prod(described['shape'])}")
    (aside / "index.json").write_text(json.dumps({"step": step, "tensors": index}), encoding="utf-8")
    for path in sorted(aside.rglob("*")):
        name = str(path.relative_to(aside))
        if path.is_file() and name not in sums:
            sums[name] = sha256(path)
            fsync(path)
    (aside / _SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    fsync(aside / _SUMS)
    for folder in (*(p for p in aside.rglob("*") if p.is_dir()), aside):
        fsync(folder)


def _finish(aside: Path, final: Path, parts: list[tuple[Index, dict[str, str]]], step: int) -> None:
    """Writes the index and renames the folder, which may replace the same step (a run resumed from an older one)."""
    _write_index(aside, parts, step)
    replace_folder(final, aside)


def _steps(root: Path) -> dict[int, Path]:
    """Checkpoints under `root` by step, newest first."""
    found = {int(m[1]): path for path in root.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", path.name))}
    return dict(sorted(found.items(), reverse=True))


def _prune(root: Path, step: int, keep: int) -> None:
    """Keeps the newest `keep` up to `step`. Later ones, from before a resume of an older step, are renamed: they must
    neither count as the latest nor displace newer ones."""
    steps = _steps(root)
    for later in (n for n in steps if n > step):
        abandoned = root / f"abandoned_step_{later}"
        shutil.rmtree(abandoned, ignore_errors=True)
        steps[later].rename(abandoned)
    for old in [n for n in steps if n <= step][keep:]:
        delete_folder(steps[old])


def latest(root: Path, mesh: Mesh) -> Path:
    """The newest intact checkpoint under `root`, after checking all its files; damaged ones are skipped, with a line on
    stderr. Collective over the world: each rank checks some of the files.

    Raises:
        ValueError: there is none.
    """
    paths = run_on_first_rank(lambda: list(_steps(root).values()), mesh.world)
    for path in paths:
        try:
            _check(path, None, mesh)
            return path
        except (ValueError, OSError) as error:
            if mesh.is_main:
                print(f"damaged checkpoint skipped: {error}", file=sys.stderr, flush=True)
    raise ValueError(f"{root}: {'every checkpoint is damaged' if paths else 'no checkpoint here'}")


def _sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256, from SHA256SUMS."""
    if not (path / _SUMS).is_file():
        raise ValueError(f"{_SUMS} is missing")
    lines = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in (path / _SUMS).read_text("utf-8").splitlines()]
    sums = {line[2]: line[1] for line in lines if line}
    if len(sums) != len(lines) or not {"index.json", "state.json"} <= sums.keys():
        raise ValueError(f"{_SUMS} is damaged")
    return sums


def _check_file(path: Path, name: str, sums: Mapping[str, str]) -> None:
    if not (path / name).is_file():
        raise ValueError(f"{path / name} is missing")
    if sha256(path / name) != sums.get(name):
        raise ValueError(f"{path / name} does not match its checksum")


def _check(path: Path, names: Iterable[str] | None, mesh: Mesh) -> None:
    """Checks the named files (None: all) against their checksums, each on one rank."""

    def check() -> None:
        sums = _sums(path)
        # Largest first, round-robin, so that no rank gets all of the large files.
        sizes = {
            n: (path / n).stat().st_size if (path / n).is_file() else 0 for n in (sums if names is None else names)
        }
        chosen = sorted(sizes, key=lambda n: (-sizes[n], n))
        for name in chosen[mesh.world.rank :: mesh.world.size]:
            _check_file(path, name, sums)

    run_on_all_ranks(check, mesh.world, f"{path}: ")


def read_state(path: Path) -> dict[str, Any]:
    """The saved state of a checkpoint that has been checked, as `latest` does."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load(path: Path, entries: Iterable[Entry], mesh: Mesh) -> dict[str, Any]:
    """Fills the entries' tensors from a checkpoint of any layout; returns the saved state. Collective over the world.

    Raises:
        ValueError, OSError: on every rank: a damaged or missing file, a missing tensor or one of another shape. Only a
            disk that fails while reading leaves tensors partly filled.
    """
    wanted = list(entries)
    plan = run_on_all_ranks(lambda: _plan(Reader(path), wanted), mesh.world, f"{path}: ")
    _check(path, {"state.json"}.union(*gather_objects(list(plan), mesh.world)), mesh)

    def fill() -> None:
        for file, copies in plan.items():
            with safe_open(path / file, "pt") as source:
                for number, key, from_slices, to_slices in copies:
                    wanted[number].tensor[to_slices].copy_(source.get_slice(key)[from_slices])

    run_on_all_ranks(fill, mesh.world, f"{path}: ")
    return read_state(path)


Slices = tuple[slice, ...]
Copy = tuple[int, str, Slices, Slices]  # index of the entry, key, slices of the saved rectangle, of the entry


def _overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], other_offset: tuple[int, ...], other_shape: tuple[int, ...]
) -> tuple[Slices, Slices] | None:
    """Intersection of two rectangles of one tensor: (slices of the other, slices of the first); None if empty."""
    in_other: list[slice] = []
    in_first: list[slice] = []
    for a, m, b, n in zip(offset, shape, other_offset, other_shape, strict=True):
        begin, end = max(a, b), min(a + m, b + n)
        if begin >= end:
            return None
        in_other.append(slice(begin - b, end - b))
        in_first.append(slice(begin - a, end - a))
    return tuple(in_other), tuple(in_first)


def _plan(reader: Reader, entries: list[Entry]) -> dict[str, list[Copy]]:
    """File -> copies that fill the entries."""
    missing = sorted({entry.name for entry in entries} - reader.tensors.keys())
    if missing:
        raise ValueError(f"no tensor {', '.join(missing[:3])}{f' and {len(missing) - 3} more' * (len(missing) > 3)}")
    plan: dict[str, list[Copy]] = {}
    for number, entry in enumerate(entries):
        described = reader.tensors[entry.name]
        if described["shape"] != list(entry.global_shape):
            raise ValueError(f"{entry.name} has shape {described['shape']}, expected {list(entry.global_shape)}")
        found = 0
        for file, key, offset, shape in described["rectangles"]:
            overlap = _overlap(entry.offset, tuple(entry.tensor.shape), offset, shape)
            if overlap is not None:
                plan.setdefault(file, []).append((number, key, *overlap))
                found += math.prod(s.stop - s.start for s in overlap[0])
        if found != entry.tensor.numel():
            raise ValueError(f"{entry.name} at {entry.offset}: {found} of {entry.tensor.numel()} numbers are saved")
    return plan


class Reader:
    """Reader of whole tensors, in one process; checks each file before its first use.

    Raises (here, in `check` and in `read`):
        ValueError: no such checkpoint, a damaged or missing file, no tensor of that name.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"{path}: no such checkpoint")
        self.path, self.sums, self.checked = path, _sums(path), set[str]()
        self.check("index.json")
        self.tensors: Index = json.loads((path / "index.json").read_text(encoding="utf-8"))["tensors"]

    def check(self, file: str) -> None:
        """Compares a file with its checksum, once."""
        if file not in self.checked:
            _check_file(self.path, file, self.sums)
            self.checked.add(file)

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor `role/kind/weight`, or its rectangle of `shape` at `offset`, in host memory."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name}")
        described = self.tensors[name]
        shape = tuple(described["shape"]) if shape is None else shape
        offset = (0,) * len(shape) if offset is None else offset
        wanted: Tensor | None = None
        for file, key, at, size in described["rectangles"]:
            overlap = _overlap(offset, shape, at, size)
            if overlap is None:
                continue
            from_slices, to_slices = overlap
            self.check(file)
            # Opened for every rectangle: the pages of an open file count as memory of this process.
            with safe_open(self.path / file, "pt") as source:
                part: Tensor = source.get_slice(key)[from_slices]
            if part.shape == shape:
                return part
            if wanted is None:
                wanted = part.new_empty(shape)
            wanted[to_slices] = part
        assert wanted is not None, f"{name} has no rectangles at {offset}"
        return wanted

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a saved tensor."""
        file, key, *_ = self.tensors[name]["rectangles"][0]
        self.check(file)
        with safe_open(self.path / file, "pt") as source:
            saved = source.get_slice(key).get_dtype()
        return next(dtype for dtype, name in DTYPES.items() if name == saved)
