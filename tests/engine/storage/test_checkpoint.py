"""Checkpoints: every layout loads from every other, damage is detected, and nothing is half written."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from trialign.engine.mesh import Mesh, build_mesh, mesh_as
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel import data
from trialign.engine.parallel.shard import Entry
from trialign.engine.storage.checkpoint import Reader, latest, load, save
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.hf.table import hf_name, hf_shapes

CONFIG = ModelConfig(
    "LlamaForCausalLM", vocab_size=25, hidden_size=12, ffn_size=20, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=6, rope_theta=1e4, norm_eps=1e-5, max_positions=64, tie_embeddings=True,
)  # fmt: skip
ROLES: list[tuple[str, HeadKind]] = [("actor", "lm"), ("critic", "score")]
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
LAYOUTS = [(1, 1, 1), (1, 1, 3), (2, 2, 2), (2, 3, 1), (1, 4, 5), (3, 1, 2)]  # tp, pp, dp


def entries_of(mesh: Mesh) -> list[Entry]:
    """Entries of one rank's actor and critic."""
    entries = []
    for role, head in ROLES:
        model = Decoder(CONFIG, mesh, dtype=torch.float32, head=head)
        adam = ShardedAdamW(model, mesh, tied=model.tied_parameter(), ema_decay=0.9)
        entries += adam.entries(role, partial(hf_name, config=CONFIG, head=head))
    return entries


