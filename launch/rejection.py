"""Rejection sampling and iterative DPO in rounds: answer, score, pick, learn; on any number of ranks.

python launch/rejection.py --config launch/configs/rejection_smollm2.toml
torchrun --nproc-per-node 8 launch/rejection.py --config my.toml --round.method dpo --optimizer.lr 5e-7
torchrun ... launch/rejection.py --resume runs/rejection

One process does it all: the model answers with the very weights that learn. Each round's answers are kept in
RUN/rounds; a killed run goes on within its round.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import shutil
import sys
from statistics import fmean
from typing import Any, cast

import torch
from common.online import OnlineRun
from common.run import Run, start
from report.curves import Line, Panel
from report.tables import reward_table
from trialign.algorithms.batch import Batch, response_texts
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.data.dialogues import pack_samples
from trialign.algorithms.data.responses import (
    Response,
    RoundSizes,
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
from trialign.engine.parallel.collectives import gather_objects
from trialign.models.flops import forward_flops

FACTS = {"round": "round {:.0f}", "reward": "reward {:.3f}", "reward_picked": "picked {:.3f}", "loss": "loss {:.4f}"}
PANELS = (
    Panel(
        "Reward",
        "mean over a round's answers",
        (Line("reward", "#0f766e", "all", exact=True), Line("reward_picked", "#4338ca", "the best", exact=True)),
    ),
    Panel("Loss", "of the step", (Line("loss", "#be123c"),)),
    Panel("Answers", "tokens", (Line("response_length", "#b45309", exact=True),)),
    Panel("Gradient norm", "before clipping", (Line("grad_norm", "#475569"),)),
)


class RejectionRun(OnlineRun):
    """What rejection sampling works with: prompts, rewards, the policy; and what of it a checkpoint holds."""

    def __init__(self, run: Run[RejectionConfig]):
        config, mesh = run.config, run.mesh
        shapes = run.on_all_ranks(lambda: read_shapes(cast(Any, config)))
        super().__init__(run, config, config.run, shapes[config.model.path])
        self.shaper = RewardShaper(config.reward.clip, config.reward.missing_eos_penalty)
        self.config, self.per_round, self.first_step = config, config.steps_per_round, 0
        options = {"parallel": config.parallel, "lora": config.lora, "seed": config.run.seed}

        def build(folder: str, head: Any, trained: bool):
            return build_decoder(
                folder, shapes[folder], mesh, config.model.dtype, head=head, trained=trained, **options
            )

        policy = run.on_all_ranks(lambda: build(config.model.path, "lm", True), "model")
        frozen = [run.on_all_ranks(lambda f=f: build(f, "score", False), f) for f in config.reward.models]
        models = [Role(model, sizes=config.update) for model in frozen]
        self.total_steps = config.round.count * self.per_round
        options = {"ema_decay": config.update.ema_decay, "sizes": config.update}
        self.learner = build_learner(policy, config.optimizer, self.total_steps, **options)
        self.attach(self.learner, models)
        responses = config.round.prompts * config.rollout.samples_per_prompt
        rounds = RoundSizes(config.round.method, self.per_round, responses)
        self.parts = {"data": self.dataset, "rounds": rounds}

    def answers(self, run: Run[RejectionConfig], number: int) -> tuple[list[Response], dict[str, float]]:
        """A round's answers, and what they were like. Collective.

        The round in which a run is resumed is found in its folder, made by the weights of the checkpoint if none of its
        steps is done: what is written next is the checkpoint after its first ones.
        """
        path, begun = run.folder / "rounds" / f"round_{number}.jsonl", run.step % self.per_round > 0
        resumed = run.record.found is not None and run.step == self.first_step
        if resumed and not begun:  # to be answered in another way
            resumed = not any(change.startswith(("model.", "rollout.", "reward.")) for change in run.record.changes)
        mine = read_responses(path) if resumed and self.mesh.is_main and path.exists() else None
        kept = gather_objects(mine, self.mesh.world)[0]
        if kept is None and begun:
            raise ValueError(f"{path}: is not there, but the run is to go on within this round")
        prompts = [] if begun else self.dataset.next(self.config.round.prompts)
        if kept is not None:
            return kept, {}
        with run.phases("rollout"):  # prompt -> answers
            count = self.config.rollout.samples_per_prompt
            rollouts = sample(self.generator, prompts, self.sampling, count)
            lengths = [len(rollout.prompt.tokens) + len(rollout.tokens) for rollout in rollouts]
        with run.phases("score") as phase:  # answers -> rewards
            scores = self.scores(rollouts)
            combined = self.scorer.combined(scores)
            self.say_failures(run)
            rewards = self.shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
            texts = response_texts(rollouts, self.tokenizer)
            answers = make_responses(rollouts, texts, rewards, scores)
            pick(answers, [rollout.prompt.index for rollout in rollouts], self.config.round.method)
            self._add_references(answers)
            phase.tokens = sum(lengths)
        if self.mesh.is_main:
            write_responses(path, answers)
        best = [answer.reward for answer in answers if answer.picked == "best" and answer.reward is not None]
        about = {"reward_picked": fmean(best), "picked": sum(bool(answer.picked) for answer in answers)}
        return answers, reward_metrics(rollouts, scores, combined, rewards) | about

    def _add_references(self, answers: list[Response]) -> None:
        """Notes what the policy, which is the round's reference, gives the answers that DPO learns from. Collective."""
        if self.config.round.method == "dpo" and not self.config.loss.reference_free:
            pairs, _ = picked_pairs(answers)
            sums = iter(reference_sums(self.learner, pairs, self.config.update.batch_size).view(-1, 2).T.tolist())
            for picked in ("best", "worst"):
                for answer, value in zip([a for a in answers if a.picked == picked], next(sums), strict=True):
                    answer.reference = value

    def batch(self, answers: list[Response], number: int, step: int) -> Batch:
        """What a step of a round learns from."""
        config = self.config
        if config.round.method == "sft":
            samples = picked_samples(answers)
            mine = rows_of_step(len(samples), config.run.seed, number, step, config.update.batch_size)
            return pack_samples([samples[i] for i in mine])
        pairs, sums = picked_pairs(answers)
        mine = rows_of_step(len(pairs), config.run.seed, number, step, config.update.batch_size)
        return with_reference(pack_pairs([pairs[i] for i in mine]), torch.tensor([sums[i] for i in mine]).flatten())


