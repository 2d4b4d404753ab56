"""Functions of users: the code of docs/extending.md runs, and what does not fit is refused by option and value."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from samples import tokenizer
from tiny import tiny_llama
from trialign.algorithms import grpo, ppo
from trialign.algorithms.batch import Prompt, pack
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.ppo import ActorConfig, PPOConfig, PPOOptions
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.rewards.functions import RewardFunction
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Roles
from trialign.algorithms.roles.role import Role
from trialign.engine.config import parse
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import read_config

GIVEN = ["--model.path", "m", "--data.sources", "p.jsonl", "--reward.functions", "r.py:f"]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """The folders of loaded files leave sys.path after a test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of docs/extending.md."""
    root = tmp_path_factory.mktemp("extensions")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.S)
    assert [name for name, _ in blocks] == ["reward.py", "estimator.py", "ranks.py", "loss.py", "reader.py"]
    for name, text in blocks:
        (root / name).write_text(text, encoding="utf-8")
    tiny_llama(root / "model")
    return root


def learner(folder: Path, head: Any = "lm"):
    model = build_decoder(str(folder / "model"), read_config(folder / "model"), build_mesh(), "float32", head=head,
                          trained=True)  # fmt: skip
    return build_learner(model, OptimizerConfig(lr=1e-3), 4, sizes=PPOOptions(micro_batch_size=2))


def batch():
    estimated = pack([[3, 4, 5, 6], [7, 8, 9], [4, 4, 4, 4, 4], [9, 8, 7]])
    return estimated.with_(rollout_logprobs=torch.zeros(15), minibatches=draw_minibatches(4, PPOOptions(), seed=0))


def test_documented_reward_and_reader(folder, tmp_path):
    with RewardFunction(f"{folder}/reward.py:brevity") as function:
        prompts = [Prompt(i, [1], "p", source=f"a:{i}") for i in range(2)]
        assert function.score(prompts, ["", "x" * 50]) == [1.0, 0.5]
    (tmp_path / "a.txt").write_text("hello w1\nw2\n", encoding="utf-8")
    read = lambda spec: PromptDataset(PromptData(sources=(str(tmp_path / "a.txt"),), reader=spec), tokenizer())  # noqa: E731
    assert sorted(p.text for p in read(f"{folder}/reader.py:numbered").next(2)) == ["hello w1", "w2"]
    (tmp_path / "bad.py").write_text("def rows(source):\n    return [3]\n\ndef none(source): ...\n", encoding="utf-8")
    for name, where in (("rows", "a.txt:1: "), ("none", "a.txt: ")):
        with pytest.raises(ValueError, match=f"{where}.*bad.py:{name}"):
            read(f"{tmp_path}/bad.py:{name}")


def test_documented_ppo_estimator_and_loss(folder):
    """Returns are the rewards to come, and the first loss is that of ratio 1, whatever the values are."""
    options = PPOOptions(advantage_estimator=f"{folder}/estimator.py:monte_carlo", whiten="off", kl_coef=0.0)
    config = PPOConfig(ppo=options, actor=ActorConfig(policy_loss=f"{folder}/loss.py:squared"))
    reference = Role(build_decoder(str(folder / "model"), read_config(folder / "model"), build_mesh(), "float32"),
                     sizes=options)  # fmt: skip
    roles, scores = Roles(learner(folder), learner(folder, "score"), reference), torch.tensor([1.0, 2.0, 3.0, 4.0])
    estimated = ppo.with_forward_passes(batch(), roles, config)
    estimated, _ = ppo.with_rewards(estimated, scores, config, 0.0)
    whole, _ = ppo.with_gae(estimated, config)
    assert whole.returns is not None and whole.advantages is not None and whole.values is not None
    assert torch.equal(whole.returns[whole.response], whole.segments.broadcast(scores)[whole.response])
    metrics = ppo.update(roles, estimated, config)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1
    assert metrics["policy_loss"] == pytest.approx(-whole.advantages[whole.response].mean().item(), rel=1e-5)


def test_documented_grpo_estimator_and_loss(folder, tmp_path):
    options = GRPOOptions(
        advantage_estimator=f"{folder}/ranks.py:ranks", policy_loss=f"{folder}/loss.py:squared", kl_in="off"
    )
    config, actor = GRPOConfig(grpo=options), learner(folder)
    estimated, _ = grpo.with_advantages(
        batch().with_(scores=torch.tensor([1.0, 3.0, 2.0, 2.0]), group=torch.tensor([0, 0, 1, 1])), config
    )
    assert estimated.advantages is not None
    assert estimated.advantages[estimated.last].tolist() == [-0.5, 0.5, 0.0, 0.0]
    metrics = grpo.update(Roles(actor), estimated, config)
    assert metrics["policy_loss"] == pytest.approx(-estimated.advantages[estimated.response].mean().item(), abs=1e-7)
    bad = "def short(scores, group):\n    return scores[1:]\n\ndef nan(scores, group):\n    return 0 / (0 * scores)\n"
    bad += "\ndef fixed(logprobs, old_logprobs, advantages, sample):\n    return -advantages\n"
    (tmp_path / "bad.py").write_text(bad, encoding="utf-8")
    for name, why in {"short": r"advantages must be \[4\] .*\[3\]", "nan": "sample 1 of 4: .*bad.py:nan nan"}.items():
        made = replace(options, advantage_estimator=f"{tmp_path}/bad.py:{name}")
        with pytest.raises(ValueError, match=why):
            grpo.with_advantages(estimated, GRPOConfig(grpo=made))
    with pytest.raises(ValueError, match="bad.py:fixed: .*logprobs"):
        grpo.update(Roles(actor), estimated, GRPOConfig(grpo=replace(options, policy_loss=f"{tmp_path}/bad.py:fixed")))


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("ppo.advantage_estimator", "gaee", "must be gae, path/to/file.py:function"),
        ("actor.policy_loss", "nowhere.py:loss", "nowhere.py: FileNotFoundError"),
        ("actor.policy_loss", "{folder}/loss.py:hinge", "it has: squared"),
        ("actor.policy_loss", "{folder}/ranks.py:ranks", "is called with (logprobs, old_logprobs, advantages, sample)"),
        ("data.reader", "{folder}/loss.py:squared", "is called with (source)"),
    ],
)
def test_invalid_user_functions_are_refused(folder, option, value, part):
    value = value.format(folder=folder)
    config = parse(PPOConfig, [*GIVEN, f"--{option}", value])
    with pytest.raises(ValueError) as error:
        config.check(1)
    assert str(error.value).startswith(f"{option}=") and value in str(error.value) and part in str(error.value)
