"""Conversion into checkpoints of any layout and back, translation to other families, pickles, and refusals."""

import errno
import json
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import OWN, same_bits, tensors_of, tiny_family, write_folder
from peft_case import build, logits, peer_logits
from safetensors.torch import load_file
from scripts import launch
from tiny import tiny_llama, weight_pieces
from trialign.engine.mesh import build_mesh
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.source import FolderSource
from trialign.models.hf.translate import translate_config


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen2-moe", "qwen", "baichuan-7b", "baichuan2-13b"])
def test_folder_to_checkpoint_and_back_is_exact(name, tmp_path):
    """Through the files of every layout; a run that starts from the checkpoint has the folder's weights."""
    folder = tiny_family(tmp_path / "folder", name)
    straight = {n: view for n, _, view in weight_pieces(build(folder, build_mesh(), None))}
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 4)):
        checkpoint, out = tmp_path / f"checkpoint{tp}{pp}", tmp_path / f"out{tp}{pp}"
        assert import_checkpoint(folder, checkpoint, tp=tp, pp=pp)[1] == "actor"
        export_checkpoint(checkpoint, out, dtype=torch.float32)
        assert same_bits(tensors_of(out), tensors_of(folder))
        assert len(list(checkpoint.glob("actor.master.*.safetensors"))) == tp * pp
        model = build(checkpoint, build_mesh(), None) if (tp, pp) == (2, 4) else None
        assert model is None or same_bits({n: view for n, _, view in weight_pieces(model)}, straight)


def test_each_ranks_weights_are_in_its_own_file(tmp_path):
    folder = tiny_llama(tmp_path / "folder", tied=False)
    import_checkpoint(folder, tmp_path / "checkpoint", tp=2, pp=3)
    last = load_file(tmp_path / "checkpoint" / "actor.master.00005.safetensors")  # stages of 1, 2 and 1 layers
    assert torch.equal(last["lm_head.weight@48,0"], tensors_of(folder)["lm_head.weight"][48:])
    assert {name.split(".")[2] for name in last if name.startswith("model.layers")} == {"3"}


def test_score_models_are_imported_as_critics(tmp_path):
    folder = tiny_llama(tmp_path / "folder", score=True)
    assert import_checkpoint(folder, tmp_path / "checkpoint", tp=2)[1] == "critic"
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", role="critic", dtype=torch.float32)
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(folder))
    model = Decoder(read_config(tmp_path / "checkpoint"), build_mesh(), dtype=torch.float32, head="score")
    load_hf(model, tmp_path / "checkpoint")
    assert model.head is not None and torch.equal(model.head.weight, tensors_of(folder)["score.weight"])


