"""What a run's folder says of the run in it, from one start of a script to the next.

RUN/run.json: the script, what the run depends on (changes.py), and once it has ended what it left. A folder with that
file is never written anew: a start goes on with its run, deletes it, or is refused, as the `run` section says.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trialign.engine.config import AUTO, NEW

from .env import restarted

LEFT = (
    *("run.json", "config.toml", "metrics.jsonl", "checkpoints", "tensorboard", "wandb", "wandb_id", "before.json"),
    *("model", "model_ema", "adapter", "reference", "begun", "rewards.json", "rounds", "completions.jsonl"),
    *("results.json", "STOP", "STOPPED"),
)
"""What runs leave, beside their plot."""
LEFT_BY = {"rlhf": ("prompts", "stages.json", "report.html", "sft", "preferences", "reward", "ppo", "evaluation")}
"""The same, of one script alone."""


def found(folder: Path, script: str, section: Any) -> dict[str, Any] | None:
    """The record of the run that is to go on in this folder; None where one is to begin. For the main rank.

    Args:
        section: `run` of the config; a stage of a pipeline, whose section has no `resume`, always goes on.

    Raises:
        ValueError: the folder holds a run and nothing says what becomes of it, or holds another script's; or a run is
            to go on and there is none.
    """
    resume, overwrite = getattr(section, "resume", AUTO), getattr(section, "overwrite", False)
    record = read(folder)
    if record is None:
        if resume not in (NEW, AUTO):
            raise ValueError(f"run.resume={resume}: there is no run in this folder")
        return None
    if record["script"] not in (script, ""):
        raise ValueError(f"{folder}: holds a run of {record['script']}.py, not of {script}.py; name another folder")
    if overwrite and not restarted():  # by the launcher: then it is this command's own run
        delete(folder, script)
        return None
    if resume == NEW and not overwrite:
        ended = " that has ended" if record["finished"] else ""
        raise ValueError(
            f"run.output={folder}: holds a run{ended}: --run.resume auto goes on with it, --run.overwrite True deletes"
            " it, another run.output lets it be"
        )
    return record


def read(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None where it holds no run."""
    path = folder / "run.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
    if (folder / "config.toml").exists() or (folder / "checkpoints").exists():  # before there were records
        return {"script": "", "facts": {"options": {}, "contents": {}}, "finished": {}}
    return None


def write(folder: Path, record: dict[str, Any]) -> None:
    """Makes the folder one that holds a run."""
    write_whole(folder / "run.json", json.dumps(record, indent=1))


def delete(folder: Path, script: str) -> None:
    """Deletes what a run left; other files stay. The record goes last: killed halfway, the folder still holds a run."""
    for name in reversed((*LEFT, f"{script}.png", *LEFT_BY.get(script, ()))):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file aside and swaps it in whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
