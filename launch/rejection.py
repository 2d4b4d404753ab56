"""Rejection sampling and iterative DPO in rounds: sample, score, pick, learn; on any number of ranks.

python launch/rejection.py --config launch/configs/rejection_smollm2.toml
torchrun --nproc-per-node 8 launch/rejection.py --config my.toml --rejection.method dpo --optimizer.lr 5e-7
torchrun ... launch/rejection.py --resume runs/rejection

The model samples with the weights that learn. Each round's responses are kept in RUN/rounds; a killed run resumes
within its round.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import shutil
import sys
from statistics import fmean
from typing import Any, cast

import torch
from common.online import OnlineRun
from common.run import Run, start
from report.panels import REJECTION_PANELS
from trialign.algorithms.batch import Batch, response_texts
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.data.dialogues import pack_samples
from trialign.algorithms.data.responses import (
    Response,
    make_responses,
    pick,
    picked_pairs,
    picked_samples,
    read_responses,
    rows_of_step,
    write_responses,
)
from trialign.algorithms.dpo import dpo_step, reference_sums, with_reference
from trialign.algorithms.reward_model import pack_pairs
from trialign.algorithms.rewards.rewards import reward_metrics
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_decoder, build_learner, read_shapes
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.sync import sample
from trialign.algorithms.sft import sft_step

PROGRESS = {"round": "round {:.0f}", "reward": "reward {:.3f}", "reward_picked": "picked {:.3f}", "loss": "loss {:.4f}"}


class RejectionRun(OnlineRun):
    """Prompts, rewards and policy of rejection sampling, and the state that checkpoints hold."""

    def __init__(self, run: Run[RejectionConfig]):
        config, folder = run.config, run.config.model.path
        shapes = run.on_all_ranks(lambda: read_shapes(cast(Any, config)))
        super().__init__(run, config, shapes[folder], seed=config.run.seed, shown=config.run.show)
        self.shaper = RewardShaper(config.reward.clip, config.reward.missing_eos_penalty)
        self.config, self.per_round, self.first_step = config, config.steps_per_round, 0
        options = {"trained": True, "parallel": config.parallel, "lora": config.lora, "seed": config.run.seed}
        build = lambda: build_decoder(folder, shapes[folder], run.mesh, config.model.dtype, **options)  # noqa: E731
        policy = run.on_all_ranks(build, "model")
        frozen = [run.load_frozen(path, shapes[path], "score") for path in config.reward.models]
        models = [Role(model, sizes=config.update, profiler=run.phases) for model in frozen]
        self.total_steps = config.rejection.rounds * self.per_round
        options = {"ema_decay": config.update.ema_decay, "sizes": config.update, "profiler": run.phases}
        self.learner = build_learner(policy, config.optimizer, self.total_steps, **options)
        self.attach(self.learner, models)
        self.learners = {"actor": (self.learner, folder)}
        self.parts = {"data": self.dataset}

    def responses(self, number: int) -> tuple[list[Response], dict[str, float]]:
        """A round's responses and their metrics. Collective.

        A resumed run reads those of its current round from its folder.
        """
        run = self.run
        path, within = run.folder / "rounds" / f"round_{number}.jsonl", run.step % self.per_round > 0
        resumed = run.record.found is not None and run.step == self.first_step
        if resumed and not within:  # sampled with other options than before
            resumed = not any(change.startswith(("model.", "rollout.", "reward.")) for change in run.record.changes)
        kept = run.on_main_rank(lambda: read_responses(path) if resumed and path.exists() else None)
        if kept is None and within:
            raise ValueError(f"{path}: does not exist, but the run resumes within this round")
        prompts = [] if within else self.dataset.next(self.config.rejection.prompts_per_round)
        if kept is not None:
            return kept, {}
        with run.phases("rollout"):  # prompt -> responses
            count = self.config.rollout.samples_per_prompt
            rollouts = sample(self.generator, prompts, self.sampling, count)
        with run.phases("score"):  # responses -> rewards
            scores = self.scores(rollouts)
            combined = self.scorer.combined(scores)
            self.print_failures()
            rewards = self.shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
            texts = response_texts(rollouts, self.tokenizer)
            responses = make_responses(rollouts, texts, rewards, scores)
            pick(responses, [rollout.prompt.index for rollout in rollouts], self.config.rejection.method)
            self._add_references(responses)
        if self.mesh.is_main:
            write_responses(path, responses)
        best = [response.reward for response in responses if response.picked == "best" and response.reward is not None]
        about = {"reward_picked": fmean(best), "picked": sum(bool(response.picked) for response in responses)}
        return responses, reward_metrics(rollouts, scores, combined, rewards) | about

    def _add_references(self, responses: list[Response]) -> None:
        """Adds log-probabilities under the policy, which is the round's reference, where DPO needs them. Collective."""
        if self.config.rejection.method == "dpo" and not self.config.loss.reference_free:
            pairs, _ = picked_pairs(responses)
            sums = iter(reference_sums(self.learner, pairs, self.config.update.batch_size).view(-1, 2).T.tolist())
            for picked in ("best", "worst"):
                for response, value in zip([a for a in responses if a.picked == picked], next(sums), strict=True):
                    response.reference = value

    def batch(self, responses: list[Response], number: int, step: int) -> Batch:
        """The batch of a step of a round."""
        config = self.config
        if config.rejection.method == "sft":
            samples = picked_samples(responses)
            mine = rows_of_step(len(samples), config.run.seed, number, step, config.update.batch_size)
            return pack_samples([samples[i] for i in mine])
        pairs, sums = picked_pairs(responses)
        mine = rows_of_step(len(pairs), config.run.seed, number, step, config.update.batch_size)
        return with_reference(pack_pairs([pairs[i] for i in mine]), torch.tensor([sums[i] for i in mine]).flatten())


def train(rejection: RejectionRun) -> None:
    """Rounds from the run's current step to its last."""
    run, config, learner, responses = rejection.run, rejection.config, rejection.learner, []
    rejection.first_step = run.step
    for step in run.steps():
        number, place = divmod(step, rejection.per_round)
        metrics: dict[str, float] = {}
        if not responses or place == 0:
            rejection.generator.load(learner.model, step)  # weights -> generator
            responses, metrics = rejection.responses(number)  # prompt -> scored responses
        batch = rejection.batch(responses, number, place).to(run.mesh.device)
        with run.phases("update", tokens=len(batch.tokens), epochs=1):
            if config.rejection.method == "sft":
                metrics |= sft_step(learner, batch)
            else:
                metrics |= dpo_step(learner, batch, config.loss)
        run.end_step({"round": number} | metrics)


def main(run: Run[RejectionConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    rejection = RejectionRun(run)
    if run.record.checkpoint is None and run.record.changes and run.mesh.is_main:  # sampled with other options
        shutil.rmtree(run.folder / "rounds", ignore_errors=True)
    about = f"{rejection.about}; {rejection.per_round} steps a round"
    rejection.begin(rejection.total_steps, about, PROGRESS)
    train(rejection)
    rejection.finish(REJECTION_PANELS)


if __name__ == "__main__":
    start(RejectionConfig, main, "rejection", sys.argv[1:])
