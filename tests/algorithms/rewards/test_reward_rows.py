"""Rows that a reward function cannot score are refused by file and row, before a model is loaded, by every script."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from samples import write_jsonl
from scripts import ROOT, options
from tiny import tiny_chat_model
from trialign.algorithms.batch import Prompt, single_turn
from trialign.algorithms.rewards.rewards import reward_metrics

MATH = "trialign.algorithms.rewards.math.reward:math"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose weights are NaN: whoever loads it fails with another error than the rows'."""
    folder = tiny_chat_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    for weights in folder.glob("*.safetensors"):
        nothing = {name: tensor * math.nan for name, tensor in load_file(weights).items()}
        save_file(nothing, weights, metadata={"format": "pt"})
    return folder


def refused(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The message with which a script exits."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "launch" / f"{script}.py"), run_name="__main__")
    return str(left.value)


def asked(script: str, model: Path, source: Path, function: str, folder: Path) -> list[str]:
    """A script's arguments."""
    words = options(model_path=model, run_output=folder)
    if script == "rlhf":
        words += options(prompts_sources=source, prompts_eval_fraction=0.5)
        return words + options(**{"preferences_reward.functions": function, "sft_data.sources": source})
    return words + options(data_sources=source, reward_functions=function)


def test_functions_score_rows_of_their_own_kind(tmp_path, monkeypatch, capsys):
    """Rows that no function is for stay out of the step and the means."""
    (tmp_path / "f.py").write_text(
        "def long(prompts, completions, task, **f):\n"
        "    return [1.0 + len(c) if t == 'a' else None for t, c in zip(task, completions)]\n"
        "def half(prompts, completions, task, **f): return [0.5 if t == 'b' else None for t in task]\n"
    )
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "task": task} for i, task in enumerate("abcab")])
    functions = tuple(f"{tmp_path}/f.py:{name}" for name in ("long", "half"))
    words = options(model_path=tiny_chat_model(tmp_path / "model"), data_sources=source, data_max_prompt_tokens=64)
    words += options(reward_functions=functions, reward_weights=(1.0, 2.0), run_output=tmp_path / "run")
    words += options(rollout_max_new_tokens=4, rollout_samples_per_prompt=2, run_prompts_per_step=5, run_steps=1)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *words, *options(run_save_every=0, grpo_micro_batch_size=4)])
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    runpy.run_path(str(ROOT / "launch" / "grpo.py"), run_name="__main__")
    assert "no scorer applies to 2 responses, of " in "".join(capsys.readouterr().out.split("\n")).replace("  ", " ")
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert step["unscored"] == 2 and step["reward/f.py:half"] == 0.5
    assert step["reward"] == pytest.approx((4 * step["reward/f.py:long"] + 4 * 1.0) / 8)


def test_scorers_with_equal_path_ends_have_metrics_of_their_own():
    rollout = single_turn(Prompt(0, [1], "p"), [2], [0.0], "stop")
    for names, short in {
        ("runs/a/model", "runs/b/model", "f.py:f"): ("a/model", "b/model", "f.py:f"),
        ("http://h:1/score", "http://h:2/score"): ("h:1/score", "h:2/score"),
        ("model", "./model"): ("model", "./model"),
    }.items():
        scores: Any = {name: [float(i)] for i, name in enumerate(names)}
        metrics = reward_metrics([rollout], scores, [1.0], [1.0])
        by_name = {name: value for name, value in metrics.items() if name.startswith("reward/")}
        assert by_name == {f"reward/{name}": float(i) for i, name in enumerate(short)}


SCRIPTS = ("ppo", "grpo", "rejection", "conditional", "evaluate", "rlhf")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unreadable_answers_are_refused_by_every_script(script, model, tmp_path, monkeypatch):
    wanted = ["3", "none", "2\\sqrt{3}", "none"]
    rows = [{"prompt": f"p{i}", "response": "r", "answer": right} for i, right in enumerate(wanted)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = refused(script, asked(script, model, source, MATH, tmp_path / "run"), monkeypatch)
    assert "answer='none'" in message and MATH in message
    assert "rows.jsonl:2: " in message


def test_columns_named_as_arguments_are_refused(model, tmp_path, monkeypatch):
    (tmp_path / "f.py").write_text("def f(prompts, completions, **fields): return [0.0 for _ in prompts]")
    for name in ("prompts", "completions"):
        rows = [{"prompt": "p0", "response": "r"}, {"prompt": "p1", "response": "r", name: ["x"]}]
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        message = refused("ppo", asked("ppo", model, source, f"{tmp_path}/f.py:f", tmp_path / "run"), monkeypatch)
        assert f"{name}.jsonl:2: " in message and f"the column '{name}' has the name of an argument" in message