def train(work: RejectionRun, run: Run[RejectionConfig]) -> None:
    """Rounds from the run's step to its last."""
    config, answers = work.config, []
    for step in run.steps():
        number, place = divmod(step, work.per_round)
        metrics: dict[str, float] = {}
        if not answers or place == 0:
            work.generator.load(work.learner.model, step)
            answers, metrics = work.answers(run, number)
        batch = work.batch(answers, number, place).to(work.mesh.device)

        with run.phases("update") as phase:
            if config.round.method == "sft":
                metrics |= sft_step(work.learner, batch)
            else:
                metrics |= dpo_step(work.learner, batch, config.loss)
            phase.tokens = len(batch.tokens)
            phase.flops = 3 * forward_flops(work.shape, batch.lengths, len(batch.response))

        run.end_step({"round": number} | metrics, tokens=len(batch.tokens))


def main(run: Run[RejectionConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and the table of answers in the run's folder."""
    work = RejectionRun(run)
    learners = {"actor": (work.learner, work.config.model.path)}
    if run.record.checkpoint is None and run.record.changes and run.mesh.is_main:  # answered in another way
        shutil.rmtree(run.folder / "rounds", ignore_errors=True)
    run.begin(
        learners, work.parts, work.total_steps, about=f"{work.about}; {work.per_round} steps a round", facts=FACTS
    )
    work.first_step = run.step
    before = run.remember("before.json", work.answer_shown)
    work.shown = work.shown[: len(before)]  # a resume may ask for more
    train(work, run)
    run.finish(PANELS, reward_table(before[: len(work.shown)], work.answer_shown()))


if __name__ == "__main__":
    start(RejectionConfig, main, "rejection", sys.argv[1:])
