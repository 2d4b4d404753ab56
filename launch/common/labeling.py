"""The stage between fine-tuning and the reward model: a model answers, a scorer labels, and pairs are written.

Answers are kept in parts as they come; a labeling that was killed goes on behind the last part.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from trialign.algorithms.batch import response_texts
from trialign.algorithms.config.rlhf import PreferencesConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.responses import label_pairs, make_responses, read_responses, write_responses
from trialign.algorithms.data.text_files import write_jsonl
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_decoder, read_shapes
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.sync import sample
from trialign.engine.config import flatten
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.storage.atomic import write_text
from trialign.models.config import HeadKind

from .online import OnlineRun
from .run import Run

PLACES = ("model.path", "data.sources", "run.output")  # they move with the run's folder


class Show:
    """Of a run's table at the end, which this stage has none of."""

    def __init__(self, seed: int):
        self.show, self.seed = 0, seed


def main(run: Run[Any]) -> None:
    """Answers the prompts, labels the answers, and leaves pairs to learn from and pairs held out."""
    config: PreferencesConfig = run.config
    mesh, options = run.mesh, config.run
    shapes = run.on_all_ranks(lambda: read_shapes(cast(Any, config)))

    def build(folder: str, head: HeadKind) -> Role:
        layout = {"head": head, "parallel": config.parallel}
        build = lambda: build_decoder(folder, shapes[folder], mesh, config.model.dtype, **layout)  # noqa: E731
        return Role(run.on_all_ranks(build, folder), sizes=UpdateConfig(micro_batch_size=options.micro_batch_size))

    answering = OnlineRun(run, cast(Any, config), Show(options.seed), shapes[config.model.path])
    policy: Any = build(config.model.path, "lm")
    shaper = RewardShaper(config.reward.clip, config.reward.missing_eos_penalty)
    answering.attach(policy, [build(folder, "score") for folder in config.reward.models])
    there = answering.dataset.rows - answering.dataset.dropped
    count = min(options.prompts or there, there)
    done = gather_objects(run.on_all_ranks(lambda: begun(run.folder, config) if mesh.is_main else 0), mesh.world)[0]
    answering.dataset.next(min(count, done * options.prompts_per_save))  # the parts that are there
    parts = -(-count // options.prompts_per_save)
    run.about = answering.about
    progress = run.progress
    progress.start(parts, done=done, formats={"reward": "reward {:.3f}"})
    for part in range(done, parts):
        prompts = answering.dataset.next(min(options.prompts_per_save, count - part * options.prompts_per_save))
        with progress.task("rollout"):
            rollouts = sample(answering.generator, prompts, answering.sampling, config.rollout.samples_per_prompt)
        with progress.task("score"):
            scores = answering.scores(rollouts)
        combined = answering.scorer.combined(scores)
        rewards = shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
        for reason in answering.scorer.failures():
            progress.print(f"abstains: {reason}")
        if mesh.is_main:
            texts = response_texts(rollouts, answering.tokenizer)
            write_responses(run.folder / f"part_{part}.jsonl", make_responses(rollouts, texts, rewards, scores))
            shown = [reward for reward in rewards if reward == reward]
            progress.update(part + 1, {"reward": fmean(shown) if shown else float("nan")})
    run.on_all_ranks(lambda: finish(run.folder, config, parts) if mesh.is_main else None)


def begun(folder: Path, config: PreferencesConfig) -> int:
    """How many parts are there already.

    Raises:
        ValueError: they were made with another config.
    """
    path, now = folder / "begun.json", {k: v for k, v in flatten(config).items() if not k.startswith("parallel.")}
    now = json.loads(json.dumps(now))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for knob in (knob for knob in now if before.get(knob) != now[knob] and knob not in PLACES):
            raise ValueError(
                f"preferences.{knob}={now[knob]}: the answers in {folder} were begun with {before.get(knob)}"
            )
        return len(list(folder.glob("part_*.jsonl")))
    write_text(path, json.dumps(now))
    return 0


def finish(folder: Path, config: PreferencesConfig, parts: int) -> None:
    """Writes train.jsonl and held_out.jsonl, split as the prompts are, and counts.json.

    Raises:
        ValueError: there are no pairs to learn from, or none that are held out.
    """
    answers = [answer for part in range(parts) for answer in read_responses(folder / f"part_{part}.jsonl")]
    counts = {}
    for source in config.data.sources:
        side = Path(source).stem
        own = [answer for answer in answers if Path(answer.source.rpartition(":")[0]).stem == side]
        labels = label_pairs(own, config.run.pairs)
        counts[side] = labels.counts
        if not labels.rows:
            raise ValueError(
                f"no preferences: of {labels.counts['answers']} answers to the prompts in {source},"
                f" {labels.counts['without_score']} have no score and the others tie"
            )
        write_jsonl(folder / f"{side}.jsonl", labels.rows)
    write_text(folder / "counts.json", json.dumps(counts, indent=1))
