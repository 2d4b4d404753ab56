"""The benchmark beside TRL: arguments, trialign's side of every algorithm, the protocol with the peer."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(*names: str) -> list[ModuleType]:
    """Modules of benchmarks/, which import each other by bare name; the names are freed again."""
    sys.path.insert(0, str(BENCHMARKS))
    modules = [importlib.import_module(name) for name in names]
    sys.path.remove(str(BENCHMARKS))
    for name in names:
        del sys.modules[name]
    return modules


peer, preference, trl_side, bench_preference = load("peer", "preference", "trl_side", "bench_preference")
SIDES, Bench = preference.SIDES, bench_preference.Bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(path, vocab_size=259, max_position_embeddings=512)
    tiny_tokenizer(path)
    return str(path)


@pytest.fixture
def task(folder) -> Any:
    return preference.Task("sft", folder, batch=4, group=2, new_tokens=5, dtype="float32", micro_tokens=700)


def row_tokens(algorithm: str, row: dict) -> int:
    """Tokens of a row that TRL gets, without responses that it generates."""
    if algorithm == "dpo":
        return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    names = {"sft": ("input_ids",), "reward": ("chosen_ids", "rejected_ids"), "kto": ("prompt_ids", "completion_ids")}
    return sum(len(row[name]) for name in names[algorithm])


@pytest.mark.parametrize("algorithm", [name for name in SIDES if name != "grpo"])
def test_side_learns_and_counts_the_tokens_of_its_rows(algorithm, task, tmp_path):
    side = SIDES[algorithm](replace(task, algorithm=algorithm), 2, tmp_path)
    assert len(side.rows) == 2 * task.batch
    tokens = [row_tokens(algorithm, row) for row in side.rows]
    assert side.tokens == [sum(tokens[: task.batch]), sum(tokens[task.batch :])]
    first, second = side.step(0), side.step(1)
    assert isinstance(first, dict) and isinstance(second, dict)
    assert 0 < first["loss"] < 10 and first["grad_norm"] > 0 and first["loss"] != second["loss"]


def test_dpo_and_kto_start_at_the_reference(task, tmp_path):
    dpo = SIDES["dpo"](replace(task, algorithm="dpo"), 1, tmp_path).step(0)
    kto = SIDES["kto"](replace(task, algorithm="kto"), 1, tmp_path).step(0)
    assert isinstance(dpo, dict) and dpo["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    assert isinstance(kto, dict) and [kto["loss"], kto["kl"]] == pytest.approx([0.5, 0], abs=1e-3)


def test_grpo_counts_prompts_and_responses(task, tmp_path):
    side = SIDES["grpo"](replace(task, algorithm="grpo"), 2, tmp_path)
    try:
        texts = [row["prompt"] for row in side.rows]  # one byte, one token, but for the ends of turns
        prompts = [len(text.replace("<s>", "*").replace("</s>", "*")) for text in texts]
        assert side.tokens == [2 * (sum(prompts[i : i + 2]) + 2 * task.new_tokens) for i in (0, 2)]
        metrics = side.step(0)
        assert isinstance(metrics, dict) and metrics["ratio_max"] == metrics["ratio_min"] == 1
    finally:
        side.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"steps": 0}, "steps=0"),
        ({"algorithm": "grpo", "group": 3}, "groups of 3"),
        ({"algorithm": "kto", "batch": 1}, "batch=1"),
        ({"model": "nowhere"}, "model=nowhere"),
        ({"turns": 0}, "turns=0"),
        ({"trl": "nowhere/python"}, "make trl"),
    ],
)
def test_invalid_arguments_are_refused(folder, changes, message):
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


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """A peer that reports 1000 seconds a turn, and with a seed a wrong number of tokens."""
    script = tmp_path / "trl_side.py"
    script.write_text(PEER)
    monkeypatch.setattr(bench_preference, "__file__", str(tmp_path / "bench_preference.py"))
    return script


def test_last_line_has_the_ratio(folder, stand_in, capsys):
    bench = Bench("sft", folder, batch=4, steps=1, turns=2, trl=sys.executable)
    bench_preference.main(bench)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["ratio"] == pytest.approx(report["tokens_per_s"] / report["trl_tokens_per_s"], rel=0.1)
    assert report["ratio"] > 1 and report["settings"] == {"micro": 1}
    assert lines[0] == 'TRL with {"micro": 2}: 3.00 s a step'
    assert [line.split()[:2] for line in lines[1:-1]] == [["turn", str(i)] for i in range(3)]


def test_peer_with_another_token_count_ends_the_run(folder, stand_in):
    bench = Bench("sft", folder, batch=4, steps=1, turns=1, trl=sys.executable, seed=1)
    with pytest.raises(ValueError, match="TRL trained on"):
        bench_preference.main(bench)


def test_peer_that_ends_early_shows_its_messages(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('no such model')")
    dead = peer.Peer(sys.executable, script, {"threads": 1}, tmp_path)
    with pytest.raises(RuntimeError, match="no such model"):
        dead.read()
    dead.close()


def test_every_setting_divides_the_batch():
    for algorithm in SIDES:
        tried = trl_side.variants({"algorithm": algorithm, "batch": 8, "dtype": "bfloat16"})
        assert {8 % each["micro"] for each in tried} == {0}
        assert {each["weights"] for each in tried} == {"bfloat16", "float32"}
    assert min(each["micro"] for each in trl_side.variants({"algorithm": "kto", "batch": 8, "dtype": "bfloat16"})) == 2


def test_reward_is_the_fraction_of_distinct_words():
    assert trl_side.variety(["", ""], ["a b a b", ""]) == [0.5, 0.0]
