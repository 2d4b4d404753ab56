"""Configs in launch/configs: they pass their script's checks, and data that no script makes exists."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from trialign.algorithms.config.conditional import ConditionalConfig
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.algorithms.config.preference import (
    DPOConfig,
    KTOConfig,
    RewardModelConfig,
)
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.config.sft import SFTConfig
from trialign.engine.config import flatten, load

CONFIGS: dict[str, Any] = {
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "conditional": ConditionalConfig,
    "rejection": RejectionConfig,
    "evaluate": EvaluateConfig,
}


@pytest.mark.parametrize("script", CONFIGS)
def test_a_shipped_config_is_complete(script):
    config = load(CONFIGS[script], ROOT / "launch" / "configs" / f"{script}_smollm2.toml")
    assert config.check(1) == 1
    files = [path for name, paths in flatten(config).items() if name.endswith("sources") for path in paths]
    assert files and all(Path(ROOT, path).is_file() for path in files if not path.startswith("runs/"))
