"""Golden vectors: cases computed by other trainers, and adapters that compute them under each trainer's overlay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from presets import preset
from torch import Tensor
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.losses.aggregation import Segments

WHOLE_NUMBERS = ("index", "labels", "lengths", "_ids", "num_turns", "sequence_lengths", "response_length")

Case = dict[str, Any]
Outputs = dict[str, Tensor | float]
Adapter = Callable[[Case], Outputs]
ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(framework: str, *functions: str) -> Callable[[Adapter], Adapter]:
    """Registers a function that computes the outputs of a framework's functions with trialign's."""

    def register(function: Adapter) -> Adapter:
        for name in functions:
            ADAPTERS[framework, name] = function
        return function

    return register


def cases() -> Iterator[tuple[str, Case]]:
    """(name, case) of every case in tests/golden, or in the folder that TRIALIGN_GOLDEN names."""
    folder = Path(os.environ.get("TRIALIGN_GOLDEN") or Path(__file__).resolve().parents[2] / "golden")
    for path in sorted(folder.glob("*.json")):
        for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            function = case["function"].split("::")[1]
            yield f"{path.stem}[{number}] {case['framework']} {function} {case.get('kind', '')}", case


def tensor(case: Case, name: str) -> Tensor:
    """An input in the default dtype, or int64 for counts and ids."""
    whole = any(name.endswith(ending) for ending in WHOLE_NUMBERS)
    return torch.tensor(case["inputs"][name], dtype=torch.int64 if whole else torch.get_default_dtype())


TRAINERS = {"OpenRLHF": "openrlhf", "OpenRLHF-0.9.6": "openrlhf", "TRL": "trl", "verl": "verl", "NeMo-RL": "nemo_rl"}
TRAINERS |= {"slime": "slime"}


def ppo_config(case: Case, *, clip: float | None = None, **ppo: Any) -> PPOConfig:
    """PPO under the overlay of the case's framework, with the case's clip on both sides and options of `ppo`."""
    config = preset(PPOConfig, TRAINERS[case["framework"]])
    actor = config.actor if clip is None else replace(config.actor, clip_low=clip, clip_high=clip)
    return replace(config, actor=actor, ppo=replace(config.ppo, **ppo))


def grpo_options(case: Case, algorithm: str = "grpo", **changes: Any) -> GRPOOptions:
    """`grpo` options under the overlays of the case's framework and an algorithm, with the case's own options."""
    return replace(preset(GRPOConfig, TRAINERS[case["framework"]], algorithm).grpo, **changes)


def kl_limits(case: Case, kind: str) -> tuple[float, float]:
    """Limits of a KL estimate under the case's overlay: GRPO's for k3, PPO's for the others."""
    options = grpo_options(case) if kind == "k3" else ppo_config(case).ppo
    return options.kl_input_limit, options.kl_output_limit


class Rows:
    """A padded [rows, tokens] case as a packed batch: a prompt token before each row; `mask` marks counted tokens."""

    def __init__(self, mask: Tensor):
        rows, tokens = self.shape = mask.shape
        self.mask = torch.nn.functional.pad(mask.bool(), (1, 0)).flatten()  # [total]
        self.segments = Segments.of_lengths(torch.full((rows,), tokens + 1), self.mask)
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * (tokens + 1)

    def pack(self, x: Tensor, *, grad: bool = False) -> Tensor:
        """[rows, tokens], or [rows] broadcast to all tokens, as [total]; a leaf where `grad`."""
        wide = x if x.dim() == 2 else x[:, None].expand(self.shape)
        flat = torch.nn.functional.pad(wide, (1, 0)).flatten()
        return flat.requires_grad_() if grad else flat

    def read(self, case: Case, name: str, *, grad: bool = False) -> Tensor:
        """An input of a case as [total]; a leaf where `grad`."""
        return self.pack(tensor(case, name), grad=grad)

    def unpack(self, x: Tensor) -> Tensor:
        """[total] as [rows, tokens]."""
        return x.reshape(self.shape[0], -1)[:, 1:]

    def batch(self, **per_token: Tensor) -> Batch:
        """A batch of packed tensors; the sampler's logprobs are the old ones."""
        tokens, lengths = torch.zeros_like(self.mask, dtype=torch.int64), (self.shape[1] + 1,) * self.shape[0]
        if "logprobs" in per_token:
            per_token["rollout_logprobs"] = per_token["logprobs"]
        return Batch(tokens, lengths, self.mask).with_(**per_token)


def loss_and_gradient(rows: Rows, loss: Tensor, leaf: Tensor, name: str) -> Outputs:
    """The loss, and its gradient at `leaf` under `name`."""
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return {"loss": loss, name: rows.unpack(torch.zeros_like(leaf) if gradient is None else gradient)}


def with_gradients(loss: Tensor, **leaves: Tensor) -> Outputs:
    """The loss, and its gradient at each leaf as `grad_NAME`."""
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss, **{f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}
