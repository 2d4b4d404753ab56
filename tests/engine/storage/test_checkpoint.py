"""Checkpoints: every layout loads from every other, damage is detected, and nothing is half written."""

import dataclasses
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import Layout
from tiny_moe import moe_config
from torch import Tensor
from trialign.engine.mesh import Mesh, build_mesh, mesh_as
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel import data
from trialign.engine.parallel.shard import Entry
from trialign.engine.storage.checkpoint import Reader, latest, load, save
from trialign.models.config import HeadKind, MoEConfig
from trialign.models.decoder import Decoder
from trialign.models.hf.table import hf_name, hf_shapes

CONFIG = moe_config(
    MoEConfig(experts=4, top_k=2, ffn_size=10), vocab_size=25, hidden_size=12, head_dim=6, tie_embeddings=True
)
ROLES: list[tuple[str, HeadKind]] = [("actor", "lm"), ("critic", "score")]
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
LAYOUTS = [Layout(), Layout(2, 2, 2, 2), Layout(2, 3, 1), Layout(1, 4, 5), Layout(dp=4, ep=4)]


def entries_of(mesh: Mesh) -> list[Entry]:
    """Entries of one rank's actor and critic."""
    entries = []
    for role, head in ROLES:
        model = Decoder(CONFIG, mesh, dtype=torch.float32, head=head)
        adam = ShardedAdamW(model, mesh, tied=model.tied_parameter(), ema_decay=0.9)
        entries += adam.entries(role, partial(hf_name, config=CONFIG, head=head))
    return entries


def entries_of_layout(layout: Layout) -> list[Entry]:
    """Entries of all ranks of a layout."""
    return [e for rank in range(layout.world) for e in entries_of(mesh_as(rank, **layout._asdict()))]


def unique_numbers() -> dict[str, Tensor]:
    """Every tensor of a checkpoint; all numbers are distinct and exact in fp32."""
    wholes, begin = {}, 1
    for role, head in ROLES:
        for kind in KINDS:
            for name, shape in hf_shapes(CONFIG, head).items():
                wholes[f"{role}/{kind}/{name}"] = torch.arange(begin, begin + math.prod(shape)).view(shape).float()
                begin += math.prod(shape)
    assert begin < 2**24
    return wholes


def rectangle(whole: Tensor, entry: Entry) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(entry.offset, entry.tensor.shape, strict=True))]


def fill(entries: list[Entry]) -> list[Entry]:
    wholes = unique_numbers()
    for entry in entries:
        entry.tensor.copy_(rectangle(wholes[entry.name], entry))
    return entries


def assert_loaded(path: Path, entries: list[Entry], mesh: Mesh, state: dict) -> None:
    """Loading overwrites every entry with its part of `unique_numbers`."""
    for entry in entries:
        entry.tensor.fill_(-1)
    assert load(path, entries, mesh) == state
    wholes = unique_numbers()
    for entry in entries:
        assert entry.global_shape == tuple(wholes[entry.name].shape)
        assert torch.equal(entry.tensor, rectangle(wholes[entry.name], entry)), (entry.name, entry.offset)


def small(value: float = 1) -> list[Entry]:
    """Entries of a small checkpoint."""
    return [
        Entry("actor/master/a.weight", (6, 5), (0, 0), torch.full((6, 5), float(value)), True),
        Entry("critic/exp_avg/b.weight", (7,), (0,), torch.full((7,), -float(value)), True),
    ]


