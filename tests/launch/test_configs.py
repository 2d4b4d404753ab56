"""Shipped configs: they pass their script's checks, data files that no script writes exist; the demo's reward."""

from pathlib import Path

import pytest
from conftest import ROOT
from trialign.algorithms.batch import Prompt, from_rollouts, single_turn
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.engine.config import flatten, load
from trialign.engine.mesh import build_mesh

CONFIGS = {path.stem.removesuffix("_smollm2"): path for path in (ROOT / "launch" / "configs").glob("*.toml")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_shipped_config_passes_its_checks(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert CONFIGS.keys() == SCRIPTS.keys()
    config = load(SCRIPTS[script], str(CONFIGS[script]))
    assert config.check(1) == 1
    files = [path for name, paths in flatten(config).items() if name.endswith("sources") for path in paths]
    assert files and all(Path(path).is_file() for path in files if not path.startswith("runs/"))


def test_demo_reward_prefers_positive_responses(tiny, monkeypatch):
    """VADER's scores reach PPO neither scaled nor clipped."""
    monkeypatch.chdir(ROOT)
    reward = load(SCRIPTS["ppo"], str(CONFIGS["ppo"])).reward
    texts = ("What a wonderful, happy day!</s>", "It was a terrible, sad failure.</s>")
    responses = [tiny.encode(text, add_special_tokens=False) for text in texts]
    rollouts = [single_turn(Prompt(i, [1], "How?"), own, [0.0] * len(own), "stop") for i, own in enumerate(responses)]
    scorer = Scorer(reward, tiny, build_mesh())
    scores = scorer.combined(scorer(rollouts, from_rollouts(rollouts), []))
    scorer.close()
    shaper = RewardShaper(reward.clip, reward.missing_eos_penalty, reward.normalize)
    assert shaper(scores, [True, True]) == pytest.approx([0.8268, -0.8591])
