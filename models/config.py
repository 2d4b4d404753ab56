"""The shape of a decoder, read from a Hugging Face config.json and refused by name where it asks for what we lack."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HeadKind = Literal["lm", "score"]
"""What stands on the last hidden state: the vocabulary's logits, or one number a token (critic, reward model)."""

ARCHITECTURES: dict[str, HeadKind] = {"LlamaForCausalLM": "lm", "LlamaForSequenceClassification": "score"}

# What changes the computation and has one supported value. None is the value of an absent key, always allowed.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers: `experts` MLPs of `ffn_size`, of which each token takes `top_k`."""

    experts: int
    top_k: int
    ffn_size: int
    normalise: bool = True
    """divide the chosen experts' weights by their sum"""
    shared_ffn_size: int = 0
    """one more MLP that every token takes (Qwen2-MoE); 0 for none"""
    dense_layers: tuple[int, ...] = ()
    """layers that have a plain MLP of the model's ffn_size instead"""
    aux_coef: float = 0.0
    """weight of the load-balancing loss"""
    z_coef: float = 0.0
    """weight of the router's z-loss"""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a decoder (https://arxiv.org/abs/2302.13971 and its kin), under trialign's names."""

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """of the attention's output projection"""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before they are turned (Qwen3)"""
    window: int | None = None
    """keys a query sees, itself included (Mistral); None for all"""
    moe: MoEConfig | None = None
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @property
    def head(self) -> HeadKind:
        """The head that a folder with this config holds."""
        return ARCHITECTURES[self.architecture]

    @classmethod
    def from_hf(cls, folder: Path | str) -> ModelConfig:
        """Reads `folder`/config.json.

        Raises:
            ValueError: no such folder or file, not JSON, an unsupported architecture or feature, a missing or
                impossible number; the message names the key and what is allowed.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder}: {'no config.json in this folder' if Path(folder).is_dir() else 'no such folder'}"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        try:
            return cls.from_hf_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config in `values`, the content of a Hugging Face config.json; raises as from_hf does."""
        allowed = ", ".join(ARCHITECTURES)
        names = values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
            raise ValueError(f"architectures={names}: allowed: {allowed}")
        for key, only in _FIXED.items():
            if values.get(key) is not None and values[key] != only:
                raise ValueError(f"{key}={values[key]!r} is not supported; allowed: {json.dumps(only)}")
        labels = values.get("num_labels", len(values.get("id2label") or [0]))
        if ARCHITECTURES[names[0]] == "score" and labels != 1:
            raise ValueError(f"num_labels={labels}: a score head has 1")

        heads, hidden = _whole(values, "num_attention_heads"), _whole(values, "hidden_size")
        kv_heads = _whole(values, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}")
        if values.get("head_dim") is None and hidden % heads:
            raise ValueError(f"hidden_size={hidden} does not divide by num_attention_heads={heads}, and no head_dim")
        head_dim = _whole(values, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: rotary embeddings need an even number")
        eos = values.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if not all(isinstance(i, int) and i >= 0 for i in eos_ids):
            raise ValueError(f"eos_token_id={eos!r}: expected a token id or a list of them")
        return cls(
            architecture=names[0],
            vocab_size=_whole(values, "vocab_size"),
            hidden_size=hidden,
            ffn_size=_whole(values, "intermediate_size"),
            num_layers=_whole(values, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=_rope_theta(values),
            norm_eps=_positive(values, "rms_norm_eps", 1e-6),
            max_positions=_whole(values, "max_position_embeddings", 2048),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            initializer_range=_positive(values, "initializer_range", 0.02),
            bos_id=values.get("bos_token_id"),
            eos_ids=eos_ids,
            pad_id=values.get("pad_token_id"),
        )

    def to_hf_dict(self, head: HeadKind = "lm", dtype: str = "bfloat16") -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5 and vLLM read, for a folder with the given head."""
        values = {
            "architectures": [next(name for name, kind in ARCHITECTURES.items() if kind == head)],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,  # transformers 4 and vLLM; the next line is for transformers 5
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings and head == "lm",
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
            "torch_dtype": dtype,
            "use_cache": True,
        }
        if head == "score":
            values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        return values


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key) if values.get(key) is not None else default
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}: expected a whole number of at least 1")
    return value


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key}={value!r}: expected a number above 0")
    return float(value)


def _rope_theta(values: Mapping[str, Any]) -> float:
    """The base of the rotary embedding: in `rope_parameters` since transformers 5, beside `rope_scaling` before."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{key}={rope!r}: expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{key} asks for rope_type={kind!r}, which is not supported; allowed: 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{key}: partial_rotary_factor={rope['partial_rotary_factor']}; allowed: 1.0")
        if "rope_theta" in rope:
            return _positive(rope, "rope_theta", 10000.0)
    return _positive(values, "rope_theta", 10000.0)


def check_layout(config: ModelConfig, tp: int, pp: int) -> None:
    """Refuses a layout that does not cut the model into equal parts.

    Raises:
        ValueError: naming the size that does not divide and the sizes that would.
    """
    cuts = {
        ("tp", tp): ("num_heads", "num_kv_heads", "ffn_size", "vocab_size"),
        ("pp", pp): ("num_layers",),
    }
    for (axis, parts), names in cuts.items():
        sizes = {name: getattr(config, name) for name in names}
        for name, size in sizes.items():
            if parts < 1 or size % parts:
                largest = math.gcd(*sizes.values())
                allowed = ", ".join(str(n) for n in range(1, min(largest, 1024) + 1) if largest % n == 0)
                raise ValueError(f"{name}={size} does not divide by {axis}={parts}; allowed {axis}: {allowed}")
