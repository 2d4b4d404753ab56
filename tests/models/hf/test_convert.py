"""Conversion: folders to checkpoints of any layout and back, export as another family, pickles and outputs."""

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
from peft_case import build, load_whole, logits, peer_logits
from scripts import launch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.atomic import atomic_folder
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.translate import Target, translate_config


def test_dtypes_are_kept_or_converted(tmp_path):
    """Bit for bit, whatever config.json has."""
    folder = tiny_llama(tmp_path / "folder")
    values, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for i, (source, dtype, stored) in enumerate(
        ((bf16, None, bf16), (fp16, None, fp16), (bf16, fp32, fp32), (fp32, bf16, bf16))
    ):
        write_folder(tmp_path / "source", values, {name: t.to(source) for name, t in tensors.items()})
        checkpoint, out = tmp_path / f"checkpoint{i}", tmp_path / f"out{i}"
        import_checkpoint(tmp_path / "source", checkpoint, dtype=dtype, tp=2)
        export_checkpoint(checkpoint, out)
        assert same_bits(tensors_of(out), {name: t.to(source).to(stored) for name, t in tensors.items()})
        assert f"torch.{json.loads((out / 'config.json').read_text())['torch_dtype']}" == str(stored)


def test_bad_imports_are_refused_and_leave_nothing(tmp_path):
    folder = tiny_llama(tmp_path / "folder")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "corrupt.gguf").write_bytes(b"GGUX" * 100)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    cases: tuple[tuple[Path, Path, dict[str, Any], str], ...] = (
        (folder, out, {"tp": 5}, "num_heads=4 .*tp=5"),
        (folder, out, {"pp": 5}, "num_layers=4 .*pp=5"),
        (folder, folder, {}, "exists and is not an empty folder"),
        (tmp_path / "pickle", out, {}, "pytorch_model.bin; pickles are not loaded.*docs/conversion.md, Pickles"),
        (tmp_path / "none", out, {}, "none: no such folder"),
        (tmp_path / "none.gguf", out, {}, "none.gguf: no such file"),
        (tmp_path / "corrupt.gguf", out, {}, "corrupt, or not a GGUF file"),
    )
    for model, output, options, message in cases:
        with pytest.raises(ValueError, match=message):
            import_checkpoint(model, output, **options)
    with pytest.raises(ValueError, match="corrupt.gguf: .*launch/import_hf.py"):
        read_config(tmp_path / "corrupt.gguf")
    done = launch("import_hf", "--model", tmp_path / "none", "--output", out)
    assert done.returncode != 0 and "import_hf: " in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def write(folder: Path) -> None:
    with atomic_folder(folder) as aside:
        (aside / "file").write_text("whole")


@pytest.mark.parametrize("exists", [True, False])
def test_target_of_a_linked_output_is_filled(exists, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    if exists:
        (tmp_path / "disk" / "folder").mkdir(parents=True)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["folder"]
    assert (tmp_path / "disk" / "folder" / "file").read_text() == "whole"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop: exists and is not an empty folder"):
        write(tmp_path / "loop")


def test_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    """The kernel renames nothing onto a mount point, which os.path.ismount does not always detect."""
    mount, rename = tmp_path / "mount", os.rename
    mount.mkdir()

    def busy(source: Any, target: Any) -> None:
        if Path(target) == mount:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(ValueError, match="mount: .*Device or resource busy.*folder in"), atomic_folder(mount):
        pytest.fail("work began")
    assert list(tmp_path.iterdir()) == [mount] and not list(mount.iterdir())
    write(mount / "in")


def test_leftovers_of_killed_conversions_are_reported_and_kept(tmp_path, capsys):
    """In a container the next process may have the killed one's process id."""
    left = tmp_path / f".folder.{os.getpid()}.unfinished"
    left.mkdir()
    (left / "file").write_text("of another process")
    write(tmp_path / "folder")
    (line,) = capsys.readouterr().err.splitlines()
    assert str(left) in line and list(tmp_path.glob(".*")) == [left] and (left / "file").is_file()
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == stat.S_IMODE(left.stat().st_mode)


def test_documented_code_converts_pickles_to_safetensors(tmp_path):
    """The lines of docs/conversion.md: two files, a tied head under both its names; a pickle that runs code fails."""
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
def test_export_as_another_family_has_the_same_logits(name, family, tmp_path):
    folder = tiny_family(tmp_path / "folder", name)
    import_checkpoint(folder, tmp_path / "checkpoint", tp=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32, family=family)
    exported = load_whole(AutoModelForCausalLM, tmp_path / "out")
    torch.testing.assert_close(peer_logits(exported), logits(build(folder, build_mesh())), rtol=1e-5, atol=1e-5)


def test_export_as_a_family_that_differs_is_refused(tmp_path):
    cases: tuple[tuple[str, Target, str], ...] = (
        ("baichuan-13b", "llama", "BaichuanForCausalLM .*llama: LLaMA has no alibi=True"),
        ("qwen-logn", "qwen2", "position 6 .use_logn_attn. of 64"),
        ("qwen", "llama", "biases on q, k and v but not on the output"),
        ("qwen3", "llama", "qk_norm=True"),
        ("mistral", "llama", "LLaMA has no window=5"),
        ("mixtral", "llama", "LLaMA has no moe="),
    )
    for name, family, message in cases:
        with pytest.raises(ValueError, match=message):
            translate_config(read_config(tiny_family(tmp_path / f"{name}-{family}", name)), family)
    qwen = read_config(tmp_path / "qwen-llama")  # dynamic NTK: it ends where Qwen2 would begin to differ
    assert translate_config(qwen, "qwen2").max_positions == OWN["qwen"]["seq_length"]
