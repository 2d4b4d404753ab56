"""Round trips of every family's weights, each element with its own number, through all layouts bit for bit."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from families import ALL, OWN, SPARSE, values_of, write_folder
from harness import run_ranks
from safetensors.torch import load_file
from tiny import weight_pieces
from torch import Tensor
from trialign.engine.mesh import build_mesh, mesh_as
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.shard import shard_of
from trialign.engine.storage.checkpoint import save
from trialign.models.config import HeadKind, ModelConfig, check_layout
from trialign.models.decoder import Decoder
from trialign.models.families.registry import from_hf_dict, head_of, read_config, to_hf_dict
from trialign.models.folder import assets
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.save import export_hf
from trialign.models.hf.table import hf_name, hf_shapes, part_shapes

LAYOUTS = [(tp, pp, dp, 1) for tp in (1, 2, 4) for pp, dp in ((1, 1), (2, 2))] + [(2, 4, 1, 1)]  # tp, pp, dp, ep
EXPERT_LAYOUTS = [(tp, pp, dp, 2) for tp in (1, 2, 4) for pp, dp in ((1, 4), (2, 2))]


def numbered(config: ModelConfig, head: HeadKind) -> dict[str, Tensor]:
    """Tensors with elements 1, 2, 3, ..., exact in fp32."""
    tensors, begin = {}, 1
    for name, shape in hf_shapes(config, head).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(begin, begin + count, dtype=torch.float32).view(shape)
        begin += count
    assert begin < 1 << 24
    return tensors


def layouts(name: str) -> list[tuple[int, int, int, int]]:
    found = LAYOUTS if name not in SPARSE else EXPERT_LAYOUTS
    widest = 3 if name in OWN else 4  # of six heads
    return [(min(tp, widest), pp, dp, ep) for tp, pp, dp, ep in found]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    configs = {name: from_hf_dict(values_of(name)) for name in ALL}
    return {name: write_folder(root / name, values_of(name), numbered(configs[name], "lm")) for name in ALL}


def gathered(folder: Path, head: HeadKind, layout: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Whole parts from the models of all ranks of a layout; each element on as many ranks as its shard gives."""
    tp, pp, dp, ep = layout
    config = read_config(folder)
    shapes = part_shapes(config, head)
    parts, seen = ({part: torch.zeros(shape) for part, shape in shapes.items()} for _ in range(2))
    expected: dict[str, int] = {}
    for rank in range(tp * pp * dp):
        model = Decoder(config, mesh_as(rank, tp=tp, pp=pp, dp=dp, ep=ep), dtype=torch.float32, head=head)
        load_hf(model, folder)
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            for piece in shard.pieces:
                part = hf_name(name, piece.part, config, head)
                tied = pp > 1 and config.tie_embeddings and head == "lm" and name in ("embedding.weight", "head.weight")
                copies = (dp // ep if shard.experts else dp) * (1 if shard.axis == "tp" else tp)
                expected[part] = 2 * copies if tied else copies
        for part, piece, view in weight_pieces(model):
            place = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            assert piece.global_shape == shapes[part]
            parts[part][place] = view
            seen[part][place] += 1
    for part, counts in seen.items():
        assert counts.eq(expected[part]).all(), (part, layout)
    return parts


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", ALL)
def test_round_trip_over_layouts_is_exact(folders, name, head, tmp_path):
    config, folder = read_config(folders[name]), folders[name]
    source = numbered(config, head)
    if head == "score":
        folder = write_folder(tmp_path / "score", to_hf_dict(config, "score"), source)
    for layout in layouts(name) if head == "lm" else [(2, 2, 1, 1)]:
        check_layout(config, layout[0], layout[1])
        parts = gathered(folder, head, layout)
        out = tmp_path / "-".join(map(str, layout))
        export_hf(out, config, parts, folder, head=head, dtype=torch.float32)
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[tensor], source[tensor]) for tensor in source), layout
        assert head_of(read_config(out)) == head


def corruptions(source: dict[str, Tensor], name: str) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Fault -> (a folder's tensors, the message)."""
    rest = {key: tensor for key, tensor in source.items() if key != name}
    tensor, shape = source[name], list(source[name].shape)
    return {
        "missing": (rest, f"missing tensors: {name}"),
        "extra": (source | {f"{name}.scales": tensor.clone()}, f"unknown to the model: {name}.scales"),
        "renamed": (rest | {f"x.{name}": tensor}, f"missing tensors: {name}"),
        "shape": (rest | {name: tensor[:-1]}, f"{name} has shape .*expected {shape}".replace("[", r"\[")),
    }


@pytest.mark.parametrize("name", ALL)
def test_corrupt_folders_are_refused_by_tensor(folders, name, tmp_path):
    """For every row of the table: the last layer's tensors, and those outside the layers."""
    config, source = read_config(folders[name]), load_file(folders[name] / "model.safetensors")
    model = Decoder(config, build_mesh(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(-7.0)
    last = f".{config.num_layers - 1}."
    tensors = [t for t in source if (last in t or ".0." not in t and ".1." not in t and ".2." not in t)]
    assert len(tensors) >= 9
    for i, tensor in enumerate(tensors):
        cases = corruptions(source, tensor)
        if i:  # one fault for each tensor, all faults for the first
            cases = dict([list(cases.items())[i % len(cases)]])
        for fault, (changed, message) in cases.items():
            folder = write_folder(tmp_path / f"{i}-{fault}", values_of(name), changed)
            with pytest.raises(ValueError, match=message):
                load_hf(model, folder)
    folder = write_folder(tmp_path / "cut", values_of(name), source)
    os.truncate(folder / "model.safetensors", os.path.getsize(folder / "model.safetensors") - 4)
    with pytest.raises(ValueError, match="model.safetensors: corrupt or truncated"):
        load_hf(model, folder)
    assert all(parameter.eq(-7).all() for parameter in model.parameters())


def rank_saves(rank: int, world: int, folders: dict[str, Path], root: Path) -> None:
    """Loads, copies into the optimizer's masters and saves, as a run does."""
    for name, folder in folders.items():
        sparse = name in SPARSE
        mesh = build_mesh(tp=2, ep=2) if sparse else build_mesh(tp=2, pp=2)
        config = read_config(folder)
        model = Decoder(config, mesh, dtype=torch.float32)
        load_hf(model, folder)
        adam = ShardedAdamW(model, mesh, tied=model.tied_parameter())
        entries = adam.entries("actor", partial(hf_name, config=config, head="lm"))
        save(root / name, 1, entries, {}, mesh, keep=1, assets=assets(folder, "actor/"))


def test_checkpoints_of_ranks_export_bit_for_bit(folders, tmp_path):
    chosen = ("llama", "mistral-full", "qwen", "baichuan2-13b", "mixtral", "qwen2-moe")
    run_ranks(rank_saves, 4, {name: folders[name] for name in chosen}, tmp_path)
    for name in chosen:
        export_checkpoint(tmp_path / name / "step_1", tmp_path / f"{name}-out", dtype=torch.float32)
        exported, source = (load_file(f / "model.safetensors") for f in (tmp_path / f"{name}-out", folders[name]))
        assert exported.keys() == source.keys() and all(torch.equal(exported[t], source[t]) for t in source), name
