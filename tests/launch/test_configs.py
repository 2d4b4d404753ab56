"""Configs in launch/configs: they pass their script's checks, and data that no script makes exists."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from trialign.algorithms.config.conditional import ConditionalConfig, check_conditional
from trialign.algorithms.config.evaluate import EvaluateConfig, check_evaluate
from trialign.algorithms.config.preference import (
    DPOConfig,
    KTOConfig,
    RewardModelConfig,
    check_dpo,
    check_kto,
    check_reward,
)
from trialign.algorithms.config.rejection import RejectionConfig, check_rejection
from trialign.algorithms.config.sft import SFTConfig, check
from trialign.engine.config import flatten, load

CONFIGS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTConfig, check),
    "reward": (RewardModelConfig, check_reward),
    "dpo": (DPOConfig, check_dpo),
    "kto": (KTOConfig, check_kto),
    "conditional": (ConditionalConfig, check_conditional),
    "rejection": (RejectionConfig, check_rejection),
    "evaluate": (EvaluateConfig, check_evaluate),
}


@pytest.mark.parametrize("script", CONFIGS)
def test_a_shipped_config_is_complete(script):
    kind, check = CONFIGS[script]
    config = load(kind, ROOT / "launch" / "configs" / f"{script}_smollm2.toml")
    assert check(config, 1) == 1
    files = [path for name, paths in flatten(config).items() if name.endswith("sources") for path in paths]
    assert files and all(Path(ROOT, path).is_file() for path in files if not path.startswith("runs/"))
