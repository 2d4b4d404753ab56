"""Conditional SFT: rewards are written into the prompts, the model learns from all answers, and is asked for the best.

python launch/conditional.py --config launch/configs/conditional_smollm2.toml
torchrun --nproc-per-node 8 launch/conditional.py --config my.toml --condition.buckets 5 --reward.models DIR
torchrun ... launch/conditional.py --resume runs/conditional

A run that was killed while it scored its rows goes on with the scoring.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import json
import math
import sys
from dataclasses import replace
from typing import Any, cast

from common.chunks import ChunkStore
from common.online import say_encoders
from common.run import Run, start
from common.supervised import SupervisedRun, supervised_run
from report.curves import SFT_PANELS, answer_table, completion_table, response_text
from trialign.algorithms.batch import Rollout, from_rollouts, response_texts
from trialign.algorithms.config.conditional import ConditionalConfig, check_conditional
from trialign.algorithms.data.conditional import ConditionedRows, Rewarded, as_rollouts, read_rewarded
from trialign.algorithms.data.dialogues import Encoder, Sample, pack_samples
from trialign.algorithms.data.sources import RowReader
from trialign.algorithms.rewards.encoder import Policy, reward_encoders
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.roles.build import build_decoder, load_tokenizer, read_shape
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.sync import sample
from trialign.algorithms.sft import held_out_loss, sft_step
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.parallel.collectives import gather_objects
from trialign.models.hf.tokenizer import stop_ids

FACTS = {"loss": "loss {:.4f}", "eval_loss": "held out {:.4f}", "epoch": "epoch {:.2f}"}


class Rewards:
    """The rewards of rows and of answers: scorers where the config gives any, a column of the data otherwise."""

    def __init__(self, run: Run[ConditionalConfig]):
        self.run, config = run, run.config
        self.config, folder = config, config.model.path
        self.shape = run.on_all_ranks(lambda: read_shape(folder, config.parallel, config.run, "lm", config.lora))
        self.tokenizer = run.on_all_ranks(lambda: load_tokenizer(folder, self.shape))
        self.ends = run.on_all_ranks(lambda: stop_ids(folder, self.shape, self.tokenizer))
        policy = Policy(folder, self.shape, self.tokenizer, config.data.chat_template)
        encoders = run.on_all_ranks(lambda: reward_encoders(config.reward.models, policy))
        say_encoders(encoders, run.mesh.is_main)
        self.scorer = Scorer(config.reward, self.tokenizer, run.mesh, encoders)
        run.stack.callback(self.scorer.close)
        asked = ("model", "data", "reward", "run.rows_per_save")
        self.kept = ChunkStore(run, "begun", asked, (*config.data.sources, *config.data.eval_sources))
        self.models: list[Role] = []
        self.too_long: frozenset[str] = frozenset()
        self.reader = RowReader()

    def _model(self, folder: str):
        config = self.config
        shape = read_shape(folder, config.parallel, config.run, "score")
        if config.data.max_tokens > shape.longest_document:
            raise ValueError(
                f"data.max_tokens={config.data.max_tokens}: {folder} has positions for {shape.longest_document}"
            )
        return build_decoder(folder, shape, self.run.mesh, config.model.dtype, head="score", parallel=config.parallel)

    def scores(self, rollouts: list[Rollout]) -> list[float]:
        """One number an answer, NaN where a scorer abstains. Collective."""
        batch = from_rollouts(rollouts).to(self.run.mesh.device)
        return self.scorer.combined(self.scorer(rollouts, batch, self.models))

    def rows(self) -> dict[str, list[Rewarded]]:
        """The rows of every source with their rewards, which a resumed run finds in its folder. Collective."""
        config, run = self.config, self.run
        data, given = config.data, not config.reward.names
        sources = dict.fromkeys((*data.sources, *data.eval_sources))
        rows = run.on_all_ranks(
            lambda: {source: read_rewarded(source, data, given, self.reader) for source in sources}, "rows"
        )
        if given:
            return rows
        every = [row for own in rows.values() for row in own]
        samples = run.on_all_ranks(
            lambda: list(Encoder(data, self.tokenizer, self.ends).responses([row.dialogue for row in every])),
            "tokens of the rows",
        )
        short = [i for i, sample in enumerate(samples) if len(sample.tokens) <= data.max_tokens]
        self.too_long = frozenset(sample.where for sample in samples if len(sample.tokens) > data.max_tokens)
        if not short:
            raise ValueError(f"data.sources: all {len(samples)} rows are longer than data.max_tokens={data.max_tokens}")
        self.scorer.check((samples[i].where, every[i].fields) for i in short)
        for path in config.reward.models:
            model = run.on_all_ranks(lambda p=path: self._model(p), path)
            self.models.append(Role(model, sizes=config.update))
        rows_left, samples = [every[i] for i in short], [samples[i] for i in short]
        self.found = self._before(samples) or self._scored(rows_left, samples)
        return {
            source: [replace(row, reward=self.found.get(row.dialogue.where)) for row in own]
            for source, own in rows.items()
        }

    def _scored(self, rows: list[Rewarded], samples: list[Sample]) -> dict[str, float | None]:
        """Where a row was read -> its reward, None for want of one; in parts that are kept as they come."""
        self.kept.check()
        found: dict[str, float | None] = {}
        size = self.config.run.rows_per_save
        for part, begin in enumerate(range(0, len(rows), size)):
            known = self.kept.read(f"part_{part}")
            if known is None:
                rollouts = as_rollouts(rows[begin : begin + size], samples[begin : begin + size])
                scores = self.scores(rollouts)
                known = [(r.prompt.source, None if math.isnan(s) else s) for r, s in zip(rollouts, scores, strict=True)]
                self.kept.write(f"part_{part}", known)
                for reason in self.scorer.failures():  # there are none but on the first rank
                    print(f"abstains: {reason}")
                if self.run.mesh.is_main:
                    print(f"{begin + len(known)} of {len(rows)} rows are scored", flush=True)
            found |= dict(known)
        return found

    def _before(self, samples: list[Sample]) -> dict[str, float | None] | None:
        """The rewards that the run was begun with, where it goes on from a checkpoint: by place, for data may move."""
        path, kept = self.run.folder / "rewards.json", None
        if self.run.record.checkpoint is not None and self.run.mesh.is_main and path.exists():
            kept = list(json.loads(path.read_text(encoding="utf-8")).values())
        kept = gather_objects(kept, self.run.mesh.world)[0]
        if kept is None:
            return None
        if len(kept) != len(samples):
            raise ValueError(f"{path}: rewards of {len(kept)} rows, and data.sources have {len(samples)}")
        return {sample.where: reward for sample, reward in zip(samples, kept, strict=True)}


def answers(work: SupervisedRun[ConditionedRows], rewards: Rewards) -> list[list[Any]]:
    """[prompt, answer in the data, the model's greedy answer to the prompt that asks for the best, its reward or None]
    of the first `run.show` rows. Collective."""
    run, model, mesh = work.run.config.run, work.learner.model, work.run.mesh
    longest = work.shape.longest_rollout
    prompts = [row for row in work.rows.prompts(run.show) if len(row[0].tokens) < longest]
    if not prompts:
        return []
    room = longest - max(len(prompt.tokens) for prompt, _ in prompts)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=max(1, min(run.show_tokens, room)), stop_ids=work.ends)
    with work.run.progress.work("answers"):
        rollouts = sample(EmbeddedGenerator(model, mesh, max_running=len(prompts)), [p for p, _ in prompts], greedy)
    texts = response_texts(rollouts, work.tokenizer)
    texts = [response_text(text, rollout.finish) for text, rollout in zip(texts, rollouts, strict=True)]
    wanted = work.tokenizer.batch_decode([answer for _, answer in prompts], skip_special_tokens=True)
    scores = rewards.scores(rollouts) if rewards.config.reward.names else [None] * len(rollouts)
    return [list(row) for row in zip((p.text for p, _ in prompts), wanted, texts, scores, strict=True)]


def main(run: Run[ConditionalConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and a table of answers in the run's folder."""
    config, mesh = run.config, run.mesh
    rewards = Rewards(run)
    rows = rewards.rows()

    def read(tokenizer, ends) -> ConditionedRows:
        seed, too_long, reader = config.run.seed, rewards.too_long, rewards.reader
        return ConditionedRows(config.data, config.condition, rows, tokenizer, ends, seed, too_long, reader)

    work = supervised_run(run, config.data, read)
    learner, data = work.learner, work.rows
    unseen = pack_samples(data.held_out).to(mesh.device) if data.held_out else None
    measure = lambda batch: {"eval_loss": held_out_loss(learner, batch)}  # noqa: E731
    work.begin(facts=FACTS)
    if config.reward.names:
        run.remember("rewards.json", lambda: rewards.found)
    before = run.remember("before.json", lambda: answers(work, rewards))

    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch = pack_samples(data.next(config.update.batch_size)).to(mesh.device)
        metrics = work.epoch()

        with run.phases("update") as phase:
            metrics |= sft_step(learner, batch)
            work.count(phase, batch, passes=3)

        metrics |= work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

    rewards.kept.drop()
    after = answers(work, rewards)
    run.progress.say(f"answers are asked for with {data.best} as the reward in the prompt")
    run.finish(SFT_PANELS, *([table(before, after)] if after else []))


def table(before: list[list[Any]], after: list[list[Any]]):
    """Answers before and after: with their rewards where there are scorers, else beside what is in the data."""
    count = min(len(before), len(after))  # a resume may ask for more
    if after[0][3] is None:
        return answer_table([row[:3] for row in before[:count]], [row[:3] for row in after[:count]])
    return completion_table(*(cast(Any, [(p, text, s) for p, _, text, s in rows[:count]]) for rows in (before, after)))


if __name__ == "__main__":
    start(ConditionalConfig, check_conditional, main, "conditional", sys.argv[1:])
