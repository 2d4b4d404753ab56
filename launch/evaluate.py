"""Evaluation of a model, or of two side by side: rewards of responses to prompts, pass@k, win rate, perplexity.

python launch/evaluate.py --config launch/configs/evaluate_smollm2.toml
torchrun --nproc-per-node 8 launch/evaluate.py --model.path DIR --model.baseline DIR2 --data.sources prompts.jsonl \
    --reward.functions rewards.py:score --rollout.samples_per_prompt 8 --metrics.pass_at_k 1 4

Every completion is a line of RUN/completions.jsonl, every number of the table is in RUN/results.json. An evaluation
that was killed is resumed by --run.resume auto.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import gc
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from common.chunks import ChunkStore
from common.online import OnlineRun
from common.run import Run, start
from report.tables import estimate_table, sample_table
from rich.console import Console
from trialign.algorithms.batch import Batch, Prompt, response_texts
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import DialogueDataset, joined, pack_samples
from trialign.algorithms.data.documents import TextStream, pack_documents
from trialign.algorithms.data.responses import score_or_none
from trialign.algorithms.data.text_files import write_jsonl
from trialign.algorithms.metrics import Estimate, mean_of_prompts, nats_a_token, pass_at_k, perplexity, wilson, win_rate
from trialign.algorithms.roles.build import load_tokenizer, read_shape
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.sync import sample
from trialign.engine.storage.atomic import write_text
from trialign.models.config import ModelConfig
from trialign.models.hf.tokenizer import stop_ids

Estimates = dict[str, Estimate]
Completions = list[dict[str, Any]]
CHUNK = 256  # rows of text or dialogues that are packed at once


class Evaluated:
    """A model that is evaluated: its completions and perplexities."""

    def __init__(self, run: Run[Any], folder: str):
        self.run, self.mesh, self.folder = run, run.mesh, folder
        self.config: EvaluateConfig = run.config
        self.sizes = UpdateConfig(micro_batch_size=self.config.run.micro_batch_size)
        self.shape = run.on_all_ranks(self._read_shape)
        self.tokenizer = run.on_all_ranks(lambda: load_tokenizer(folder, self.shape))

    @cached_property
    def role(self) -> Role:
        """The model, loaded at its first use: after everything that could refuse the data. Collective."""
        return Role(self.run.load_frozen(self.folder, self.shape), sizes=self.sizes)

    def _read_shape(self) -> ModelConfig:
        """The model's shape, with room for every row."""
        config, run = self.config, cast(Any, self.config.run)
        shape = read_shape(self.folder, config.parallel, run, "lm")
        lengths = {
            "data.max_prompt_tokens + rollout.max_new_tokens": bool(config.data.sources)
            * (config.data.max_prompt_tokens + config.rollout.max_new_tokens),
            "text.max_tokens": bool(config.text.sources) * config.text.max_tokens,
            "dialogues.max_tokens": bool(config.dialogues.sources) * config.dialogues.max_tokens,
        }
        for option, longest in lengths.items():
            positions = shape.longest_rollout if "rollout" in option else shape.longest_document
            if longest > positions:
                raise ValueError(f"{option} = {longest}: {self.folder} has positions for {positions}")
        return shape

    def complete(self, chunks: ChunkStore, name: str) -> int:
        """Writes every completion with its rewards as chunks NAME_part_0, ...; returns their number. Collective."""
        config, run = self.config, self.run
        own = replace(config, model=replace(config.model, path=self.folder))
        online = OnlineRun(run, cast(Any, own), self.shape, seed=config.run.seed)
        role = self.role
        read = lambda path: read_shape(path, config.parallel, cast(Any, config.run), "score")  # noqa: E731
        shapes = run.on_all_ranks(lambda: {path: read(path) for path in config.reward.models})
        models = [run.load_frozen(path, shape, "score") for path, shape in shapes.items()]
        online.attach(cast(Any, role), [Role(model, sizes=self.sizes, by_length=False) for model in models])
        available = online.dataset.rows - online.dataset.dropped
        self._print(online.about)
        count, size = min(config.data.limit or available, available), config.run.prompts_per_save
        begins = range(0, count, size)
        for part, begin in enumerate(begins):
            prompts = online.dataset.next(min(size, count - begin))
            if chunks.read(f"{name}_part_{part}") is None:
                chunks.write(f"{name}_part_{part}", self._rows(online, prompts))
        online.scorer.close()
        return len(begins)

    def _rows(self, online: OnlineRun, prompts: list[Prompt]) -> Completions:
        """The completions of some prompts as rows of completions.jsonl. Collective."""
        config = self.config
        work = self.run.progress.task
        with work("rollout"):
            rollouts = sample(online.generator, prompts, online.sampling, config.rollout.samples_per_prompt)
        scores, rewards = {}, [None] * len(rollouts)
        if config.reward.names:
            with work("score"):
                scores = online.scores(rollouts)
            rewards = online.scorer.combined(scores)
            for reason in online.scorer.failures():  # [] but on the main rank
                self._print(f"not scored: {reason}")
        texts = response_texts(rollouts, self.tokenizer)
        return [
            {
                "model": self.folder,
                "prompt": rollout.prompt.text,
                "source": rollout.prompt.source,
                "sample": i % config.rollout.samples_per_prompt,
                "completion": text,
                "tokens": rollout.length,
                "finish": rollout.finish,
                "reward": score_or_none(rewards[i]),
                "rewards": {name: score_or_none(values[i]) for name, values in scores.items()},
            }
            for i, (rollout, text) in enumerate(zip(rollouts, texts, strict=True))
        ]

    def perplexities(self) -> dict[str, Estimate]:
        """Perplexity of the text and of the dialogues, where they are given. Collective."""
        found = {}
        for name, rows in (("text", self._text), ("dialogues", self._dialogues)):
            if getattr(self.config, name).sources:
                batches = rows()
                with self.run.progress.task(f"perplexity of {name}"):
                    loss = nats_a_token(self.role, batches)
                found[f"perplexity of {name}"] = Estimate(perplexity(loss), math.nan, math.nan)
        return found

    def _text(self) -> Iterator[Batch]:
        rows = self.run.on_all_ranks(lambda: TextStream(self.config.text, self.tokenizer), "text")
        self._print(rows)
        whole = list(rows.rows())
        return (pack_documents(whole[i : i + CHUNK]) for i in range(0, len(whole), CHUNK))

    def _dialogues(self) -> Iterator[Batch]:
        ends = self.run.on_all_ranks(lambda: stop_ids(self.folder, self.shape, self.tokenizer))
        rows = self.run.on_all_ranks(lambda: DialogueDataset(self.config.dialogues, self.tokenizer, ends), "dialogues")
        self._print(rows)
        whole = joined(rows.rows())
        return (pack_samples(whole[i : i + CHUNK]) for i in range(0, len(whole), CHUNK))

    def _print(self, text: object) -> None:
        if self.mesh.is_main:
            print(f"{self.folder}: {text}")


