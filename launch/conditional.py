"""Conditional SFT: rewards are written into the prompts, and the trained model is prompted with the best one.

python launch/conditional.py --config launch/configs/conditional_smollm2.toml
torchrun --nproc-per-node 8 launch/conditional.py --config my.toml --condition.buckets 5 --reward.models DIR
torchrun ... launch/conditional.py --resume runs/conditional

A run that was killed while it scored its rows resumes the scoring.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import json
import math
import sys
from dataclasses import replace
from typing import Any, cast

from common.chunks import ChunkStore
from common.online import build_scorer
from common.run import Run, start
from common.supervised import SupervisedTask
from report.panels import SFT_PANELS
from report.tables import response_table, reward_table
from trialign.algorithms.batch import Rollout, from_rollouts
from trialign.algorithms.config.conditional import ConditionalConfig
from trialign.algorithms.data.conditional import ConditionedRows, Rewarded, as_rollouts, read_rewarded
from trialign.algorithms.data.dialogues import Encoder, Sample, pack_samples
from trialign.algorithms.data.sources import RowReader
from trialign.algorithms.roles.build import load_tokenizer, read_shape
from trialign.algorithms.roles.role import Role
from trialign.algorithms.sft import eval_loss, sft_step
from trialign.models.config import ModelConfig
from trialign.models.hf.tokenizer import stop_ids

PROGRESS = {"loss": "loss {:.4f}", "eval_loss": "eval loss {:.4f}", "epoch": "epoch {:.2f}"}


class RowRewards:
    """Rewards of rows and of sampled responses: by the config's scorers or, without scorers, a column of the data."""

    def __init__(self, run: Run[ConditionalConfig]):
        self.run, config = run, run.config
        self.config, folder = config, config.model.path
        self.shape = run.on_all_ranks(lambda: read_shape(folder, config.parallel, config.run, "lm", config.lora))
        self.tokenizer = run.on_all_ranks(lambda: load_tokenizer(folder, self.shape))
        self.ends = run.on_all_ranks(lambda: stop_ids(folder, self.shape, self.tokenizer))
        self.scorer = build_scorer(run, cast(Any, config), self.shape, self.tokenizer)
        asked = ("model", "data", "reward", "run.rows_per_save")
        self.chunks = ChunkStore(run, "begun", asked, (*config.data.sources, *config.data.eval_sources))
        self.models: list[Role] = []
        self.too_long: frozenset[str] = frozenset()
        self.reader = RowReader(config.data.reader)

    def _reward_shape(self, folder: str) -> ModelConfig:
        config = self.config
        shape = read_shape(folder, config.parallel, config.run, "score")
        if config.data.max_tokens > shape.longest_document:
            raise ValueError(
                f"data.max_tokens={config.data.max_tokens}: {folder} has positions for {shape.longest_document}"
            )
        return shape

    def scores(self, rollouts: list[Rollout]) -> list[float]:
        """One number a response, NaN without a score. Collective."""
        batch = from_rollouts(rollouts).to(self.run.mesh.device)
        return self.scorer.combined(self.scorer(rollouts, batch, self.models))

    def rows(self) -> dict[str, list[Rewarded]]:
        """The rows of every source with their rewards; a resumed run reads these from its folder. Collective."""
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
            shape = run.on_all_ranks(lambda p=path: self._reward_shape(p))
            self.models.append(Role(run.load_frozen(path, shape, "score"), sizes=config.update))
        rows_left, samples = [every[i] for i in short], [samples[i] for i in short]
        self.found = self._read_rewards(samples) or self._score(rows_left, samples)
        return {
            source: [replace(row, reward=self.found.get(row.dialogue.where)) for row in own]
            for source, own in rows.items()
        }

    def _score(self, rows: list[Rewarded], samples: list[Sample]) -> dict[str, float | None]:
        """Source and line of a row -> its reward, None where it has none; finished chunks are kept."""
        self.chunks.check()
        found: dict[str, float | None] = {}
        size = self.config.run.rows_per_save
        for part, begin in enumerate(range(0, len(rows), size)):
            scored = self.chunks.read(f"part_{part}")
            if scored is None:
                rollouts = as_rollouts(rows[begin : begin + size], samples[begin : begin + size])
                scores = self.scores(rollouts)
                scored = [
                    (r.prompt.source, None if math.isnan(s) else s) for r, s in zip(rollouts, scores, strict=True)
                ]
                self.chunks.write(f"part_{part}", scored)
                for reason in self.scorer.failures():  # [] but on the main rank
                    print(f"not scored: {reason}")
                if self.run.mesh.is_main:
                    print(f"{begin + len(scored)} of {len(rows)} rows are scored", flush=True)
            found |= dict(scored)
        return found

    def _read_rewards(self, samples: list[Sample]) -> dict[str, float | None] | None:
        """Rewards of a run that resumes from a checkpoint, in the order of the rows: their paths may have changed."""
        run, path = self.run, self.run.folder / "rewards.json"
        if run.record.checkpoint is None:
            return None
        rewards = run.on_main_rank(lambda: [*json.loads(path.read_text("utf-8")).values()] if path.exists() else None)
        if rewards is None:
            return None
        if len(rewards) != len(samples):
            raise ValueError(f"{path}: rewards of {len(rewards)} rows, and data.sources have {len(samples)}")
        return {sample.where: reward for sample, reward in zip(samples, rewards, strict=True)}


