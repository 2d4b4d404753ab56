"""Shipped configs: they pass their script's checks, and data files that no script writes exist."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from trialign.algorithms.config.conditional import ConditionalConfig
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.preference import DPOConfig, KTOConfig, RewardModelConfig
from trialign.algorithms.config.pretrain import PretrainConfig
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.config.rlhf import RLHFConfig
from trialign.algorithms.config.sft import SFTConfig
from trialign.engine.config import flatten, load

CONFIGS: dict[str, Any] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "conditional": ConditionalConfig,
    "rejection": RejectionConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "rlhf": RLHFConfig,
    "evaluate": EvaluateConfig,
}


def test_every_config_is_checked():
    assert {path.stem.removesuffix("_smollm2") for path in (ROOT / "launch" / "configs").glob("*.toml")} == set(CONFIGS)


@pytest.mark.parametrize("script", CONFIGS)
def test_shipped_config_passes_its_checks(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(CONFIGS[script], f"launch/configs/{script}_smollm2.toml")
    assert config.check(1) == 1
    files = [path for name, paths in flatten(config).items() if name.endswith("sources") for path in paths]
    assert files and all(Path(path).is_file() for path in files if not path.startswith("runs/"))
