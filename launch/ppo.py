"""Aligns a language model with rewards by PPO, on any number of ranks.

    python launch/ppo.py --config launch/configs/ppo_smollm2.toml
    torchrun --nproc-per-node 8 launch/ppo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --actor.optimizer.lr 1e-6
    torchrun ... launch/ppo.py --resume runs/ppo

`train` is the algorithm, one line a phase: prompt -> rollout -> score -> advantage -> update -> weight sync.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys

import torch
from common.online import OnlineRun, summary
from common.run import Run, start
from report.panels import PPO_PANELS
from report.tables import reward_table
from trialign.algorithms.batch import from_rollouts
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.data.documents import TextDataset
from trialign.algorithms.losses.kl import KLController
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.policy_step import without
from trialign.algorithms.ppo import Roles, score, update, with_rewards
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_roles, read_shapes
from trialign.algorithms.rollout.sync import sample
from trialign.models.flops import forward_flops


class PPORun(OnlineRun):
    """What PPO works with: prompts, rewards, roles, generator; and what of it a checkpoint holds."""

    def __init__(self, run: Run[PPOConfig]):
        config, mesh = run.config, run.mesh
        shapes = run.on_all_ranks(lambda: read_shapes(config))
        super().__init__(run, config, config.run, shapes[config.model.path])
        self.config = config
        reward = config.reward
        self.shaper = RewardShaper(reward.score_clip, reward.missing_eos_penalty, reward.normalize)
        self.text = run.on_all_ranks(self._read_text, "text") if config.actor.ptx_coef else None
        self.roles: Roles = run.on_all_ranks(lambda: build_roles(config, shapes, mesh), "models")
        self.attach(self.roles.actor, self.roles.rewards)
        self.kl = KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
        actor, critic = config.model.path, config.model.critic or config.model.path
        self.learners = {"actor": (self.roles.actor, actor), "critic": (self.roles.critic, critic)}
        self.parts = {"data": self.dataset, "reward": self.shaper, "kl": self.kl}
        self.parts |= {"text": self.text} if self.text else {}

    def _read_text(self) -> TextDataset:
        data = self.config.data
        return TextDataset(data.ptx_source, data.ptx_key, self.tokenizer, data.ptx_tokens, self.config.run.seed)


def train(work: PPORun, run: Run[PPOConfig]) -> None:
    """PPO from the run's step to its last."""
    config, roles, phases = work.config, work.roles, run.phases
    for step in run.steps():
        prompts = work.dataset.next(config.run.prompts_per_step)

        with phases("rollout") as phase:  # prompt -> rollout
            rollouts = sample(work.generator, prompts, work.sampling, config.rollout.samples_per_prompt)
            batch = from_rollouts(rollouts).to(work.mesh.device)
            minibatches = draw_minibatches(len(batch), config.ppo, seed=(config.run.seed << 32) + step)
            batch = batch.with_(minibatches=minibatches)
            phase.tokens = len(batch.response)
            phase.flops = forward = forward_flops(work.shape, batch.lengths, len(batch.response))

        with phases("score") as phase:  # rollout -> rewards, reference logprobs, values
            scores = work.scorer(rollouts, batch, roles.rewards)
            combined = work.scorer.combined(scores)
            work.say_failures(run)
            rewards = work.shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
            batch = score(without(batch, torch.tensor(rewards)), roles, config)
            body = forward_flops(work.shape, batch.lengths)
            phase.tokens = len(batch.tokens)
            passes = 1 + (batch.logprobs is not None), len(roles.rewards) + (batch.values is not None)
            phase.flops = forward * passes[0] + body * passes[1]

        with phases("update") as phase:  # rewards -> advantages -> new weights
            batch, metrics = with_rewards(batch, torch.tensor(rewards), config, work.kl.coef)
            text = work.text.next(config.batch_size // config.ppo.minibatches).tolist() if work.text else ()
            train_actor = step >= config.critic.warmup_steps
            metrics |= update(roles, batch, config, train_actor=train_actor, ptx=text)
            work.kl.update(metrics["kl"], len(batch))
            phase.tokens = len(batch.tokens) * config.ppo.epochs
            phase.flops = 3 * config.ppo.epochs * (body + forward * train_actor)

        with phases("sync"):  # weights -> generator
            work.generator.load(roles.actor.model, step + 1)

        run.end_step(metrics | summary(rollouts, scores, combined, rewards), tokens=len(batch.tokens))


def main(run: Run[PPOConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and the table of answers in the run's folder."""
    work = PPORun(run)
    run.begin(work.learners, work.parts, work.config.run.steps, about=work.about)
    before = run.remember("before.json", work.answer_shown)
    work.shown = work.shown[: len(before)]  # a resume may ask for more
    train(work, run)
    run.finish(PPO_PANELS, reward_table(before[: len(work.shown)], work.answer_shown()))


if __name__ == "__main__":
    start(PPOConfig, main, "ppo", sys.argv[1:])
