"""Translation of a model to another family that computes the same, for programs without its own.

Baichuan 7B is LLaMA with fused q, k and v, Baichuan2 7B too once the head's rows are normalized, and Qwen 1 within its
trained length is Qwen2. Names are those of the same Decoder parameters in the two families' tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from ..config import HeadKind, ModelConfig
from ..families.llama import LLAMA
from ..families.qwen2 import QWEN2
from ..families.registry import from_hf_dict, to_hf_dict
from ..rope import Rope
from .lazy import LazyTensor
from .table import HEADS, hf_slices

Target = Literal["llama", "qwen2"]
_FAMILIES = dict(zip(get_args(Target), (LLAMA, QWEN2), strict=True))


def translate_config(config: ModelConfig, target: Target, head: HeadKind = "lm") -> ModelConfig:
    """Config of the family `target` with the same logits up to `config.max_positions`.

    Dynamic NTK has no effect up to there, nor log-n attention with a base of at least that length. A normalized head
    becomes a plain one (`TranslatedState` normalizes the rows).

    Raises:
        ValueError: naming the field of `config` that the family does not have.
    """
    family = _FAMILIES[target]
    refused = f"{config.architecture} cannot be exported as {target}:"
    if config.logn is not None and config.logn < config.max_positions:
        raise ValueError(
            f"{refused} it has log-n attention beyond position {config.logn} (use_logn_attn) of {config.max_positions},"
            f" {family.name} has none"
        )
    if config.norm_head and config.tie_embeddings and head == "lm":
        raise ValueError(f"{refused} its head is normalized, but tied to an embedding that is not")
    if family is LLAMA and config.qkv_bias != config.output_bias:
        raise ValueError(f"{refused} it has biases on q, k and v but not on the output; {family.name} has all or none")
    plain = replace(
        config,
        architecture=family.architecture(head),
        logn=None,
        norm_head=False,
        rope=Rope() if config.rope.kind == "dynamic" else config.rope,
    )
    again = from_hf_dict(to_hf_dict(plain, head))  # as read from the exported config.json
    lost = [f.name for f in fields(ModelConfig) if getattr(again, f.name) != getattr(plain, f.name)]
    if head == "score" and "tie_embeddings" in lost:
        lost.remove("tie_embeddings")
    if lost:
        values = ", ".join(f"{name}={getattr(plain, name)}" for name in lost)
        raise ValueError(f"{refused} {family.name} has no {values}")
    return plain


class TranslatedState(Mapping[str, Tensor | LazyTensor]):
    """Tensors under another family's names, read lazily.

    Args:
        tensors: by their `hf_name` under the config `old`.
        new: config from `translate_config`.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor | LazyTensor], old: ModelConfig, new: ModelConfig, head: HeadKind = "lm"
    ):
        before, after = hf_slices(old, head), hf_slices(new, head)
        self.tensors = tensors
        self.source = {after[key].name: before[key].name for key in before}
        self.normalized = after[HEADS["lm"].parameter, ""].name if head == "lm" and old.norm_head else None

    def __getitem__(self, name: str) -> Tensor | LazyTensor:
        tensor = self.tensors[self.source[name]]
        if name != self.normalized:
            return tensor
        return LazyTensor(tuple(tensor.shape), lambda rows: F.normalize(tensor[rows].float(), dim=-1))

    def __iter__(self):
        return (name for name, source in self.source.items() if source in self.tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)
