"""Config classes of the scripts, by the name in launch/NAME.py and in the [script.NAME] tables of config files."""

from __future__ import annotations

from typing import Any

from .conditional import ConditionalConfig
from .evaluate import EvaluateConfig
from .grpo import GRPOConfig
from .ppo import PPOConfig
from .preference import DPOConfig, KTOConfig, RewardModelConfig
from .pretrain import PretrainConfig
from .rejection import RejectionConfig
from .rlhf import RLHFConfig
from .sft import SFTConfig

SCRIPTS: dict[str, type[Any]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "rejection": RejectionConfig,
    "conditional": ConditionalConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "evaluate": EvaluateConfig,
    "rlhf": RLHFConfig,
}
