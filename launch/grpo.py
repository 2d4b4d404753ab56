"""Aligns a language model with rewards by GRPO and its kin, without a critic, on any number of ranks.

    python launch/grpo.py --config launch/configs/grpo_smollm2.toml
    torchrun --nproc-per-node 8 launch/grpo.py --config presets/dapo.toml my.toml --parallel.tp 2
    torchrun ... launch/grpo.py --resume runs/grpo

`train` is the algorithm, one line a phase: prompt -> groups of answers -> score -> advantage -> update -> weight sync.
"""

from __future__ import annotations

from trialign.algorithms.batch import Score

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys

import torch
from common.online import OnlineRun, summary
from common.run import Run, start
from report.panels import GRPO_PANELS
from report.tables import reward_table
from trialign.algorithms.batch import Rollout, from_rollouts
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.grpo import GroupRoles, score, update, with_advantages
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.policy_step import without
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_group_roles, read_shapes
from trialign.algorithms.rollout.groups import Group, GroupPool, make_groups
from trialign.algorithms.rollout.sync import sample
from trialign.models.flops import forward_flops


class GRPORun(OnlineRun):
    """What GRPO works with: prompts, rewards, roles, generator; and what of it a checkpoint holds."""

    def __init__(self, run: Run[GRPOConfig]):
        config, mesh = run.config, run.mesh
        shapes = run.on_all_ranks(lambda: read_shapes(config))
        super().__init__(run, config, config.run, shapes[config.model.path])
        self.config = config
        reward = config.reward
        self.shaper = RewardShaper(reward.score_clip, reward.missing_eos_penalty, reward.normalize)
        self.roles: GroupRoles = run.on_all_ranks(lambda: build_group_roles(config, shapes, mesh), "models")
        self.attach(self.roles.actor, self.roles.rewards)
        self.learners = {"actor": (self.roles.actor, config.model.path)}
        self.parts = {"data": self.dataset, "reward": self.shaper}

    def draw(self, run: Run[GRPOConfig]) -> tuple[list[Group], dict[str, float]]:
        """The groups of a step, and what all answers drawn for it were like."""
        config = self.config
        pool = GroupPool(config.run.prompts_per_step, config.grpo.dynamic_sampling, config.grpo.max_draws)
        drawn: list[Rollout] = []
        scores: dict[str, list[Score]] = {}
        combined, shaped = [], []
        while pool.missing:
            prompts = self.dataset.next(pool.missing)
            with run.phases("rollout") as phase:  # prompt -> rollout
                rollouts = sample(self.generator, prompts, self.sampling, config.rollout.samples_per_prompt)
                batch = from_rollouts(rollouts)
                phase.tokens = len(batch.response)
                phase.flops = forward_flops(self.shape, batch.lengths, len(batch.response))
            with run.phases("score") as phase:  # rollout -> rewards
                given = self.scores(rollouts)
                here = self.scorer.combined(given)
                self.say_failures(run)
                rewards = self.shaper(here, [rollout.finish == "stop" for rollout in rollouts])
                phase.flops = forward_flops(self.shape, batch.lengths) * len(self.roles.rewards)
            pool.add(make_groups(rollouts, here, rewards, config))
            drawn, combined, shaped = drawn + rollouts, combined + here, shaped + rewards
            scores = {name: scores.get(name, []) + values for name, values in given.items()}
        groups, metrics = pool.take()
        return groups, metrics | summary(drawn, scores, combined, shaped)


def train(work: GRPORun, run: Run[GRPOConfig]) -> None:
    """GRPO from the run's step to its last."""
    config, roles, phases = work.config, work.roles, run.phases
    for step in run.steps():
        groups, metrics = work.draw(run)
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        number = torch.arange(len(groups)).repeat_interleave(config.rollout.samples_per_prompt)
        batch = from_rollouts([rollout for group in groups for rollout in group.rollouts]).to(work.mesh.device)
        minibatches = draw_minibatches(len(batch), config.grpo, seed=(config.run.seed << 32) + step)
        forward = forward_flops(work.shape, batch.lengths, len(batch.response))

        with phases("score") as phase:  # rollout -> reference logprobs, old logprobs
            batch = score(without(batch.with_(minibatches=minibatches), rewards), roles, config)
            passes = (batch.ref_logprobs is not None) + (batch.logprobs is not None)
            phase.tokens, phase.flops = passes * len(batch.tokens), passes * forward

        with phases("update") as phase:  # rewards -> advantages -> new weights
            batch, about = with_advantages(batch, rewards, number, config)
            metrics |= about | update(roles.actor, batch, config)
            phase.tokens = len(batch.tokens) * config.grpo.epochs
            phase.flops = 3 * config.grpo.epochs * forward

        with phases("sync"):  # weights -> generator
            work.generator.load(roles.actor.model, step + 1)

        run.end_step(metrics, tokens=len(batch.tokens))


def main(run: Run[GRPOConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and the table of answers in the run's folder."""
    work = GRPORun(run)
    run.begin(work.learners, work.parts, work.config.run.steps, about=work.about)
    before = run.remember("before.json", work.answer_shown)
    work.shown = work.shown[: len(before)]  # a resume may ask for more
    train(work, run)
    run.finish(GRPO_PANELS, reward_table(before[: len(work.shown)], work.answer_shown()))


if __name__ == "__main__":
    start(GRPOConfig, main, "grpo", sys.argv[1:])