def by_prompt(responses: Completions) -> dict[str, list[float]]:
    """Source and line of a prompt -> the rewards of its responses that have one."""
    groups: dict[str, list[float]] = {}
    for response in responses:
        own = groups.setdefault(response["source"], [])
        if response["reward"] is not None:
            own.append(response["reward"])
    return groups


def measured(responses: Completions, config: EvaluateConfig) -> Estimates:
    """Metrics of one model's responses."""
    numbers: Estimates = {}
    groups = by_prompt(responses)
    if means := [math.fsum(own) / len(own) for own in groups.values() if own]:
        numbers["reward"] = mean_of_prompts(means)
    for k in config.metrics.pass_at_k:
        enough = [own for own in groups.values() if len(own) >= k]
        passed = [pass_at_k(len(own), sum(r >= config.metrics.pass_threshold for r in own), k) for own in enough]
        if passed:
            numbers[f"pass@{k}"] = wilson(math.fsum(passed) / len(passed), len(passed))
        if left_out := len(groups) - len(enough):
            numbers[f"prompts with fewer than {k} scored responses"] = Estimate(left_out, math.nan, math.nan)
    if missing := sum(response["reward"] is None for response in responses if config.reward.names):
        numbers["responses without a score"] = Estimate(missing, math.nan, math.nan)
    lengths = [float(response["tokens"]) for response in responses]
    ended = [float(response["finish"] == "stop") for response in responses]
    numbers["tokens per response"] = Estimate(math.fsum(lengths) / len(lengths), math.nan, math.nan)
    numbers["ended by themselves"] = Estimate(math.fsum(ended) / len(ended), math.nan, math.nan)
    return numbers


