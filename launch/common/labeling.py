"""Preference labeling (a stage of launch/rlhf.py): a model samples responses, scorers rank them into pairs.

Responses are written in parts; a killed run resumes after the last part.
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
from trialign.algorithms.roles.build import read_shapes
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.sync import sample
from trialign.engine.config import flatten
from trialign.engine.storage.atomic import write_text
from trialign.models.config import HeadKind

from .online import OnlineRun
from .run import Run

PATHS = ("model.path", "data.sources", "run.output")  # they change where the run's folder is moved


def main(run: Run[Any]) -> None:
    """Samples responses to the prompts and labels them; leaves pairs of the train and of the eval split."""
    config: PreferencesConfig = run.config
    mesh, options = run.mesh, config.run
    shapes = run.on_all_ranks(lambda: read_shapes(cast(Any, config)))

    def build(folder: str, head: HeadKind) -> Role:
        sizes = UpdateConfig(micro_batch_size=options.micro_batch_size)
        return Role(run.load_frozen(folder, shapes[folder], head), sizes=sizes)

    online = OnlineRun(run, cast(Any, config), shapes[config.model.path], seed=options.seed)
    policy: Any = build(config.model.path, "lm")
    shaper = RewardShaper(config.reward.clip, config.reward.missing_eos_penalty)
    online.attach(policy, [build(folder, "score") for folder in config.reward.models])
    available = online.dataset.rows - online.dataset.dropped
    count = min(options.prompts or available, available)
    done = run.on_main_rank(lambda: finished_parts(run.folder, config))
    online.dataset.next(min(count, done * options.prompts_per_save))  # skips the prompts of finished parts
    parts = -(-count // options.prompts_per_save)
    run.about = online.about
    progress = run.progress
    progress.start(parts, done=done, formats={"reward": "reward {:.3f}"})
    for part in range(done, parts):
        prompts = online.dataset.next(min(options.prompts_per_save, count - part * options.prompts_per_save))
        with progress.task("rollout"):
            rollouts = sample(online.generator, prompts, online.sampling, config.rollout.samples_per_prompt)
        with progress.task("score"):
            scores = online.scores(rollouts)
        combined = online.scorer.combined(scores)
        rewards = shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
        online.print_failures()
        if mesh.is_main:
            texts = response_texts(rollouts, online.tokenizer)
            write_responses(run.folder / f"part_{part}.jsonl", make_responses(rollouts, texts, rewards, scores))
            shown = [reward for reward in rewards if reward == reward]
            progress.update(part + 1, {"reward": fmean(shown) if shown else float("nan")})
    run.on_main_rank(lambda: finish(run.folder, config, parts))


def finished_parts(folder: Path, config: PreferencesConfig) -> int:
    """The number of parts written so far.

    Raises:
        ValueError: they were sampled with other options.
    """
    path, now = folder / "begun.json", {k: v for k, v in flatten(config).items() if not k.startswith("parallel.")}
    now = json.loads(json.dumps(now))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for option in (option for option in now if before.get(option) != now[option] and option not in PATHS):
            raise ValueError(
                f"preferences.{option}={now[option]}: the responses in {folder} were sampled with {before.get(option)}"
            )
        return len(list(folder.glob("part_*.jsonl")))
    write_text(path, json.dumps(now))
    return 0


def finish(folder: Path, config: PreferencesConfig, parts: int) -> None:
    """Writes the pairs of each split, train.jsonl and eval.jsonl, and counts.json.

    Raises:
        ValueError: a split has no pairs.
    """
    responses = [row for part in range(parts) for row in read_responses(folder / f"part_{part}.jsonl")]
    counts = {}
    for source in config.data.sources:
        side = Path(source).stem
        own = [response for response in responses if Path(response.source.rpartition(":")[0]).stem == side]
        labels = label_pairs(own, config.run.pairs_per_prompt)
        counts[side] = labels.counts
        if not labels.rows:
            raise ValueError(
                f"no preferences: of {labels.counts['responses']} responses to the prompts in {source},"
                f" {labels.counts['without_score']} have no score and the others tie"
            )
        write_jsonl(folder / f"{side}.jsonl", labels.rows)
    write_text(folder / "counts.json", json.dumps(counts, indent=1))
