"""Group-relative policy optimization (GRPO, DAPO, RLOO and kin) against rewards, without a critic, on any ranks.

    python launch/grpo.py --config launch/configs/grpo_smollm2.toml
    torchrun --nproc-per-node 8 launch/grpo.py --config presets/dapo.toml my.toml --parallel.tp 2
    torchrun ... launch/grpo.py --resume runs/grpo

`train` is the algorithm, one line a phase; algorithms/grpo.py has the phases in this order.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys

from common.online import OnlineRun
from common.run import Run, start
from report.panels import GRPO_PANELS
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.grpo import score, update, with_advantages
from trialign.algorithms.roles.build import build_grpo_roles, read_shapes
from trialign.algorithms.rollout.groups import GroupSource


class GRPORun(OnlineRun):
    """Prompts, rewards, roles and generator of GRPO, and the state that checkpoints hold."""

    def __init__(self, run: Run[GRPOConfig]):
        config = self.config = run.config
        shapes = run.on_all_ranks(lambda: read_shapes(config))
        super().__init__(run, config, shapes[config.model.path], seed=config.run.seed, shown=config.run.show)
        self.roles = run.on_all_ranks(lambda: build_grpo_roles(config, shapes, run.mesh, run.phases), "models")
        self.attach(self.roles.actor, self.roles.rewards)
        self.rewards = self.build_rewards(config.reward)
        self.rollouts = GroupSource(self.on_policy(config.run.prompts_per_step), self.rewards, config)
        self.learners = {"actor": (self.roles.actor, config.model.path)}
        self.parts = {"data": self.dataset, "reward": self.rewards.shaper}


def train(run: GRPORun) -> None:
    """GRPO from the run's current step to its last."""
    config, roles = run.config, run.roles
    for step in run.steps():
        rollouts = run.rollouts.next(step)  # prompt -> groups of scored rollouts
        batch = score(rollouts, roles, config)  # rollout -> reference logprobs, logprobs before the update
        batch, metrics = with_advantages(batch, config)  # score -> advantages
        metrics |= update(roles, batch, config)  # advantage -> new weights
        run.sync(roles.actor)  # weights -> generator
        run.end_step(metrics)


def main(run: Run[GRPOConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    grpo = GRPORun(run)
    grpo.begin(run.config.run.steps)
    train(grpo)
    grpo.finish(GRPO_PANELS)


if __name__ == "__main__":
    start(GRPOConfig, main, "grpo", sys.argv[1:])
