"""Benchmark of preference training beside TRL: its options, every algorithm's side, and its talk with a peer; PPO's."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT
from scripts import ENVIRONMENT
from tiny import tiny_chat_model

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts there import each other by bare names, which tests must not
NAMES = ("peer", "preference", "bench_preference")
peer, preference, bench_preference = map(importlib.import_module, NAMES)
sys.path.remove(str(ROOT / "benchmarks"))
for name in NAMES:
    del sys.modules[name]
SIDES, Bench = preference.SIDES, bench_preference.Bench
COLUMNS = {  # of the rows for TRL; dpo trains on the prompt twice, grpo generates its responses
    "sft": ("input_ids",),
    "reward": ("chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids"),
    "dpo": ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_chat_model(tmp_path_factory.mktemp("model"), vocab_size=259, max_position_embeddings=512))


@pytest.mark.parametrize("algorithm", SIDES)
def test_side_learns_and_counts_the_tokens_of_its_rows(algorithm, folder, tmp_path):
    """DPO and KTO start at their reference, GRPO at a ratio of 1."""
    task = preference.Task(algorithm, folder, batch=4, group=2, new_tokens=5, dtype="float32", micro_tokens=700)
    side = SIDES[algorithm](task, 2, tmp_path)
    try:
        if algorithm == "grpo":
            texts = [row["prompt"] for row in side.rows]  # one byte, one token, but for the ends of turns
            counted = [2 * len(text.replace("<s>", "*").replace("</s>", "*")) + 2 * task.new_tokens for text in texts]
        else:
            counted = [sum(len(row[name]) for name in COLUMNS[algorithm]) for row in side.rows]
        half = len(counted) // 2
        assert side.tokens == [sum(counted[:half]), sum(counted[half:])]
        first: Any = side.step(0)
        expected = {"dpo": ("loss", 0.6931), "kto": ("loss", 0.5), "grpo": ("ratio_max", 1.0)}
        if algorithm in expected:
            name, value = expected[algorithm]
            assert first[name] == pytest.approx(value, abs=1e-4)
        if algorithm != "grpo":
            second: Any = side.step(1)
            assert 0 < first["loss"] < 10 and first["grad_norm"] > 0 and first["loss"] != second["loss"]
    finally:
        side.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"algorithm": "grpo", "group": 3}, "groups of 3"),
        ({"algorithm": "kto", "batch": 1}, "batch=1"),
        ({"model": "nowhere"}, "model=nowhere"),
        ({"trl": "nowhere/python"}, "make trl"),
    ],
)
def test_invalid_options_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        Bench(**({"algorithm": "sft", "model": folder, "batch": 4, "trl": ""} | changes))


PEER = """
import json, sys
job = json.load(open(sys.argv[1]))
print(json.dumps({"settings": {"micro": 2}, "seconds": 3.0}), flush=True)
print(json.dumps({"settings": {"micro": 1}, "versions": "none"}), flush=True)
for turn, line in enumerate(sys.stdin):
    first = turn * job["steps"] * job["batch"]
    rows = job["rows"][first : first + job["steps"] * job["batch"]]
    tokens = sum(len(row["input_ids"]) for row in rows) + job["seed"]
    print(json.dumps({"seconds": 1000.0, "cpu_seconds": 500.0, "tokens": tokens}), flush=True)
"""


def test_ratio_to_a_peer_of_the_same_tokens(folder, tmp_path, monkeypatch, capsys):
    """The peer counts its rows' tokens, wrongly under another seed than 0, and reports 1000 s for them."""
    (tmp_path / "trl_side.py").write_text(PEER)
    monkeypatch.setattr(bench_preference, "__file__", str(tmp_path / "bench_preference.py"))
    bench = Bench("sft", folder, batch=4, steps=1, turns=2, trl=sys.executable)
    bench_preference.main(bench)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ratio"] == pytest.approx(report["tokens_per_s"] / report["trl_tokens_per_s"], rel=0.1)
    assert report["ratio"] > 1 and report["settings"] == {"micro": 1}
    with pytest.raises(ValueError, match="TRL trained on"):
        bench_preference.main(replace(bench, seed=1))


def test_ppo_runs_with_a_vocabulary_below_1000(folder):
    sizes = "--prompts 2 --prompt-tokens 4 --new-tokens 3 --iters 1 --dtype float32".split()
    command = [sys.executable, ROOT / "benchmarks" / "bench_ppo.py", "--model", folder, *sizes]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["samples_per_s"] > 0
