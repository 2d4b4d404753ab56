"""Export to Hugging Face format: folders that transformers loads, the export script, the demo's model."""

import json
import os
import runpy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import same_bits, tensors_of
from harness import run_ranks
from safetensors.torch import load_file
from scripts import launch, succeed
from tiny import tiny_llama, tiny_tokenizer, weight_pieces
from torch import Tensor
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import build_decoder, read_shape
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.storage.checkpoint import save
from trialign.models.config import HeadKind
from trialign.models.decoder import Decoder
from trialign.models.families.registry import head_of, read_config
from trialign.models.folder import assets
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.lazy import LazyState
from trialign.models.hf.load import load_hf
from trialign.models.hf.save import export_hf
from trialign.models.hf.table import hf_name


def assert_loads(folder: Path) -> Any:
    """transformers loads the folder without missing, unexpected or mismatched tensors."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    score = "score.weight" in tensors_of(folder)
    auto: Any = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models, with the other files of a real one."""
    root = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {"tied": {}, "untied": {"tied": False}, "score": {"score": True}}
    folders = {kind: tiny_tokenizer(tiny_llama(root / kind, **options)) for kind, options in kinds.items()}
    for folder in folders.values():
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folders


@pytest.mark.parametrize("shard_bytes", [5 << 30, 20_000, 1])
@pytest.mark.parametrize("kind", ["tied", "untied", "score"])
def test_transformers_loads_exported_folders(folders, tmp_path, kind, shard_bytes):
    source, config, out = tensors_of(folders[kind]), read_config(folders[kind]), tmp_path / "out"
    reverse = dict(reversed(source.items()))  # in any order
    options = {"head": head_of(config), "dtype": torch.float32, "shard_bytes": shard_bytes}
    export_hf(out, config, reverse, folders[kind], **options)
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(assert_loads(out)(ids).logits, assert_loads(folders[kind])(ids).logits)
    assert same_bits(tensors_of(out), source)
    files = sorted(out.glob("*.safetensors"))
    limit = max(shard_bytes, max(t.nbytes for t in source.values()))
    assert all(sum(t.nbytes for t in load_file(file).values()) <= limit for file in files)
    assert (len(files) == 1) == (files[0].name == "model.safetensors") == (shard_bytes > 1 << 30)
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_exports_leave_nothing(folders, tmp_path):
    config, source = read_config(folders["tied"]), tensors_of(folders["tied"])
    last = list(source)[-1]

    def read(name: str) -> Tensor:
        if name == last:
            raise OSError(28, "No space left on device")
        return source[name]

    for tensors, message in (
        ({name: t for name, t in source.items() if name != last}, f"missing tensors: {last}"),
        (source | {last: source[last][:1]}, rf"{last} \[1.*\]: expected \["),
        (source | {"lm_head.weight": source[last]}, "tensors unknown to the model: lm_head.weight"),
        (LazyState(source, read), "No space left"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            export_hf(tmp_path / "out", config, tensors, folders["tied"], shard_bytes=20_000)
        assert not list(tmp_path.iterdir())


def test_assets_are_the_files_a_model_is_loaded_with(folders, tmp_path):
    folder = Path(shutil.copytree(folders["tied"], tmp_path / "copy"))
    for other in ("trainer_state.json", "adapter_config.json", "model.safetensors.index.json", "notes.txt"):
        (folder / other).write_text("{}")
    more = folder / "additional_chat_templates"
    (more / "deep.jinja").mkdir(parents=True)
    (more / "tool_use.jinja").write_text("{{ tools }}")
    (more / "notes.txt").write_text("other")
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names.add("additional_chat_templates/tool_use.jinja")
    assert assets(folder, "actor/") == {f"actor/{name}": folder / name for name in names}
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert assets(tmp_path / "out").keys() == names
    assert (tmp_path / "out" / more.name / "tool_use.jinja").read_text() == "{{ tools }}"


def rank_saves(rank: int, world: int, root: Path, actor: Path, critic: Path) -> None:
    """A run's checkpoint: masters are the folders' weights, the average three times those."""
    mesh, entries = build_mesh(tp=2, dp=2), []
    roles: list[tuple[str, Path, HeadKind]] = [("actor", actor, "lm"), ("critic", critic, "score")]
    for role, folder, head in roles:
        config = read_config(folder)
        model = Decoder(config, mesh, dtype=torch.float32, head=head)
        load_hf(model, folder, new_head="normal")
        adam = ShardedAdamW(model, mesh, tied=model.tied_parameter(), ema_decay=0.5 if role == "actor" else 0.0)
        entries += adam.entries(role, partial(hf_name, config=config, head=head))
    for entry in entries:
        if "/ema/" in entry.name:
            entry.tensor.mul_(3)
    save(root, 7, entries, {}, mesh, keep=1, assets=assets(actor, "actor/") | assets(critic, "critic/"))


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(rank_saves, 4, root, folders["tied"], folders["untied"])
    return root / "step_7"


def test_script_exports_actor_critic_and_average(folders, checkpoint, tmp_path):
    export = partial(succeed, "export_hf", "--checkpoint", checkpoint, "--output")
    actor, critic = tensors_of(folders["tied"]), tensors_of(folders["untied"])
    export(tmp_path / "actor", "--dtype", "float32")
    assert same_bits(tensors_of(tmp_path / "actor"), actor)
    assert_loads(tmp_path / "actor")
    for name, path in assets(folders["tied"]).items():
        assert name == "config.json" or (tmp_path / "actor" / name).read_bytes() == path.read_bytes()

    export(tmp_path / "critic", "--role", "critic", "--dtype", "float32")
    got = tensors_of(tmp_path / "critic")
    score = got.pop("score.weight")
    assert score.shape == (1, 32) and score.any()
    assert same_bits(got, {name: t for name, t in critic.items() if name != "lm_head.weight"})
    assert assert_loads(tmp_path / "critic").config.num_labels == 1

    export(tmp_path / "ema", "--weights", "ema", "--dtype", "bfloat16")
    assert same_bits(tensors_of(tmp_path / "ema"), {name: (t * 3).bfloat16() for name, t in actor.items()})
    export_checkpoint(checkpoint, tmp_path / "own", weights="ema")  # config.json has float32
    assert same_bits(tensors_of(tmp_path / "own"), {name: t * 3 for name, t in actor.items()})


def test_reward_models_checkpoint_loads_imports_and_exports(folders, tmp_path):
    """Its config.json is that of the language model it was initialized from."""
    mesh, config = build_mesh(), read_config(folders["tied"])
    model = Decoder(config, mesh, dtype=torch.float32, head="score")
    load_hf(model, folders["tied"], new_head="normal")
    entries = ShardedAdamW(model, mesh).entries("reward", partial(hf_name, config=config, head="score"))
    save(tmp_path, 3, entries, {}, mesh, keep=1, assets=assets(folders["tied"], "reward/"))
    shape = read_shape(str(tmp_path / "step_3"), ParallelConfig(), RunConfig(output=str(tmp_path / "run")))
    assert head_of(shape) == "score"
    assert import_checkpoint(tmp_path / "step_3", tmp_path / "imported")[1] == "critic"
    succeed("export_hf", "--checkpoint", tmp_path / "step_3", "--output", tmp_path / "out", "--dtype", "float32")
    expected = {name: view for name, _, view in weight_pieces(model)}
    for place in ("step_3", "imported", "out"):
        again = build_decoder(str(tmp_path / place), shape, mesh, "float32", head="score")
        assert same_bits({name: view for name, _, view in weight_pieces(again)}, expected)


def test_invalid_checkpoints_and_outputs_are_refused(checkpoint, tmp_path):
    corrupt = Path(shutil.copytree(checkpoint, tmp_path / "corrupt"))
    data = bytearray((corrupt / "actor.master.00001.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (corrupt / "actor.master.00001.safetensors").write_bytes(data)
    (corrupt / "assets" / "critic" / "config.json").write_text("{}")
    used, run_folder, out = tmp_path / "used", tmp_path / "run", tmp_path / "out"
    for folder in (used, run_folder / "checkpoints" / "step_9", run_folder / "checkpoints" / "step_10"):
        folder.mkdir(parents=True)
    (used / "file").write_text("other")
    cases: tuple[tuple[Path, Path, dict[str, Any], str], ...] = (
        (tmp_path / "none", out, {}, "none: no such checkpoint"),
        (used, out, {}, "used: no checkpoint, .*RUN/checkpoints/step_N"),
        (run_folder, out, {}, f"{run_folder}: no checkpoint, .*; {run_folder}/checkpoints/step_10 is one"),
        (checkpoint.parent, out, {}, f"{checkpoint.parent}: no checkpoint, .*; {checkpoint} is one"),
        (checkpoint, used, {}, "exists and is not an empty folder"),
        (checkpoint, out, {"role": "critic", "weights": "ema"}, "no critic/ema weights; it holds actor/ema, actor/exp"),
        (corrupt, out, {}, "actor.master.00001.safetensors does not match its checksum"),
        (corrupt, out, {"role": "critic"}, "assets/critic/config.json does not match its checksum"),
    )
    for source, target, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_checkpoint(source, target, **options)
    for source, options, message in ((corrupt, (), "export_hf: "), (checkpoint, ("--dtype", "int8"), "int8")):
        done = launch("export_hf", "--checkpoint", source, "--output", out, *options)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corrupt", "run", "used"]


def test_demo_model_reuses_whole_folders_and_refuses_others(smollm2, tmp_path, monkeypatch):
    assert "complete, reused" in succeed("demo_model", "--output", smollm2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("other")
    done = launch("demo_model", "--output", tmp_path / "other")
    assert done.returncode != 0 and "other: not a model folder (lacks config.json" in done.stderr
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    monkeypatch.syspath_prepend(ROOT / "launch")  # where Python starts the script
    incomplete = runpy.run_path(str(ROOT / "launch" / "demo_model.py"))["incomplete"]
    assert incomplete(smollm2) is None
    half = Path(shutil.copytree(smollm2, tmp_path / "half"))
    os.truncate(half / "model.safetensors", 100_000_000)
    assert "incomplete" in incomplete(half).lower()
    (half / "chat_template.jinja").unlink()
    assert incomplete(half) == "lacks chat_template.jinja"
