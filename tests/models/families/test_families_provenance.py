"""Round trips of every family's weights, each element with its own number, through all layouts bit for bit."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from families import ALL, SPARSE, same_bits, tensors_of, values_of, write_folder
from harness import run_ranks
from layouts import Layout
from peft_case import build
from safetensors.torch import load_file
from tiny import weight_pieces
from torch import Tensor
from trialign.engine.mesh import build_mesh, mesh_as
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.storage.checkpoint import save
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.families.registry import from_hf_dict, head_of, read_config, to_hf_dict
from trialign.models.folder import assets
from trialign.models.hf.convert import ExportRole, export_checkpoint, import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.save import export_hf
from trialign.models.hf.table import hf_name, hf_shapes, part_shapes

LAYOUTS = (Layout(), Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2), Layout(tp=2, pp=4))
EXPERT_LAYOUTS = (Layout(dp=4, ep=2), Layout(tp=4, dp=2, ep=2), Layout(tp=2, pp=2, dp=2, ep=2))


def numbered(config: ModelConfig, head: HeadKind) -> dict[str, Tensor]:
    """Tensors with elements 1, 2, 3, ..., exact in fp32."""
    tensors, begin = {}, 1
    for name, shape in hf_shapes(config, head).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(begin, begin + count, dtype=torch.float32).view(shape)
        begin += count
    assert begin < 1 << 24
    return tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    values = {name: values_of(name) for name in ALL}
    return {name: write_folder(root / name, values[name], numbered(from_hf_dict(values[name]), "lm")) for name in ALL}


def gathered(folder: Path, head: HeadKind, layout: Layout) -> dict[str, Tensor]:
    """Whole parts from the models of all ranks of a layout, which agree where several hold an element."""
    config = read_config(folder)
    parts = {part: torch.full(shape, torch.nan) for part, shape in part_shapes(config, head).items()}
    for rank in range(layout.world):
        model = build(folder, mesh_as(rank, **layout._asdict()), head=head)
        for part, piece, view in weight_pieces(model):
            held = parts[part][tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))]
            assert (held.isnan() | (held == view)).all() and piece.global_shape == parts[part].shape, (part, layout)
            held.copy_(view)
    return parts


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", ALL)
def test_round_trip_over_layouts_is_exact(folders, name, head, tmp_path):
    """From the folder to models and back, and through an imported checkpoint."""
    config, folder = read_config(folders[name]), folders[name]
    source = numbered(config, head)
    if head == "score":
        folder = write_folder(tmp_path / "score", to_hf_dict(config, "score"), source)
    layouts = EXPERT_LAYOUTS if name in SPARSE else LAYOUTS
    for layout in layouts if head == "lm" else [Layout(tp=2, pp=2)]:
        parts = gathered(folder, head, layout)
        out = tmp_path / str(layout)
        export_hf(out, config, parts, folder, head=head, dtype=torch.float32)
        assert same_bits(tensors_of(out), source), layout
        assert head_of(read_config(out)) == head
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "exported"
    role: ExportRole = "actor" if head == "lm" else "critic"
    assert import_checkpoint(folder, checkpoint, tp=2, pp=3)[1] == role
    export_checkpoint(checkpoint, out, role=role, dtype=torch.float32)
    assert same_bits(tensors_of(out), source)
    export_hf(tmp_path / "loaded", config, gathered(checkpoint, head, layout), folder, head=head, dtype=torch.float32)
    assert same_bits(tensors_of(tmp_path / "loaded"), source)


@pytest.mark.parametrize("name", ALL)
def test_corrupt_folders_are_refused_by_tensor(folders, name, tmp_path):
    """For every row of the table: the last layer's tensors, and those outside the layers; one of four faults each."""
    config, source = read_config(folders[name]), load_file(folders[name] / "model.safetensors")
    model = Decoder(config, build_mesh(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(-7.0)
    others = tuple(f".{i}." for i in range(config.num_layers - 1))
    tensors = [t for t in source if f".{config.num_layers - 1}." in t or not any(i in t for i in others)]
    assert len(tensors) >= 9
    for i, tensor in enumerate(tensors):
        rest = {key: value for key, value in source.items() if key != tensor}
        shape = re.escape(str(list(source[tensor].shape)))
        changed, message = (
            (rest, f"missing tensors: {tensor}"),
            (source | {f"{tensor}.scales": source[tensor].clone()}, f"unknown to the model: {tensor}.scales"),
            (rest | {f"x.{tensor}": source[tensor]}, f"missing tensors: {tensor}"),
            (rest | {tensor: source[tensor][:-1]}, f"{tensor} has shape .*expected {shape}"),
        )[i % 4]
        folder = write_folder(tmp_path / str(i), values_of(name), changed)
        with pytest.raises(ValueError, match=message):
            load_hf(model, folder)
    assert all(parameter.eq(-7).all() for parameter in model.parameters())


def rank_saves(rank: int, world: int, folders: dict[str, Path], root: Path) -> None:
    """Loads, copies into the optimizer's masters and saves, as a run does."""
    for name, folder in folders.items():
        mesh = build_mesh(tp=2, ep=2) if name in SPARSE else build_mesh(tp=2, pp=2)
        model = build(folder, mesh)
        adam = ShardedAdamW(model, mesh, tied=model.tied_parameter())
        entries = adam.entries("actor", partial(hf_name, config=model.config, head="lm"))
        save(root / name, 1, entries, {}, mesh, keep=1, assets=assets(folder, "actor/"))


def test_checkpoints_of_ranks_export_bit_for_bit(folders, tmp_path):
    chosen = ("llama", "mistral-full", "qwen", "baichuan2-13b", "mixtral", "qwen2-moe")
    run_ranks(rank_saves, 4, {name: folders[name] for name in chosen}, tmp_path)
    for name in chosen:
        export_checkpoint(tmp_path / name / "step_1", tmp_path / f"{name}-out", dtype=torch.float32)
        assert same_bits(tensors_of(tmp_path / f"{name}-out"), tensors_of(folders[name])), name