def responses(task: SupervisedTask[ConditionedRows], rewards: RowRewards) -> list[list[Any]]:
    """[prompt, response in the data, greedy response to the prompt with the best reward, its reward or None] of the
    first `run.show` rows. Collective."""
    rows, rollouts = task.greedy_responses(task.rows.prompts(task.config.run.show))
    scores = rewards.scores(rollouts) if rollouts and rewards.config.reward.names else [None] * len(rollouts)
    return [[*row, score] for row, score in zip(rows, scores, strict=True)]


def main(run: Run[ConditionalConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    config, mesh = run.config, run.mesh
    rewards = RowRewards(run)
    rows = rewards.rows()

    def read(tokenizer, ends) -> ConditionedRows:
        seed, too_long, reader = config.run.seed, rewards.too_long, rewards.reader
        return ConditionedRows(config.data, config.condition, rows, tokenizer, ends, seed, too_long, reader)

    task = SupervisedTask(run, config.data, read)
    learner, data = task.learner, task.rows
    eval_batch = pack_samples(data.eval_rows).to(mesh.device) if data.eval_rows else None
    task.begin(eval_batch, lambda batch: {"eval_loss": eval_loss(learner, batch)}, PROGRESS)
    if config.reward.names:
        run.remember("rewards.json", lambda: rewards.found)
    before = run.remember("before.json", lambda: responses(task, rewards))

    for _ in run.steps():
        batch = pack_samples(data.next(config.update.batch_size)).to(mesh.device)  # rows -> batch
        with task.update(batch):
            metrics = sft_step(learner, batch)  # batch -> new weights
        task.end_step(metrics)

    rewards.chunks.drop()
    after = responses(task, rewards)
    run.progress.print(f"responses are sampled with {data.target_reward} as the reward in the prompt")
    run.finish(SFT_PANELS, *([table(before, after)] if after else []))


def table(before: list[list[Any]], after: list[list[Any]]):
    """Responses before and after: with their rewards where there are scorers, else beside those in the data."""
    count = min(len(before), len(after))  # a resume may show more
    if after[0][3] is None:
        return response_table([row[:3] for row in before[:count]], [row[:3] for row in after[:count]])
    return reward_table(*(cast(Any, [(p, text, s) for p, _, text, s in rows[:count]]) for rows in (before, after)))


if __name__ == "__main__":
    start(ConditionalConfig, main, "conditional", sys.argv[1:])
