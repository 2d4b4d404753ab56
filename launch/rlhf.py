"""RLHF in one command: fine-tuning, preferences, a reward model, PPO against it, and a report of all of it.

    python launch/rlhf.py --config launch/configs/rlhf_smollm2.toml
    torchrun --nproc-per-node 8 launch/rlhf.py --config my.toml --parallel.tp 2 --ppo.actor.optimizer.lr 1e-6
    torchrun ... launch/rlhf.py --resume runs/rlhf

The stages run one after another on one mesh, each the `main` of its own script with a config that the pipeline fills
in; only one holds its models at a time. RUN/stages.json has a line on each stage that is finished.
"""

from __future__ import annotations

import interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import labelling
import ppo
import reward
import sft
from html_report import page
from session import Session, start
from trialign.algorithms.build import load_tokenizer, read_shape
from trialign.algorithms.config import RunConfig
from trialign.algorithms.data import PromptDataset
from trialign.algorithms.labelling import read_labelled, split_prompts
from trialign.algorithms.rlhf_config import RLHFConfig, Stages, check_rlhf, prompt_files, stages
from trialign.algorithms.rollout import Scorer
from trialign.algorithms.rounds import as_line, write_rows
from trialign.engine.config import flatten, to_toml
from trialign.engine.logging import read_metrics
from trialign.engine.parallel.collectives import gather_objects

MAINS: dict[str, Callable[[Session[Any]], None]] = {
    "sft": sft.main,
    "preferences": labelling.main,
    "reward": partial(reward.main, read=read_labelled),
    "ppo": ppo.main,
    "evaluation": evaluate.main,
}
LEFT = ("prompts", "stages.json", "report.html", *Stages._fields)
"""What a run leaves in its folder beside its config."""


def main(session: Session[Any]) -> None:
    """The stages that are not finished, in order, and then the report."""
    config: RLHFConfig = session.config
    prepare(session)
    for number, (name, stage) in enumerate(zip(Stages._fields, stages(config), strict=True), 1):
        if name not in finished(session):
            if session.mesh.is_main:
                print(f"\nstage {number} of {len(Stages._fields)}: {name}", flush=True)
            run_stage(session, name, stage)
        elif session.mesh.is_main:
            print(f"stage {number} of {len(Stages._fields)}: {name} is finished", flush=True)
    if session.mesh.is_main:
        path = session.folder / "report.html"
        write_whole(path, page(config, finished_here(session.folder)))
        print(f"\nmodel:  {session.folder / 'ppo' / 'model'}\nreport: {path}")


def prepare(session: Session[Any]) -> None:
    """Finds what would stop a later stage, and makes the run's folder with its config and prompts. Collective."""
    config: RLHFConfig = session.config
    shape = session.together(lambda: read_shape(config.model.path, config.parallel, RunConfig(), "lm", config.sft.lora))
    tokenizer = session.together(lambda: load_tokenizer(config.model.path, shape))

    data = replace(stages(config).preferences.data, sources=config.prompts.sources)
    prompts = session.together(lambda: PromptDataset(data, tokenizer))
    scorer = Scorer(config.preferences.reward, tokenizer, session.mesh)
    scorer.check(prompts.columns())
    scorer.close()

    def lay_out() -> None:
        if config.run.resume and not (session.folder / "config.toml").is_file():
            raise ValueError(f"run.resume={config.run.resume}: there is no run, config.toml is missing")
        if config.run.resume:
            same_as_finished(config, finished_here(session.folder))
        sides = split_prompts(config.prompts, config.run.seed)
        if not config.run.resume:
            set_aside(session.folder)
        for path, rows in zip(map(Path, prompt_files(config)), sides, strict=True):
            if not path.exists():
                write_rows(path, rows)
            elif path.read_text(encoding="utf-8") != "".join(map(as_line, rows)):
                raise ValueError(
                    f"prompts.sources={config.prompts.sources}: their rows, or how they are split, have changed since"
                    f" the run began with those in {path}; a new run.output begins anew"
                )
        save_run_config(config, session.folder)

    session.together(lambda: lay_out() if session.mesh.is_main else None)
    for stage in (stages(config).preferences, stages(config).ppo, stages(config).evaluation):
        session.together(lambda stage=stage: PromptDataset(stage.data, tokenizer))


