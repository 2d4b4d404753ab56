"""Checkpoints that any layout reads: named whole tensors, cut into the rectangles that the ranks hold.

A DP rank's share of a flat buffer is a run of numbers in a 2-D piece of a weight, and such a run is at most three
rectangles: the rest of a row, whole rows, the start of a row. So masters, moments and averages of every layout are
lists of (name, rectangle), and loading is intersecting rectangles.

    root/step_N/actor.master.00000.safetensors   what rank 0 owns of the tensors actor/master/*
                index.json                       name -> shape, rectangles (file, key, offset, shape)
                state.json, assets/...           everything that is not a tensor, files a run cannot be read without
                SHA256SUMS                       of all of these; `sha256sum -c` checks it too

A folder of that name is whole: it is written under another name, fsynced, and renamed.
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
from ..parallel.collectives import gather_objects, run_on_all_ranks
from ..parallel.shard import Entry
from .atomic import atomic_folder, fsync
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
        root: a folder that all ranks see.
        entries: this rank's rectangles; over all ranks the owned ones must tile every named tensor.
        state: rank 0's is saved: what JSON gives back unchanged (dicts with str keys, lists, str, numbers, None).
        assets: name under assets/ -> file to copy.

    Raises:
        ValueError, OSError: on every rank, when any rank failed (a full disk, say); the text names the reason,
            and the rank where it is not 0. Nothing of the new checkpoint is left then; older ones are as before.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint must be kept")
    final, aside = root / f"step_{step}", root / f".step_{step}.unfinished"
    on_all: Any = partial(run_on_all_ranks, axis=mesh.world, prefix=f"{final}: ")
    try:
        on_all(lambda: _begin_step(root, aside, state, assets) if mesh.is_main else None)
        parts = gather_objects(on_all(lambda: _write_share(aside, entries, mesh.world.rank)), mesh.world)
        on_all(lambda: _finish(aside, final, parts, step) if mesh.is_main else None)
    finally:
        if mesh.is_main:  # after a success it is no longer there
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
    """Writes a checkpoint in one process, as ranks that hold these entries would: whole, or not at all.

    Args:
        folder: the checkpoint itself; must not exist, or be empty; or a symbolic link to such a one.
        ranks: each rank's entries; of their tensors only shape and dtype are looked at (device "meta" will do).
        numbers: gives an entry's numbers; one entry's at a time are held.

    Raises:
        ValueError: the folder is not empty, or the entries do not tile every tensor.
        OSError: the disk is full.
    """
    with atomic_folder(folder) as aside:
        _fill(aside, state, assets)
        _sign(aside, [_write_share(aside, entries, rank, numbers) for rank, entries in enumerate(ranks)], step=0)


def _fill(aside: Path, state: dict[str, Any], assets: Mapping[str, Path]) -> None:
    """Writes all that is not tensors."""
    (aside / "state.json").write_text(json.dumps(_checked(state, "state")), encoding="utf-8")
    for name, source in assets.items():
        target = aside / "assets" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _begin_step(root: Path, aside: Path, state: dict[str, Any], assets: Mapping[str, Path]) -> None:
    """Clears what killed runs left, then begins."""
    for left in root.glob(".step_*"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    _fill(aside, state, assets)


def _checked(value: Any, path: str) -> Any:
    """`value`, when JSON gives it back as it was."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path} has the key {key!r}: JSON keeps only str keys")
            _checked(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _checked(inner, f"{path}[{i}]")
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{path} is a {type(value).__name__}: JSON does not give it back unchanged")
    return value


Index = dict[str, dict[str, Any]]  # name -> {"shape": [...], "rectangles": [[file, key, offset, shape], ...]}


def _write_share(
    aside: Path, entries: Iterable[Entry], rank: int, numbers: Callable[[Entry], Tensor] = lambda entry: entry.tensor
) -> tuple[Index, dict[str, str]]:
    """Writes what this rank owns, a file for each role and kind; gives its part of the index and the checksums."""
    index: Index = {}
    files: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if not entry.owned:
            continue
        shape, offset = tuple(entry.tensor.shape), tuple(entry.offset)
        group, _, weight = entry.name.rpartition("/")
        file = f"{group.replace('/', '.')}.{rank:05d}.safetensors"
        # A rectangle that is everything keeps the weight's own name: such a file reads as a plain state dict.
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


def _sign(aside: Path, parts: list[tuple[Index, dict[str, str]]], step: int) -> None:
    """Joins the ranks' indices and signs all files; all is on the disk then."""
    index: Index = {}
    sums: dict[str, str] = {}
    for share, written in parts:
        sums |= written
        for name, described in share.items():
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
    """Signs the checkpoint and gives the folder its name."""
    _sign(aside, parts, step)
    if final.exists():  # this step was saved before the run went back to an older one
        _discard(final)
    aside.rename(final)
    fsync(final.parent)


def _discard(folder: Path) -> None:
    """Deletes a checkpoint; killed halfway, no folder of that name is left half empty."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _steps(root: Path) -> dict[int, Path]:
    """The checkpoints under `root` by step, newest first."""
    found = {int(m[1]): path for path in root.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", path.name))}
    return dict(sorted(found.items(), reverse=True))


def _prune(root: Path, step: int, keep: int) -> None:
    """Keeps the newest `keep` up to `step`. Later ones belong to a run that was given up: they must not be taken for
    the latest, nor push newer ones out, so they are put aside under another name."""
    steps = _steps(root)
    for later in (n for n in steps if n > step):
        abandoned = root / f"abandoned_step_{later}"
        shutil.rmtree(abandoned, ignore_errors=True)
        steps[later].rename(abandoned)
    for old in [n for n in steps if n <= step][keep:]:
        _discard(steps[old])


def latest(root: Path, mesh: Mesh) -> Path:
    """The newest whole checkpoint under `root`, checked byte by byte; damaged ones are named on stderr and passed over.

    Collective over the world: the ranks share the checking.

    Raises:
        ValueError: there is none.
    """
    paths = gather_objects(list(_steps(root).values()) if mesh.is_main else None, mesh.world)[0]
    for path in paths:
        try:
            _check(path, None, mesh)
            return path
        except (ValueError, OSError) as error:
            if mesh.is_main:
                print(f"damaged checkpoint passed over: {error}", file=sys.stderr, flush=True)
    raise ValueError(f"{root}: {'every checkpoint is damaged' if paths else 'no checkpoint here'}")


def _sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 as the checkpoint says."""
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

    def mine() -> None:
        sums = _sums(path)
        # The largest first, dealt out in turn, so that no rank gets all of the large ones.
        chosen = sorted(sums if names is None else names, key=lambda n: (-_size(path / n), n))
        for name in chosen[mesh.world.rank :: mesh.world.size]:
            _check_file(path, name, sums)

    run_on_all_ranks(mine, mesh.world, f"{path}: ")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def read_state(path: Path) -> dict[str, Any]:
    """The saved state of a checkpoint, without its tensors; the checkpoint must have been checked, as `latest` does."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load(path: Path, entries: Iterable[Entry], mesh: Mesh) -> dict[str, Any]:
    """Fills the entries' tensors from a checkpoint of any layout and gives the saved state. Collective over the world.

    Raises:
        ValueError, OSError: on every rank: a damaged or missing file, tensors that the checkpoint lacks or holds in
            another shape; only a disk that fails in the middle of reading leaves tensors partly filled.
    """
    wanted = list(entries)
    plan: dict[str, list[Copy]] = {}
    run_on_all_ranks(lambda: plan.update(_plan(Reader(path), wanted)), mesh.world, f"{path}: ")
    _check(path, {"state.json"}.union(*gather_objects(list(plan), mesh.world)), mesh)

    def fill() -> None:
        for file, copies in plan.items():
            with safe_open(path / file, "pt") as source:
                for number, key, theirs, ours in copies:
                    wanted[number].tensor[ours].copy_(source.get_slice(key)[theirs])

    run_on_all_ranks(fill, mesh.world, f"{path}: ")
    return read_state(path)


Slices = tuple[slice, ...]
Copy = tuple[int, str, Slices, Slices]  # entry, key, range in the file's, in ours


def _overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], other_offset: tuple[int, ...], other_shape: tuple[int, ...]
) -> tuple[Slices, Slices] | None:
    """Where two rectangles of one tensor meet: (in the other, in the first); None where they do not."""
    theirs: list[slice] = []
    ours: list[slice] = []
    for a, m, b, n in zip(offset, shape, other_offset, other_shape, strict=True):
        begin, end = max(a, b), min(a + m, b + n)
        if begin >= end:
            return None
        theirs.append(slice(begin - b, end - b))
        ours.append(slice(begin - a, end - a))
    return tuple(theirs), tuple(ours)


def _plan(reader: Reader, entries: list[Entry]) -> dict[str, list[Copy]]:
    """file -> the copies that fill the entries."""
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
    """Reads whole tensors of one checkpoint without ranks, checking each file before its first use.

    Raises (here, in `check` and in `read`):
        ValueError: no checkpoint there, a damaged or missing file, no tensor of that name.
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
        """The tensor `role/kind/weight` on the host: whole, or the rectangle of `shape` at `offset`."""
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
            theirs, ours = overlap
            self.check(file)
            # Opened anew for every rectangle: pages of a file that stays open count as memory of this process.
            with safe_open(self.path / file, "pt") as source:
                part: Tensor = source.get_slice(key)[theirs]
            if part.shape == shape:
                return part
            if wanted is None:
                wanted = part.new_empty(shape)
            wanted[ours] = part
        assert wanted is not None, f"{name} has no rectangles at {offset}"
        return wanted

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is kept."""
        file, key, *_ = self.tensors[name]["rectangles"][0]
        self.check(file)
        with safe_open(self.path / file, "pt") as source:
            kept = source.get_slice(key).get_dtype()
        return next(dtype for dtype, name in DTYPES.items() if name == kept)
