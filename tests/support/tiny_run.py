"""Tiny runs of the launch scripts: a folder with a chat model, rows, reward functions and a config."""

import json
from collections.abc import Sequence
from pathlib import Path

from samples import write_jsonl
from tiny import tiny_chat_model

REWARDS = """
import math, os, pathlib, signal, time
here = pathlib.Path(__file__).parent
calls = []
def length(prompts, completions, **_):
    return [len(c) / 10 for c in completions]
def goal(prompts, completions, goal, **_):
    return [-abs(len(c) - g) / 10 for c, g in zip(completions, goal)]
def spread(prompts, completions, **_):
    return [len(set(c)) for c in completions]
def sleeping(prompts, completions, **_):
    here.joinpath("pid").write_text(str(os.getpid()))
    time.sleep(60)
def nan_later(prompts, completions, **_):
    calls.append(1)
    return [math.nan if len(calls) > 2 and "say 7 " in p else 0.0 for p in prompts]
def killer(prompts, completions, **_):
    with open(here / "calls", "a") as file:
        file.write("x")
    if len((here / "calls").read_text()) == 4:
        os.kill(os.getppid(), signal.SIGKILL)
    return [float(len(c)) for c in completions]
"""


def tiny_run(folder: Path, rows: Sequence[dict], reward: str = "", layers: int = 4, **given: object) -> Path:
    """Writes model/, rows.jsonl, rewards.py (`REWARDS`) and config.toml, with `rewards.py:REWARD` and the options
    `section_name=value`; returns the folder."""
    tiny_chat_model(folder / "model", num_hidden_layers=layers)
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "rewards.py").write_text(REWARDS)
    values = {"model_path": f"{folder}/model", "model_dtype": "float32", "data_sources": [f"{folder}/rows.jsonl"]}
    values |= {"reward_functions": [f"{folder}/rewards.py:{reward}"]} if reward else {}
    write_config(folder / "config.toml", **(values | {"run_log": ()} | given))
    return folder


def write_config(path: Path, **given: object) -> Path:
    """Writes a config file with the options `section_name=value`, `section_part.name=value`; None leaves one out."""
    values = {name.replace("_", ".", 1): value for name, value in given.items() if value is not None}
    path.write_text("".join(f"{name} = {json.dumps(value, default=str)}\n" for name, value in values.items()))
    return path


def prompts(count: int, **columns: object) -> list[dict]:
    """Rows with a prompt and a goal."""
    return [{"prompt": f"say {i} words", "goal": i % 7, **columns} for i in range(count)]