def test_dtypes_are_kept_or_converted(tmp_path):
    folder, dtypes = tiny_llama(tmp_path / "float32"), {"bfloat16": torch.bfloat16, "float16": torch.float16}
    values, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    for name, dtype in dtypes.items():
        write_folder(tmp_path / name, values, {key: t.to(dtype) for key, t in tensors.items()})
    for source, dtype, stored in (
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.bfloat16),
    ):
        checkpoint = tmp_path / f"{source}-{dtype}"
        import_checkpoint(tmp_path / source, checkpoint, dtype=dtype)
        for name, tensor in load_file(checkpoint / "actor.master.00000.safetensors").items():
            assert tensor.dtype == stored and torch.equal(tensor.bfloat16(), tensors[name].bfloat16())
    import_checkpoint(tmp_path / "float16", tmp_path / "checkpoint", tp=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")  # bit for bit, whatever the source's config.json has
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "float16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def test_invalid_sources_and_layouts_are_refused_and_leave_nothing(tmp_path):
    folder = tiny_llama(tmp_path / "folder")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "corrupt.gguf").write_bytes(b"GGUX" * 100)
    before, out = sorted(path.name for path in tmp_path.iterdir()), tmp_path / "out"
    for model, output, tp, pp, message in (
        (folder, out, 5, 1, "num_heads=4 .* tp=5"),
        (folder, out, 1, 5, "num_layers=4 .* pp=5"),
        (folder, folder, 1, 1, "exists and is not an empty folder"),
        (tmp_path / "pickle", out, 1, 1, "pytorch_model.bin; pickles are not loaded.*docs/conversion.md, Pickles"),
        (tmp_path / "none", out, 1, 1, "none: no such folder"),
        (tmp_path / "none.gguf", out, 1, 1, "none.gguf: no such file"),
        (tmp_path / "corrupt.gguf", out, 1, 1, "corrupt, or not a GGUF file"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(model, output, tp=tp, pp=pp)
    done = launch("import_hf", "--model", tmp_path / "none", "--output", out)
    assert done.returncode != 0 and "no such folder" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("exists", [True, False])
def test_symbolic_links_to_outputs_are_followed(exists, tmp_path):
    model, disk = tiny_llama(tmp_path / "model"), tmp_path / "disk"
    for name in ("checkpoint", "folder"):
        (tmp_path / name).symlink_to(disk / name)
        if exists:
            (disk / name).mkdir(parents=True)
    import_checkpoint(model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "folder")
    assert (tmp_path / "checkpoint").is_symlink() and (tmp_path / "folder").is_symlink()
    assert same_bits(tensors_of(disk / "folder"), tensors_of(model))
    assert sorted(path.name for path in disk.iterdir()) == ["checkpoint", "folder"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop: exists and is not an empty folder"):
        import_checkpoint(model, tmp_path / "loop")


def test_mount_points_are_refused_before_any_work(tmp_path, monkeypatch):
    """The kernel renames nothing onto a mount point, which os.path.ismount may miss."""
    model, mount, rename = tiny_llama(tmp_path / "model"), tmp_path / "mount", os.rename
    mount.mkdir()

    def busy(source: Any, target: Any) -> None:
        if Path(target) == mount:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(FolderSource, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="mount: .*Device or resource busy"):
        import_checkpoint(model, mount)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "mount"] and not list(mount.iterdir())
    monkeypatch.undo()
    import_checkpoint(model, mount / "in")


def test_remains_of_a_killed_conversion_are_named_and_kept(tmp_path, capsys):
    """In a container the next process may have the killed one's number."""
    model = tiny_llama(tmp_path / "model")
    remains = [tmp_path / f".{name}.{os.getpid()}.unfinished" for name in ("checkpoint", "folder")]
    for folder in remains:
        folder.mkdir()
        (folder / "file").write_text("of another process")
    capsys.readouterr()
    import_checkpoint(model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "folder")
    assert all((folder / "file").is_file() for folder in remains)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(folder) in line for folder, line in zip(remains, lines, strict=True)), lines
    assert sorted(tmp_path.glob(".*")) == remains
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == stat.S_IMODE(model.stat().st_mode)


def test_documented_conversion_of_pickles(tmp_path):
    """The code of docs/conversion.md on two files with a tied head under both names; it runs no pickled code."""
    page = (ROOT / "docs" / "conversion.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    folder = tiny_llama(tmp_path / "folder")
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        part = {name: tensors[name] for name in some}
        if "model.embed_tokens.weight" in part:
            part["lm_head.weight"] = part["model.embed_tokens.weight"]
        torch.save(part, folder / f"pytorch_model-0000{number}-of-00002.bin")
    code = lines.replace('Path("folder")', f"Path({str(folder)!r})")
    exec(code, {})
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32)
    assert same_bits(tensors_of(tmp_path / "out"), tensors)
    torch.save({"weight": Path("a")}, folder / "pytorch_model-00000-of-00002.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        exec(code, {})


@pytest.mark.parametrize(
    ("name", "family"), [("baichuan-7b", "llama"), ("baichuan2-7b", "llama"), ("qwen", "qwen2"), ("llama", "llama")]
)
def test_translated_models_have_the_same_logits_in_transformers(name, family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_family(tmp_path / "folder", name)
    import_checkpoint(folder, tmp_path / "checkpoint", tp=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32, family=family)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    torch.testing.assert_close(logits(build(folder, build_mesh(), None)), peer_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("baichuan-13b", "llama", "BaichuanForCausalLM cannot be exported as llama: .*alibi=True"),
        ("qwen-logn", "qwen2", "position 6 .use_logn_attn. of 64"),
        ("qwen", "llama", "biases on q, k and v but not on the output"),
        ("qwen3", "llama", "qk_norm=True"),
        ("mistral", "llama", "window=5"),
        ("mixtral", "llama", "moe="),
    ],
)
def test_translation_of_other_models_is_refused(name, family, message, tmp_path):
    config = read_config(tiny_family(tmp_path / "folder", name))
    with pytest.raises(ValueError, match=message):
        translate_config(config, family)
    qwen = read_config(tiny_family(tmp_path / "qwen", "qwen"))  # dynamic NTK: up to its trained length
    assert translate_config(qwen, "qwen2").max_positions == OWN["qwen"]["seq_length"]
