"""GGUF files of llama.cpp as sources of weights, config and tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tensors_of, tiny_family
from torch import Tensor
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint

gguf = pytest.importorskip("gguf")


def write_gguf(
    path: Path,
    folder: Path,
    arch: str = "llama",
    *,
    quantized: bool = False,
    tensors: dict[str, Tensor] | None = None,
    keys: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
) -> Path:
    """Writes a folder's weights and config as llama.cpp's converter does, with a tokenizer of a few tokens.

    Args:
        quantized: to Q8_0, where rows allow it.
        tensors, keys: further ones.
        kinds: GGUF's tensor name -> a type under which its bytes are declared.
    """
    config = read_config(folder)
    writer = gguf.GGUFWriter(path, arch)
    facts = {"block_count": config.num_layers, "context_length": config.max_positions, "vocab_size": config.vocab_size}
    facts |= {"embedding_length": config.hidden_size, "feed_forward_length": config.ffn_size}
    facts |= {"head_count": config.num_heads, "head_count_kv": config.num_kv_heads}
    facts |= {name: config.head_dim for name in ("key_length", "value_length")}
    facts |= {"layer_norm_rms_eps": config.norm_eps, "rope_freq_base": config.rope_theta}
    facts |= {"tokenizer_model": "gpt2", "token_merges": ["a b"], "bos_token_id": 1, "eos_token_id": 2}
    facts["token_list"] = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(config.vocab_size - 6))]
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    arch_id = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, types = gguf.get_tensor_name_map(arch_id, config.num_layers), gguf.GGMLQuantizationType
    for name, tensor in (tensors_of(folder) | (tensors or {})).items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # the halves of a head interleaved
            rows, columns = tensor.shape
            tensor = tensor.view(-1, 2, config.head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
        kind = types.Q8_0 if quantized and tensor.dim() == 2 and tensor.shape[1] % 32 == 0 else types.F32
        data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(gguf_name, data, raw_dtype=types[(kinds or {}).get(gguf_name, kind.name)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_imported_gguf_file_equals_its_folder(name, tmp_path):
    folder = tiny_family(tmp_path / "folder", name)
    expected = tensors_of(folder)
    for quantized in (False, True):
        file = write_gguf(tmp_path / f"{quantized}.gguf", folder, name, quantized=quantized)
        checkpoint, out = tmp_path / f"checkpoint{quantized}", tmp_path / f"out{quantized}"
        import_checkpoint(file, checkpoint, tp=2, pp=2)
        export_checkpoint(checkpoint, out, dtype=torch.float32)
        exported = tensors_of(out)
        assert exported.keys() == expected.keys()
        for key, tensor in expected.items():
            # Q8_0 keeps 8 bits of 32 numbers at a time: half a step is the largest / 254, the step itself is float16.
            slack = tensor.abs().max() / 220 if quantized and tensor.dim() == 2 else 0
            assert (exported[key] - tensor).abs().max() <= slack, key


def test_eot_token_ends_and_neutral_keys_are_accepted(tmp_path):
    keys = {"llama.rope.dimension_count": 8, "llama.attention.causal": True, "llama.rope.scale_linear": 1.0}
    keys["tokenizer.ggml.eot_token_id"] = 7
    import_checkpoint(
        write_gguf(tmp_path / "m.gguf", tiny_family(tmp_path / "folder", "llama"), keys=keys), tmp_path / "out"
    )
    assert read_config(tmp_path / "out").eos_ids == (2, 7)


def test_unsupported_gguf_files_are_refused(tmp_path):
    folder, model = tiny_family(tmp_path / "folder", "llama"), tmp_path / "model.gguf"

    def refused(message: str) -> str:
        with pytest.raises(ValueError, match=message) as caught:
            import_checkpoint(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    for key, value in (
        ("rope.dimension_count", 4),
        ("rope.scale_linear", 2.0),
        ("rope.scaling.factor", 4.0),
        ("attention.causal", False),
        ("attention.sliding_window_pattern", 2),
        ("attention.max_alibi_bias", 8.0),
        ("logit_scale", 0.5),
    ):
        write_gguf(model, folder, keys={f"llama.{key}": value})
        refused(f"model.gguf: llama.{key}={value}")
    write_gguf(model, folder, tensors={"rope_freqs.weight": torch.ones(4)})
    refused("rope_freqs.weight")
    write_gguf(model, folder, tensors={"blk.9.attn_q.weight": torch.ones(4, 32)})
    refused("unknown to the model: blk.9.attn_q.weight")
    data = write_gguf(model, folder, "gemma").read_bytes()
    refused("general.architecture=gemma: allowed: llama, qwen2, qwen3")
    model.write_bytes(data.replace(b"general.architecture", b"general.architectura"))
    refused("general.architecture=None: allowed: llama, qwen2, qwen3")

    message = "output_norm.weight is I32, which gguf cannot dequantize; allowed: F32, F16, Q4_0"
    data = bytearray(write_gguf(model, folder, kinds={"output_norm.weight": "I32"}).read_bytes())
    allowed = refused(message).rpartition("allowed: ")[2].split(", ")
    assert {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"} == {*allowed}
    data[data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8] = 31  # Q4_0_4_4, which is no more
    model.write_bytes(data)
    refused("output_norm.weight is of type 31, which .*; allowed: F32, F16")
