"""Aligns a language model with rewards by GRPO and its kin, without a critic, on any number of ranks.

    python launch/grpo.py --config launch/configs/grpo_smollm2.toml
    torchrun --nproc-per-node 8 launch/grpo.py --config presets/dapo.toml my.toml --parallel.tp 2
    torchrun ... launch/grpo.py --resume runs/grpo

`train` is the algorithm, one line a phase; the phases are in algorithms/grpo.py, in this order.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys

from common.online import OnlineRun
from common.run import Run, start
from report.panels import GRPO_PANELS
from report.tables import reward_table
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.grpo import score, update, with_advantages
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_grpo_roles, read_shapes
from trialign.algorithms.rollout.groups import GroupSource


class GRPORun(OnlineRun):
    """Prompts, rewards, roles and generator of a GRPO run; and what of them a checkpoint holds."""

    def __init__(self, run: Run[GRPOConfig]):
        config = run.config
        shapes = run.on_all_ranks(lambda: read_shapes(config))
        super().__init__(run, config, config.run, shapes[config.model.path])
        self.config = config
        reward = config.reward
        shaper = RewardShaper(reward.score_clip, reward.missing_eos_penalty, reward.normalize)
        self.roles = run.on_all_ranks(lambda: build_grpo_roles(config, shapes, run.mesh, run.phases), "models")
        self.attach(self.roles.actor, self.roles.rewards)
        self.rewards = self.rewards_of(shaper)
        self.rollouts = GroupSource(self.on_policy(config.run.prompts_per_step), self.rewards, config)
        self.learners = {"actor": (self.roles.actor, config.model.path)}
        self.parts = {"data": self.dataset, "reward": shaper}


def train(run: GRPORun) -> None:
    """GRPO from the run's step to its last."""
    config, roles = run.config, run.roles
    for step in run.steps():
        rollouts = run.rollouts.next(step)  # prompt -> groups of scored rollouts
        batch = score(rollouts, roles, config)  # rollout -> reference logprobs, logprobs before the update
        batch, metrics = with_advantages(batch, config)  # score -> advantages
        metrics |= update(roles, batch, config)  # advantage -> new weights
        run.sync(roles.actor)  # weights -> generator
        run.end_step(metrics)


def main(run: Run[GRPOConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and the table of responses in the run's folder."""
    grpo = GRPORun(run)
    run.begin(grpo.learners, grpo.parts, grpo.config.run.steps, about=grpo.about)
    before = run.remember("before.json", grpo.answer_shown)
    grpo.shown = grpo.shown[: len(before)]  # a resume may ask for more
    train(grpo)
    run.finish(GRPO_PANELS, reward_table(before[: len(grpo.shown)], grpo.answer_shown()))


if __name__ == "__main__":
    start(GRPOConfig, main, "grpo", sys.argv[1:])
