"""Translation of a model to another family that computes the same, for programs that lack its own.

Weights need no list of their own: both families' tables name our parameters, so a weight's new name is that of the same
part in the other table. Baichuan 7B is LLaMA with q, k and v in one tensor, Baichuan2 7B the same once the
head's rows are normalized, and Qwen 1 within its trained length is Qwen2.
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
    """The config of the family `target` that gives the same logits at all of `config.max_positions`.

    Dynamic NTK does nothing up to there, and log-n attention where its base is no less; a normalized head becomes a
    plain one, for `Translated` to normalize.

    Raises:
        ValueError: the family lacks something in `config`.
    """
    family = _FAMILIES[target]
    refused = f"{config.architecture} cannot be exported as {target}:"
    if config.logn is not None and config.logn < config.max_positions:
        raise ValueError(
            f"{refused} it scales queries beyond position {config.logn} (use_logn_attn), has {config.max_positions}"
            f" positions, and {family.name} scales none"
        )
    if config.norm_head and config.tie_embeddings and head == "lm":
        raise ValueError(f"{refused} its head is normalized, its embedding is not, and they are one tensor")
    if family is LLAMA and config.qkv_bias != config.output_bias:
        raise ValueError(f"{refused} it has biases on q, k and v but not on the output; {family.name} has all or none")
    plain = replace(
        config,
        architecture=family.architecture(head),
        logn=None,
        norm_head=False,
        rope=Rope() if config.rope.kind == "dynamic" else config.rope,
    )
    again = from_hf_dict(to_hf_dict(plain, head))  # as a reader of the exported config.json would get it
    lost = [f.name for f in fields(ModelConfig) if getattr(again, f.name) != getattr(plain, f.name)]
    if head == "score" and "tie_embeddings" in lost:
        lost.remove("tie_embeddings")
    if lost:
        values = ", ".join(f"{name}={getattr(plain, name)}" for name in lost)
        raise ValueError(f"{refused} {family.name} has no {values}")
    return plain


class Translated(Mapping[str, Tensor | LazyTensor]):
    """Whole tensors under the names of another family, each read when it is asked for.

    Args:
        tensors: parts as `hf_name` names them under the config `old`.
        new: from `translate_config`.
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