def run_stage(session: Session[Any], name: str, config: Any) -> None:
    """A stage from its beginning or from its newest checkpoint to its end, noted in stages.json. Collective."""
    folder, began = session.folder / name, time.time()
    saved = session.mesh.is_main and any((folder / "checkpoints").glob("step_*"))
    if gather_objects(saved, session.mesh.world)[0]:
        config = replace(config, run=replace(config.run, resume=str(folder)))
    with ExitStack() as stack:
        stage = Session(config, session.mesh, stack, name, session.stopping)
        MAINS[name](stage)
    fact = {
        "seconds": time.time() - began + seconds_before(folder / "metrics.jsonl", began),
        "ended": time.time(),
        "steps": stage.total,
        "data": stage.about,
        "layout": str(session.mesh),
        "config": own_knobs(session.config, name),
    }
    del stage, stack
    gc.collect()  # modules and their hooks refer to each other: without it the models would stay until later
    if session.mesh.is_main:
        write_whole(session.folder / "stages.json", json.dumps(finished_here(session.folder) | {name: fact}, indent=1))


def finished(session: Session[Any]) -> dict[str, Any]:
    """What stages.json says of the stages that are finished, on every rank. Collective."""
    found = session.together(lambda: finished_here(session.folder) if session.mesh.is_main else {})
    return gather_objects(found, session.mesh.world)[0]


def finished_here(folder: Path) -> dict[str, Any]:
    """Stage -> its time, data and config, in the order they ran."""
    path = folder / "stages.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def own_knobs(config: RLHFConfig, name: str) -> dict[str, Any]:
    """The knobs a stage's result depends on, as JSON has them; layouts change no result."""
    flat = {"run.seed": config.run.seed} | flatten(config.model, "model.") | flatten(getattr(config, name), f"{name}.")
    if name != "sft":
        flat |= flatten(config.prompts, "prompts.")
    return json.loads(json.dumps(flat))


def same_as_finished(config: RLHFConfig, done: dict[str, Any]) -> None:
    """Raises ValueError where a finished stage was run with another config than it would be now."""
    for name, fact in done.items():
        for knob, value in own_knobs(config, name).items():
            if fact["config"].get(knob) != value:
                raise ValueError(
                    f"{knob}={value}: the stage {name} is finished and had {fact['config'].get(knob)};"
                    " a new run.output begins anew"
                )


def set_aside(folder: Path) -> None:
    """Moves what an earlier run left into a folder of its own, so that nothing of it is taken for the new run's."""
    used = [folder / name for name in LEFT if (folder / name).exists()]
    aside = folder / "the_run_before"
    if used:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    for path in used:
        path.rename(aside / path.name)


def save_run_config(config: RLHFConfig, folder: Path) -> None:
    """Writes the config that a resume starts from."""
    whole = replace(config, run=replace(config.run, output=str(folder), resume=""))
    write_whole(folder / "config.toml", to_toml(whole))


def seconds_before(metrics: Path, now: float) -> float:
    """Seconds of the steps that were made before `now`, where a stage was resumed."""
    steps = read_metrics(metrics) if metrics.exists() else []
    return sum(step.get("seconds/step", 0.0) for step in steps if step["time"] < now)


def write_whole(path: Path, text: str) -> None:
    """Writes a file aside and swaps it in whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    cls: Any = RLHFConfig  # it has no rows of its own, so none of what a training script's config says
    start(cls, check_rlhf, main, "rlhf", sys.argv[1:])
