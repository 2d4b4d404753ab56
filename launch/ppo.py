"""Proximal policy optimization (PPO) of a language model against rewards, on any number of ranks.

    python launch/ppo.py --config launch/configs/ppo_smollm2.toml
    torchrun --nproc-per-node 8 launch/ppo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --actor.optimizer.lr 1e-6
    torchrun ... launch/ppo.py --resume runs/ppo

`train` is the algorithm, one line a phase; algorithms/ppo.py has the phases in this order.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys

from common.online import OnlineRun
from common.run import Run, start
from report.panels import PPO_PANELS
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.data.documents import TextDataset
from trialign.algorithms.losses.kl import KLController
from trialign.algorithms.ppo import score, update, with_advantages
from trialign.algorithms.roles.build import build_ppo_roles, read_shapes


class PPORun(OnlineRun):
    """Prompts, rewards, roles, generator and KL penalty of PPO, and the state that checkpoints hold."""

    def __init__(self, run: Run[PPOConfig]):
        config = self.config = run.config
        shapes = run.on_all_ranks(lambda: read_shapes(config, config.model.critic))
        super().__init__(run, config, shapes[config.model.path], seed=config.run.seed, shown=config.run.show)
        self.text = run.on_all_ranks(self._read_text, "text") if config.actor.ptx_coef else None
        self.roles = run.on_all_ranks(lambda: build_ppo_roles(config, shapes, run.mesh, run.phases), "models")
        self.attach(self.roles.actor, self.roles.rewards)
        self.rewards, self.rollouts = self.build_rewards(config.reward), self.on_policy(config.run.prompts_per_step)
        self.kl = KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
        actor_folder, critic_folder = config.model.path, config.model.critic or config.model.path
        assert self.roles.critic is not None
        self.learners = {"actor": (self.roles.actor, actor_folder), "critic": (self.roles.critic, critic_folder)}
        self.parts = {"data": self.dataset, "reward": self.rewards.shaper, "kl": self.kl}
        self.parts |= {"text": self.text} if self.text else {}

    def _read_text(self) -> TextDataset:
        data = self.config.data
        return TextDataset(data.ptx_source, data.ptx_key, self.tokenizer, data.ptx_tokens, self.config.run.seed)

    def documents(self) -> list[list[int]]:
        """The step's documents of the pretraining mix, the same for each of its minibatches."""
        count = self.config.batch_size // self.config.ppo.minibatches
        return self.text.next(count).tolist() if self.text else []


def train(run: PPORun) -> None:
    """PPO from the run's current step to its last."""
    config, roles = run.config, run.roles
    for step in run.steps():
        rollouts = run.rollouts.next(step)  # prompt -> rollout
        batch = score(rollouts, roles, run.rewards, config)  # rollout -> rewards, reference logprobs, values
        batch, metrics = with_advantages(batch, config, run.kl)  # score -> advantages, returns
        metrics |= update(roles, batch, config, step, run.documents())  # advantage -> new weights
        run.sync(roles.actor)  # weights -> generator
        run.end_step(metrics)


def main(run: Run[PPOConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    ppo = PPORun(run)
    ppo.begin(run.config.run.steps)
    train(ppo)
    ppo.finish(PPO_PANELS)


if __name__ == "__main__":
    start(PPOConfig, main, "ppo", sys.argv[1:])
