"""Tiny random models of every family as Hugging Face folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trialign.models.families.registry import from_hf_dict
from trialign.models.hf.table import hf_shapes

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_MSCALE = _YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8.0, "truncate": False}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}
_LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_WINDOW = {"use_sliding_window": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}

# name -> (prefix of transformers' classes, config keys besides SIZES)
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 16}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": _MSCALE}),
    "llama-3.1": ("Llama", {"rope_parameters": _LLAMA3, "num_key_value_heads": 2}),
    "code-llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("Mistral", {"sliding_window": 5, "num_key_value_heads": 2, "head_dim": 16}),
    "mistral-full": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", _WINDOW | {"num_key_value_heads": 2, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-mqa": (
        "Qwen3",
        _WINDOW
        | {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2-moe": (
        "Qwen2Moe",
        _EXPERTS | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
}

_OWN = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6}
_BAICHUAN = _OWN | {"intermediate_size": 36, "eos_token_id": 2, "initializer_range": 0.2}
_QWEN = _OWN | {"intermediate_size": 72, "kv_channels": 8, "no_bias": True, "layer_norm_epsilon": 1e-6}
# name -> published config.json of families that transformers lacks
OWN: dict[str, dict[str, Any]] = {
    "qwen": _QWEN
    | {"architectures": ["QWenLMHeadModel"], "seq_length": 64, "use_dynamic_ntk": True, "use_logn_attn": True},
    "qwen-logn": _QWEN
    | {"architectures": ["QWenLMHeadModel"], "seq_length": 6, "max_position_embeddings": 64, "use_logn_attn": True},
    "baichuan-7b": _BAICHUAN
    | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 64, "norm_head": False},
    "baichuan-13b": _BAICHUAN | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 64, "norm_head": False},
    "baichuan2-7b": _BAICHUAN
    | {"architectures": ["BaichuanForCausalLM"], "max_position_embeddings": 64, "z_loss_weight": 0},
    "baichuan2-13b": _BAICHUAN | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 64, "z_loss_weight": 0},
}
ALL = (*PEERS, *OWN)
SPARSE = ("mixtral", "qwen2-moe", "qwen3-moe")


def write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def peer_config(name: str) -> Any:
    import transformers

    prefix, changes = PEERS[name]
    return getattr(transformers, f"{prefix}Config")(**(SIZES | changes))


def peer_class(name: str, kind: str = "ForCausalLM") -> Any:
    import transformers

    return getattr(transformers, PEERS[name][0] + kind)


def values_of(name: str) -> dict[str, Any]:
    """Content of the family's config.json."""
    return OWN[name] if name in OWN else peer_config(name).to_dict() | {"architectures": [peer_class(name).__name__]}


def randomize(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Fills all tensors, biases and norms too: initial values of 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        norm = tensor.dim() == 1 and not name.endswith("bias")
        tensor.data.copy_(1 + 0.2 * noise if norm else 0.2 * noise)


def random_folder(folder: Path, values: Mapping[str, Any], seed: int = 0) -> Path:
    """A random model with this config.json."""
    shapes = hf_shapes(from_hf_dict(values))
    tensors = {tensor: torch.empty(shape) for tensor, shape in shapes.items()}
    randomize(tensors, seed)
    return write_folder(folder, values, tensors)


def tiny_family(folder: Path, name: str, seed: int = 0) -> Path:
    """A random model, written by transformers if it has the family."""
    if name in OWN:
        return random_folder(folder, OWN[name], seed)
    model = peer_class(name)(peer_config(name))
    randomize(dict(model.named_parameters()), seed)
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes and bits are equal."""
    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and torch.equal(t.view(torch.uint8), other[name].view(torch.uint8))
        for name, t in one.items()
    )
