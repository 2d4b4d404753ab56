"""Options that the overlays of launch/configs/presets give, for tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.engine.config import load

TRAINERS = ("trialign", "openrlhf", "trl", "verl", "nemo_rl", "slime")
ALGORITHMS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "dapo", "gspo", "cispo")


@cache
def preset(cls: type, trainer: str = "trialign", algorithm: str = "") -> Any:
    """The config of a trainer's overlay with an algorithm's behind it; trialign and grpo have none."""
    files = [f"presets/{name}.toml" for name in (trainer, algorithm) if name not in ("trialign", "grpo", "")]
    return load(cls, *files, scripts=SCRIPTS)


def grpo_options(algorithm: str = "grpo", trainer: str = "trialign", **changes: Any) -> GRPOOptions:
    """`grpo` options of an algorithm's overlay, with changes."""
    return replace(preset(GRPOConfig, trainer, algorithm).grpo, **changes)