def entries_of_layout(tp: int, pp: int, dp: int) -> list[Entry]:
    """Entries of all ranks of a layout."""
    return [e for rank in range(tp * pp * dp) for e in entries_of(mesh_as(rank, tp=tp, pp=pp, dp=dp))]


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
def saved(tmp_path_factory) -> Iterator[dict[tuple[int, int, int], Path]]:
    """One checkpoint of each layout, written by one process: the pieces of flat buffers differ by rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BUCKET_ELEMENTS", 700)  # several buckets, also of one parameter
        mesh, root, paths = build_mesh(), tmp_path_factory.mktemp("layouts"), {}
        for step, layout in enumerate(LAYOUTS):
            paths[layout] = save(root, step, fill(entries_of_layout(*layout)), {"step": step}, mesh, keep=99, assets={})
        yield paths


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_every_layout_loads_from_every_other(saved, target: tuple[int, int, int], alone):
    entries = entries_of_layout(*target)
    for step, path in enumerate(saved.values()):
        assert_loaded(path, entries, alone, {"step": step})


def rank_saves(rank: int, world: int, root: Path, tp: int, pp: int) -> tuple[str, str]:
    mesh = build_mesh(tp=tp, pp=pp)
    path = save(root, 3, fill(entries_of(mesh)), {"rank": rank}, mesh, keep=1, assets={"a.txt": Path(__file__)})
    return str(path), str(latest(root, mesh))


def rank_loads(rank: int, world: int, path: Path, tp: int, pp: int) -> None:
    mesh = build_mesh(tp=tp, pp=pp)
    assert_loaded(path, entries_of(mesh), mesh, {"rank": 0})  # the state is rank 0's


def test_ranks_save_and_load_in_other_layouts(tmp_path):
    """tp=2 x dp=2 to pp=4 and to dp=3."""
    results = run_ranks(rank_saves, 4, tmp_path, 2, 1)
    assert results == [(str(tmp_path / "step_3"),) * 2] * 4
    assert {f"actor.master.{rank:05d}.safetensors" for rank in range(4)} <= set(names(tmp_path / "step_3"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "step_3", check=True)
    for world, pp in ((4, 4), (3, 1)):
        run_ranks(rank_loads, world, tmp_path / "step_3", 1, pp)


def rank_fails(rank: int, world: int, root: Path, broken: int) -> str:
    """One rank cannot write files above 1 kB; all ranks must raise."""
    mesh = build_mesh(tp=2)
    entries = fill(entries_of(mesh))
    save(root, 1, entries, {"rank": 0}, mesh, keep=1, assets={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == broken:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save(root, 2, entries, {}, mesh, keep=1, assets={})
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("saved")


@pytest.mark.parametrize("broken", [0, 1])
def test_failed_save_raises_on_all_ranks(tmp_path, broken):
    messages = run_ranks(rank_fails, 2, tmp_path, broken)
    assert messages[0] == messages[1]
    assert f"step_2: {'rank 1: ' if broken else ''}[Errno 27] File too large" in messages[0]
    assert names(tmp_path) == ["step_1"]
    run_ranks(rank_loads, 2, tmp_path / "step_1", 1, 2)


def rank_misses(rank: int, world: int, path: Path) -> None:
    """Rank 1 asks for a missing tensor; rank 0 must raise too."""
    mesh = build_mesh(tp=2)
    entries = entries_of(mesh)
    if rank == 1:
        entries[0] = dataclasses.replace(entries[0], name="actor/master/none")
    with pytest.raises(ValueError, match="rank 1: no tensor actor/master/none"):
        load(path, entries, mesh)


def test_failed_load_raises_on_all_ranks(saved):
    run_ranks(rank_misses, 2, saved[1, 1, 1])


@pytest.mark.parametrize(
    ("state", "parts"),
    [({"rng": (1, 2)}, r"state\.rng .*tuple"), ({"a": [0, {3: "x"}]}, r"state\.a\[1\] .*3")],
)
def test_state_changed_by_json_is_refused(tmp_path, alone, state, parts):
    with pytest.raises(ValueError, match=parts):
        save(tmp_path, 1, small(), state, alone, keep=1, assets={})
    assert names(tmp_path) == []


def test_newest_checkpoints_are_kept(tmp_path, alone):
    for step in (9, 10, 11, 100):
        save(tmp_path, step, small(step), {}, alone, keep=2, assets={})
    assert names(tmp_path) == ["step_100", "step_11"]
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 101, small(), {}, alone, keep=0, assets={})


def test_going_back_renames_later_checkpoints(tmp_path, alone):
    """A step that is saved again replaces the first."""
    for step in (10, 20, 30):
        save(tmp_path, step, small(step), {}, alone, keep=3, assets={})
    for value in (1.0, 2.0):
        path = save(tmp_path, 15, small(value), {}, alone, keep=1, assets={})
    assert names(tmp_path) == ["abandoned_step_20", "abandoned_step_30", "step_15"]
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


def test_unread_files_are_not_checked(tmp_path, alone):
    path = save(tmp_path, 1, small(), {}, alone, keep=1, assets={})
    flip(path / "critic.exp_avg.00000.safetensors")
    load(path, small()[:1], alone)
    reader = Reader(path)
    assert reader.read("actor/master/a.weight").eq(1).all()
    with pytest.raises(ValueError, match=r"critic\.exp_avg\.00000\.safetensors does not match"):
        reader.read("critic/exp_avg/b.weight")


def test_missing_checkpoints_are_refused(tmp_path, alone):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="no checkpoint here"):
            latest(root, alone)
    with pytest.raises(ValueError, match="step_7"):
        load(tmp_path / "step_7", small(), alone)


def test_wrong_entries_are_refused(tmp_path, alone):
    path = save(tmp_path, 1, small(), {}, alone, keep=1, assets={})
    entry = small()[0]
    with pytest.raises(ValueError, match="w0, w1, w2 and 2 more"):
        load(path, [dataclasses.replace(entry, name=f"w{i}") for i in range(5)], alone)
    with pytest.raises(ValueError, match=r"actor/master/a.weight has shape \[6, 5\], expected \[6, 6\]"):
        load(path, [dataclasses.replace(entry, global_shape=(6, 6))], alone)
    with pytest.raises(ValueError, match="30 of 36"):
        save(tmp_path, 2, [dataclasses.replace(entry, global_shape=(6, 6))], {}, alone, keep=1, assets={})
    with pytest.raises(OSError, match="no such asset"):
        save(tmp_path, 2, [entry], {}, alone, keep=1, assets={"x": Path("/no such asset")})
    assert names(tmp_path) == ["step_1"]


SAVER = """
import sys, torch
from pathlib import Path
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
    halfway = 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        time.sleep(0.03 + 0.023 * attempt)
        process.send_signal(signal.SIGKILL)
        reported = [1, *map(int, process.communicate()[0].split())][-1]
        left = names(tmp_path)
        halfway += any(name.startswith(".") for name in left)
        path = latest(tmp_path, alone)
        step = int(path.name.removeprefix("step_"))
        assert reported <= step <= reported + 1, left
        for kind in "abcd":
            whole = torch.zeros(1000, 2000)
            assert load(path, [Entry(f"actor/{kind}/w", (1000, 2000), (0, 0), whole, True)], alone) == {"step": step}
            assert whole.eq(step).all()
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
    assert os.stat(path / "actor.master.00000.safetensors").st_mode & 0o444 == 0o444
    assert load(path, small(), alone) == state