@pytest.fixture
def alone() -> Mesh:
    return build_mesh()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Iterator[list[Path]]:
    """One checkpoint of each layout, written by one process: the pieces of flat buffers differ by rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BUCKET_ELEMENTS", 700)  # several buckets, also of one parameter
        mesh, root = build_mesh(), tmp_path_factory.mktemp("layouts")
        yield [
            save(root, step, fill(entries_of_layout(layout)), {"step": step}, mesh, keep=99, assets={})
            for step, layout in enumerate(LAYOUTS)
        ]


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_every_layout_loads_from_every_other(saved, target, alone):
    entries = entries_of_layout(target)
    for step, path in enumerate(saved):
        assert_loaded(path, entries, alone, {"step": step})


def rank_saves(rank: int, world: int, root: Path, layout: Layout) -> tuple[str, str]:
    mesh = layout.mesh()
    path = save(root, 3, fill(entries_of(mesh)), {"rank": rank}, mesh, keep=1, assets={"a.txt": Path(__file__)})
    return str(path), str(latest(root, mesh))


def rank_loads(rank: int, world: int, path: Path, layout: Layout) -> None:
    mesh = layout.mesh()
    assert_loaded(path, entries_of(mesh), mesh, {"rank": 0})  # the state is rank 0's


def test_ranks_save_and_load_in_other_layouts(tmp_path):
    results = run_ranks(rank_saves, 4, tmp_path, Layout(tp=2, dp=2, ep=2))
    assert results == [(str(tmp_path / "step_3"),) * 2] * 4
    assert {f"actor.master.{rank:05d}.safetensors" for rank in range(4)} <= set(names(tmp_path / "step_3"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "step_3", check=True)
    for layout in (Layout(pp=4), Layout(dp=3)):
        run_ranks(rank_loads, layout.world, tmp_path / "step_3", layout)


def rank_fails(rank: int, world: int, root: Path, broken: int) -> tuple[str, str]:
    """The errors of a save in which one rank cannot write files above 1 kB, and of a load of a missing tensor there."""
    mesh = build_mesh(tp=2)
    entries = fill(entries_of(mesh))
    path = save(root, 1, entries, {"rank": 0}, mesh, keep=1, assets={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == broken:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(OSError) as unsaved:
        save(root, 2, entries, {}, mesh, keep=1, assets={})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if rank == broken:
        entries[0] = dataclasses.replace(entries[0], name="actor/master/none")
    with pytest.raises(ValueError) as unloaded:
        load(path, entries, mesh)
    return str(unsaved.value), str(unloaded.value)


@pytest.mark.parametrize("broken", [0, 1])
def test_failure_of_one_rank_raises_on_all(tmp_path, broken):
    first, second = run_ranks(rank_fails, 2, tmp_path, broken)
    prefix = "rank 1: " if broken else ""
    assert first == second
    assert f"step_2: {prefix}[Errno 27] File too large" in first[0]
    assert f"{prefix}no tensor actor/master/none" in first[1]
    assert names(tmp_path) == ["step_1"]
    run_ranks(rank_loads, 2, tmp_path / "step_1", Layout(pp=2))


def test_newest_checkpoints_are_kept_and_later_ones_renamed(tmp_path, alone):
    for step in (9, 10, 20, 100):
        save(tmp_path, step, small(step), {}, alone, keep=2, assets={})
    assert names(tmp_path) == ["step_100", "step_20"]
    for value in (1.0, 2.0):  # a step that is saved again replaces the first
        path = save(tmp_path, 15, small(value), {}, alone, keep=1, assets={})
    assert names(tmp_path) == ["abandoned_step_100", "abandoned_step_20", "step_15"]
    assert latest(tmp_path, alone).name == "step_15"
    assert Reader(path).read("actor/master/a.weight").eq(2).all()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


FILES = ["actor.master.00000.safetensors", "index.json", "state.json", "assets/actor/config.json", "SHA256SUMS"]


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint_is_skipped(tmp_path, alone, capsys, file, damage):
    source = {"actor/config.json": Path(__file__)}
    for step in (1, 2):
        save(tmp_path, step, small(step), {}, alone, keep=2, assets=source)
    assert latest(tmp_path, alone).name == "step_2" and capsys.readouterr().err == ""
    damage(tmp_path / "step_2" / file)
    assert latest(tmp_path, alone).name == "step_1"
    error = capsys.readouterr().err
    assert "step_2" in error and (file in error or (file, damage) == ("SHA256SUMS", flip))
    if file in FILES[:3]:
        entries = small(5.0)
        with pytest.raises(ValueError, match=f"{file} (is missing|does not match its checksum)"):
            load(tmp_path / "step_2", entries, alone)
        assert entries[0].tensor.eq(5).all() and entries[1].tensor.eq(-5).all()
    damage(tmp_path / "step_1" / file)
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        latest(tmp_path, alone)


def test_files_that_nothing_asks_for_are_not_read(tmp_path, alone):
    path = save(tmp_path, 1, small(), {}, alone, keep=1, assets={})
    flip(path / "critic.exp_avg.00000.safetensors")
    load(path, [entry := small(5.0)[0]], alone)
    assert entry.tensor.eq(1).all() and Reader(path).read(entry.name).eq(1).all()
    with pytest.raises(ValueError, match=r"critic\.exp_avg\.00000\.safetensors does not match"):
        Reader(path).read("critic/exp_avg/b.weight")


def test_invalid_values_are_refused(tmp_path, alone):
    path = save(tmp_path, 1, small(), {}, alone, keep=1, assets={})
    entry = small()[0]
    wrong = dataclasses.replace(entry, global_shape=(6, 6))
    for root in (path, tmp_path / "none"):
        with pytest.raises(ValueError, match="no checkpoint here"):
            latest(root, alone)
    for folder, entries, message in (
        (tmp_path / "step_7", [entry], "step_7"),
        (path, [dataclasses.replace(entry, name=f"w{i}") for i in range(5)], "w0, w1, w2 and 2 more"),
        (path, [wrong], r"actor/master/a.weight has shape \[6, 5\], expected \[6, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, entries, alone)
    for change, error, message in (
        ({"entries": [wrong]}, ValueError, "30 of 36"),
        ({"assets": {"x": Path("/no such asset")}}, OSError, "no such asset"),
        ({"keep": 0}, ValueError, "keep=0"),
        ({"state": {"rng": (1, 2)}}, ValueError, r"state\.rng .*tuple"),  # JSON would change it
        ({"state": {"a": [0, {3: "x"}]}}, ValueError, r"state\.a\[1\] .*3"),
    ):
        arguments: Any = {"entries": small(), "state": {}, "keep": 1, "assets": {}} | change
        with pytest.raises(error, match=message):
            save(tmp_path, 2, mesh=alone, **arguments)
    assert names(tmp_path) == ["step_1"]


SAVER = """
import sys, torch
from pathlib import Path
from typing import Any
from trialign.engine.parallel.shard import Entry
from trialign.engine.storage.checkpoint import save
from trialign.engine.mesh import build_mesh
mesh, root = build_mesh(), Path(sys.argv[1])
for step in range(1, 1000):
    whole = torch.full((1000, 2000), float(step))
    kinds = [Entry(f"actor/{kind}/w", (1000, 2000), (0, 0), whole, True) for kind in "abcd"]
    save(root, step, kinds, {"step": step}, mesh, keep=2, assets={})
    print(step, flush=True)
