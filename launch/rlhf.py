"""RLHF in one command: fine-tuning, preferences, a reward model, PPO against it, and an HTML report.

    python launch/rlhf.py --config launch/configs/rlhf_smollm2.toml
    torchrun --nproc-per-node 8 launch/rlhf.py --config my.toml --parallel.tp 2 --ppo.actor.optimizer.lr 1e-6
    torchrun ... launch/rlhf.py --resume runs/rlhf

The stages run one after another on one mesh, each the `main` of its own script with a config that the pipeline fills
in; only one holds its models at a time. RUN/stages.json describes the finished stages.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import ppo
import reward
import sft
from common import labeling
from common.run import Run, start
from report.html import page
from trialign.algorithms.config.rlhf import RLHFConfig, Stages, prompt_files, stages
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.data.prompts import PromptDataset, split_prompts
from trialign.algorithms.data.responses import read_sampled_pairs
from trialign.algorithms.data.text_files import json_line, write_jsonl
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.roles.build import load_tokenizer, read_shape
from trialign.engine.config import flatten
from trialign.engine.logging import read_metrics
from trialign.engine.storage.atomic import write_text

MAINS: dict[str, Callable[[Run[Any]], None]] = {
    "sft": sft.main,
    "preferences": labeling.main,
    "reward": partial(reward.main, read=read_sampled_pairs),
    "ppo": ppo.main,
    "evaluation": evaluate.main,
}


def main(run: Run[Any]) -> None:
    """Runs the unfinished stages in order, then writes the report."""
    config: RLHFConfig = run.config
    prepare(run)
    for number, (name, stage) in enumerate(zip(Stages._fields, stages(config), strict=True), 1):
        if name not in run.on_main_rank(lambda: finished(run.folder)):
            if run.mesh.is_main:
                print(f"\nstage {number} of {len(Stages._fields)}: {name}", flush=True)
            run_stage(run, name, stage)
        elif run.mesh.is_main:
            print(f"stage {number} of {len(Stages._fields)}: {name} is finished", flush=True)
    if run.mesh.is_main:
        path = run.folder / "report.html"
        write_text(path, page(config, finished(run.folder)))
        print(f"\nmodel:  {run.folder / 'ppo' / 'model'}\nreport: {path}")


def prepare(run: Run[Any]) -> None:
    """Checks the inputs of all stages, and writes the config and the prompts into the run's folder. Collective."""
    config: RLHFConfig = run.config
    shape = run.on_all_ranks(lambda: read_shape(config.model.path, config.parallel, RunConfig(), "lm", config.sft.lora))
    tokenizer = run.on_all_ranks(lambda: load_tokenizer(config.model.path, shape))

    data = replace(stages(config).preferences.data, sources=config.prompts.sources)
    prompts = run.on_all_ranks(lambda: PromptDataset(data, tokenizer))
    scorer = Scorer(config.preferences.reward, tokenizer, run.mesh)
    scorer.check(prompts.columns())
    scorer.close()

    def write_prompts() -> None:
        check_finished(config, finished(run.folder))
        sides = split_prompts(config.prompts, config.run.seed)
        for path, rows in zip(map(Path, prompt_files(config)), sides, strict=True):
            if run.record.found is None or not path.exists():
                write_jsonl(path, rows)
            elif path.read_text(encoding="utf-8") != "".join(map(json_line, rows)):
                raise ValueError(
                    f"prompts.sources={config.prompts.sources}: their rows, or how they are split, have changed since"
                    f" the run began with those in {path}; a new run.output begins anew"
                )

    run.on_main_rank(write_prompts)
    for stage in (stages(config).preferences, stages(config).ppo, stages(config).evaluation):
        run.on_all_ranks(lambda stage=stage: PromptDataset(stage.data, tokenizer))
    run.record.write_begun()


def run_stage(run: Run[Any], name: str, config: Any) -> None:
    """Runs or resumes a stage, and adds it to stages.json. Collective."""
    folder, began = run.folder / name, time.time()
    with ExitStack() as stack:
        stage = Run(config, run.mesh, stack, name, run.signals)
        stage.record.open(f"{name}.")
        MAINS[name](stage)
    fact = {
        "seconds": time.time() - began + seconds_before(folder / "metrics.jsonl", began),
        "ended": time.time(),
        "steps": stage.total,
        "data": stage.about,
        "layout": str(run.mesh),
        "config": own_options(run.config, name),
    }
    del stage, stack
    gc.collect()  # modules and their hooks refer to each other: without it the models would stay until later
    if run.mesh.is_main:
        write_text(run.folder / "stages.json", json.dumps(finished(run.folder) | {name: fact}, indent=1))


def finished(folder: Path) -> dict[str, Any]:
    """Finished stage -> its time, data and options, in the order they ran. On the main rank alone."""
    path = folder / "stages.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def own_options(config: RLHFConfig, name: str) -> dict[str, Any]:
    """Options that a stage's result depends on, as JSON; layouts change no result."""
    flat = {"run.seed": config.run.seed, "model.dtype": config.model.dtype}
    flat |= flatten(getattr(config, name), f"{name}.")
    return json.loads(json.dumps(flat))


def check_finished(config: RLHFConfig, done: dict[str, Any]) -> None:
    """Raises ValueError where a finished stage had other options than now."""
    for name, fact in done.items():
        for option, value in own_options(config, name).items():
            if fact["config"].get(option) != value:
                raise ValueError(
                    f"{option}={value}: the stage {name} is finished and had {fact['config'].get(option)};"
                    " a new run.output begins anew"
                )


def seconds_before(metrics: Path, now: float) -> float:
    """Seconds of the steps before `now`, where a stage was resumed."""
    steps = read_metrics(metrics) if metrics.exists() else []
    return sum(step.get("seconds/step", 0.0) for step in steps if step["time"] < now)


if __name__ == "__main__":
    cls: Any = RLHFConfig  # it has no `data` section, unlike ScriptConfig
    start(cls, main, "rlhf", sys.argv[1:])
