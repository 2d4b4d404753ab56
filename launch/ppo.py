"""Aligns a language model with rewards by PPO, on any number of ranks.

    python launch/ppo.py --config launch/configs/ppo_smollm2.toml
    torchrun --nproc-per-node 8 launch/ppo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --actor.optimizer.lr 1e-6
    torchrun ... launch/ppo.py --resume runs/ppo

`train` is the algorithm, one line a phase: prompt -> rollout -> score -> advantage -> update -> weight sync.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from report import PPO_PANELS, completion_table
from session import Session, start
from trialign.algorithms.batch import Rollout, from_rollouts
from trialign.algorithms.build import build_roles, load_tokenizer, read_shapes
from trialign.algorithms.data import PromptDataset, TextDataset
from trialign.algorithms.kl import KLController
from trialign.algorithms.ppo import Roles, plan, score, update, with_rewards
from trialign.algorithms.ppo_config import PPOConfig, check
from trialign.algorithms.rewards import RewardShaper, combine
from trialign.algorithms.rollout import Scorer, my_part, sample, sampling_params
from trialign.engine.phases import forward_flops
from trialign.engine.rollout.generate import Generator
from trialign.models.hf import stop_ids


class Run:
    """What PPO works with: prompts, rewards, roles, generator; and what of it a checkpoint holds."""

    def __init__(self, session: Session[PPOConfig]):
        config, mesh = session.config, session.mesh
        self.config, self.mesh = config, mesh
        shapes = session.together(lambda: read_shapes(config))
        self.shape = shapes[config.model.path]
        self.tokenizer = session.together(lambda: load_tokenizer(config.model.path, self.shape))
        self.dataset = session.together(lambda: PromptDataset(config.data, self.tokenizer, config.run.seed))
        place = self.dataset.state()
        self.shown = self.dataset.next(config.run.show)  # the same before and after, and after a resume
        self.dataset.load_state(place)
        self.text = session.together(self._read_text) if config.actor.ptx_coef else None
        self.scorer = Scorer(config.reward, self.tokenizer, mesh)
        session.stack.callback(self.scorer.close)
        self.roles: Roles = session.together(lambda: build_roles(config, shapes, mesh))
        self.shaper = RewardShaper(config.reward)
        self.kl = KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
        self.generator = Generator(
            self.roles.actor.model, mesh, block_size=config.rollout.kv_block, max_running=config.rollout.max_running
        )
        self.sampling = sampling_params(config.rollout, stop_ids(config.model.path, self.shape), config.run.seed)
        actor, critic = config.model.path, config.model.critic or config.model.path
        self.learners = {"actor": (self.roles.actor, actor), "critic": (self.roles.critic, critic)}
        self.parts = {"data": self.dataset, "reward": self.shaper, "kl": self.kl}
        self.parts |= {"text": self.text} if self.text else {}

    def _read_text(self) -> TextDataset:
        data = self.config.data
        return TextDataset(data.ptx_source, data.ptx_key, self.tokenizer, data.ptx_tokens, self.config.run.seed)

    def answer_shown(self) -> list[tuple[str, str, float]]:
        """(prompt, greedy answer, score) for the first `run.show` prompts of the data. Collective."""
        prompts = self.shown
        if not prompts:
            return []
        greedy = replace(self.sampling, temperature=0.0, top_k=0, top_p=1.0)
        rollouts = sample(self.generator, prompts, greedy)
        batch = from_rollouts(rollouts).to(self.mesh.device)
        mine = list(range(len(batch))[my_part(len(batch), self.mesh.dp)])
        scores = self.scorer(rollouts, batch, self.roles.rewards, [mine] if mine else [])
        combined = combine(scores, self.config.reward.weights)
        texts = self.tokenizer.batch_decode([r.tokens for r in rollouts], skip_special_tokens=True)
        return [(prompt.text, text, s) for prompt, text, s in zip(prompts, texts, combined, strict=True)]


def train(run: Run, session: Session[PPOConfig]) -> None:
    """PPO from the session's step to its last."""
    config, roles, phases = run.config, run.roles, session.phases
    for step in session.steps():
        prompts = run.dataset.next(config.run.prompts_per_step)

        with phases("rollout") as phase:  # prompt -> rollout
            rollouts = sample(run.generator, prompts, run.sampling, config.rollout.samples_per_prompt)
            batch = from_rollouts(rollouts).to(run.mesh.device)
            epochs = plan(batch, config, run.mesh, seed=(config.run.seed << 32) + step)
            shares = [share for minibatch in epochs[0] for share in minibatch.shares]
            phase.tokens = len(batch.response)
            phase.flops = forward = forward_flops(run.shape, batch.lengths, len(batch.response))

        with phases("score") as phase:  # rollout -> rewards, reference logprobs, values
            scores = run.scorer(rollouts, batch, roles.rewards, shares)
            combined = combine(scores, config.reward.weights)
            rewards = run.shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
            batch = score(batch, roles, config, shares)
            body = forward_flops(run.shape, batch.lengths)
            phase.tokens = len(batch.tokens)
            passes = 1 + (batch.logprobs is not None), len(roles.rewards) + (batch.values is not None)
            phase.flops = forward * passes[0] + body * passes[1]

        with phases("update") as phase:  # rewards -> advantages -> new weights
            batch, metrics = with_rewards(batch, torch.tensor(rewards), config, run.kl.coef)
            text = run.text.next(config.batch_size // config.ppo.minibatches).tolist() if run.text else ()
            train_actor = step >= config.critic.warmup_steps
            metrics |= update(roles, batch, epochs, config, train_actor=train_actor, ptx=text)
            run.kl.update(metrics["kl"], len(batch))
            phase.tokens = len(batch.tokens) * config.ppo.epochs
            phase.flops = 3 * config.ppo.epochs * (body + forward * train_actor)

        with phases("sync"):  # weights -> generator
            run.generator.load(roles.actor.model)

        session.end_step(metrics | summary(rollouts, scores, combined, rewards), tokens=len(batch.tokens))


def summary(
    rollouts: list[Rollout], scores: dict[str, list[float]], combined: list[float], rewards: list[float]
) -> dict[str, float]:
    """What the answers were like: reward before and after shaping, each reward by name, lengths."""
    count = len(rollouts)
    lengths = [len(rollout.tokens) for rollout in rollouts]
    return {
        "reward": sum(combined) / count,
        "reward_shaped": sum(rewards) / count,
        **{f"reward/{Path(name).name}": sum(values) / count for name, values in scores.items()},
        "response_length": sum(lengths) / count,
        "response_length_max": max(lengths),
        "finished": sum(rollout.finish == "stop" for rollout in rollouts) / count,
    }


def main(session: Session[PPOConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and the table of answers in the run's folder."""
    run = Run(session)
    session.begin(run.learners, run.parts, run.config.run.steps, about=str(run.dataset))
    before = session.remember("before.json", run.answer_shown)
    run.shown = run.shown[: len(before)]  # a resume may ask for more
    train(run, session)
    session.finish(PPO_PANELS, completion_table(before[: len(run.shown)], run.answer_shown()))


if __name__ == "__main__":
    start(PPOConfig, check, main, "ppo", sys.argv[1:])