"""


def test_killed_saver_leaves_an_intact_checkpoint(tmp_path, alone):
    """SIGKILL at several moments of a saving process: the last reported save, or the next, is intact."""
    halfway = False
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        time.sleep(0.03 + 0.023 * attempt)
        process.send_signal(signal.SIGKILL)
        reported = [1, *map(int, process.communicate()[0].split())][-1]
        halfway |= any(name.startswith(".") for name in names(tmp_path))
        path = latest(tmp_path, alone)
        wholes = [Entry(f"actor/{kind}/w", (1000, 2000), (0, 0), torch.zeros(1000, 2000), True) for kind in "abcd"]
        step = load(path, wholes, alone)["step"]
        assert reported <= step <= reported + 1 and path.name == f"step_{step}"
        assert all(entry.tensor.eq(step).all() for entry in wholes)
        save(tmp_path, step + 1, small(), {}, alone, keep=1, assets={})  # deletes the leftovers
        assert names(tmp_path) == [f"step_{step + 1}"]
        shutil.rmtree(tmp_path / f"step_{step + 1}")
    assert halfway, "no kill fell into a save"


def test_files_have_the_documented_format(tmp_path, alone):
    state = {"none": None, "list": [1, [2.5, "é"], {}], "float": 0.1 + 0.2, "big": 2**70, "nested": {"flag": True}}
    path = save(tmp_path, 4, small(), state, alone, keep=1, assets={"actor/config.json": Path(__file__)})
    index = json.loads((path / "index.json").read_text())
    assert index["step"] == 4
    assert index["tensors"]["critic/exp_avg/b.weight"] == {
        "shape": [7],
        "rectangles": [["critic.exp_avg.00000.safetensors", "b.weight", [0], [7]]],
    }
    assert (path / "assets/actor/config.json").read_bytes() == Path(__file__).read_bytes()
    assert load(path, small(), alone) == state