def measure(run: Run[Any], chunks: ChunkStore, name: str, folder: str) -> tuple[Completions, Estimates]:
    """A model's completions and metrics; the model is freed at the end. Collective."""
    config: EvaluateConfig = run.config
    rows = chunks.read(f"{name}_measured")
    if rows is None:
        model = Evaluated(run, folder)
        parts = model.complete(chunks, name) if config.data.sources else 0
        rows = [{"parts": parts, "perplexities": model.perplexities()}]
        chunks.write(f"{name}_measured", rows)
        del model
        gc.collect()  # modules and their hooks refer to each other
    (about,) = rows
    responses = [response for part in range(about["parts"]) for response in chunks.read(f"{name}_part_{part}") or ()]
    numbers = measured(responses, config) if responses else {}
    return responses, numbers | {name: Estimate(*number) for name, number in about["perplexities"].items()}


def main(run: Run[Any]) -> None:
    """Evaluates each model, then writes and prints the results."""
    config: EvaluateConfig = run.config
    folders = [folder for folder in (config.model.path, config.model.baseline) if folder]
    asked = ("model", "data", "text", "dialogues", "rollout", "reward", "metrics", "run.seed", "run.prompts_per_save")
    sources = (*config.data.sources, *config.text.sources, *config.dialogues.sources)
    chunks = ChunkStore(run, "begun", asked, sources)
    chunks.check()
    if run.record.results:
        return run.record.print_finished()
    results: dict[str, Estimates] = {}
    responses: dict[str, Completions] = {}
    for name, folder in zip(("model", "against"), folders, strict=False):
        responses[folder], results[folder] = measure(run, chunks, name, folder)
    if len(folders) == 2 and config.data.sources:
        model, against = (by_prompt(responses[folder]) for folder in folders)
        both = [source for source in model if model[source] and against.get(source)]
        if both:
            won = win_rate([model[source] for source in both], [against[source] for source in both])
            results[folders[0]]["win rate"] = won
            results[folders[1]]["win rate"] = Estimate(1 - won.value, 1 - won.high, 1 - won.low)
    if run.mesh.is_main:
        write(run.folder, responses, results)
        Console(highlight=False).print(
            estimate_table(results), sample_table([a for own in responses.values() for a in own[: config.run.show]])
        )
        print(f"completions: {run.folder / 'completions.jsonl'}\nresults:     {run.folder / 'results.json'}")
        run.record.write_finished(run.step, completions="completions.jsonl", results="results.json")
    chunks.drop(keep=("asked",))


def write(folder: Path, responses: dict[str, Completions], results: dict[str, Estimates]) -> None:
    """Writes completions.jsonl and results.json, each atomically."""
    write_jsonl(folder / "completions.jsonl", (response for own in responses.values() for response in own))
    table = {
        model: {name: {key: score_or_none(v) for key, v in value._asdict().items()} for name, value in numbers.items()}
        for model, numbers in results.items()
    }
    write_text(folder / "results.json", json.dumps(table, indent=1))


if __name__ == "__main__":
    cls: Any = EvaluateConfig  # its run has no steps, unlike ScriptConfig's
    start(cls, main, "evaluate", sys.argv[1:])
