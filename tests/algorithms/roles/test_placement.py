"""Roles on a part of the ranks: PPO with the actor on two, critic and reference on two others, equals one process."""

from pathlib import Path
from typing import Any

import torch
from harness import run_ranks
from layouts import assert_close, whole_states
from tiny import tiny_llama
from trialign.algorithms.batch import Batch, Prompt, Rollout
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.ppo import PPOConfig, PPOOptions
from trialign.algorithms.losses.kl import KLController
from trialign.algorithms.ppo import score, update, with_advantages
from trialign.algorithms.rewards.rewards import Scored
from trialign.algorithms.roles.build import build_decoder, build_learner, trained_entries
from trialign.algorithms.roles.learner import Roles
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.source import OnPolicySource
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import Profiler
from trialign.engine.storage import checkpoint
from trialign.models.families.registry import read_config

CONFIG = PPOConfig(ppo=PPOOptions(kl_coef=0.1, minibatches=2, micro_batch_size=2))


class Prompts:
    """Eight prompts a step."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self, count: int) -> list[Prompt]:
        first, self.drawn = self.drawn, self.drawn + count
        return [Prompt(i, [3 + i % 7, 5, 4 + i % 3], "") for i in range(first, self.drawn)]


def rewards(rollouts: list[Rollout], batch: Batch) -> Scored:
    """Rewards by a hash of the tokens."""
    scores = [sum(rollout.tokens) % 13 / 6 - 1 for rollout in rollouts]
    return Scored(scores, scores)


def three_steps(
    rank: int, world: int, folder: Path, placed: bool, root: Path, resume: bool = False
) -> tuple[dict[str, float], Any, Any]:
    """Metrics, whole states and responses of three steps, with a checkpoint saved in `root` or loaded from it."""
    whole = build_mesh()
    first = build_mesh(dp=2, ranks=[0, 1]) if placed else whole
    others = build_mesh(tp=2, ranks=[2, 3]) if placed else whole
    shape, sizes = read_config(folder), CONFIG.ppo
    # A large eps: Adam's first step turns the rounding of gradients that are all but 0 into whole steps otherwise.
    settings = OptimizerConfig(lr=1e-3, eps=1e-2, warmup_ratio=0.0, schedule="constant")
    build = lambda mesh, **options: build_decoder(str(folder), shape, mesh, "float32", **options)  # noqa: E731
    actor = build_learner(build(first, trained=True), settings, 6, sizes=sizes)
    critic = build_learner(build(others, head="score", trained=True), settings, 6, sizes=sizes, name="critic")
    roles = Roles(actor, critic, Role(build(others), sizes=sizes))
    learners = {"actor": actor, "critic": critic}
    begin = 3 if resume else 0
    if resume:
        state = checkpoint.load(root / "step_3", trained_entries(learners), whole)
        for learner in learners.values():
            learner.optimizer.restore(state["steps"])
    dataset: Any = Prompts()
    generator = EmbeddedGenerator(actor.model, first)
    params = SamplingParams(max_new_tokens=6, stop_ids=(2,), seed=1)
    source = OnPolicySource(dataset, generator, params, 8, 1, Profiler(whole))
    kl, metrics, responses = KLController(0.1, 0.0, 1), {}, []
    scorer: Any = rewards
    for step in range(begin, begin + 3):
        rollouts = source.next(step)
        responses.append([rollout.tokens for rollout in rollouts.samples])
        batch = score(rollouts, roles, scorer, CONFIG)
        batch, numbers = with_advantages(batch, CONFIG, kl)
        numbers |= update(roles, batch, CONFIG, step)
        generator.load(actor.model, step + 1)
        metrics |= {f"{name}/{step}": value for name, value in numbers.items()}
    if not resume:
        state = {"steps": actor.optimizer.steps}
        checkpoint.save(root, 3, trained_entries(learners), state, whole, keep=1, assets={})
    return metrics, whole_states(**learners), responses


def test_placed_roles_equal_one_process(tmp_path):
    """Metrics, gradients, moments, weights and responses; a run resumes from the other placement's checkpoint."""
    folder = tiny_llama(tmp_path / "llama")
    alone = three_steps(0, 1, folder, False, tmp_path / "alone")
    for got in run_ranks(three_steps, 4, folder, True, tmp_path / "placed", timeout=200):
        assert got[2] == alone[2]
        assert_close(got[:2], alone[:2])
    after = three_steps(0, 1, folder, False, tmp_path / "placed", True)
    for got in run_ranks(three_steps, 4, folder, True, tmp_path / "alone", True, timeout=200):
        assert got[2] == after[2]
        assert_close(got[:2], after[:2], 2e-5)
    assert not torch.equal(alone[1]["actor/master/model.norm.weight"], after[1]["actor/master/model.norm.weight"])
