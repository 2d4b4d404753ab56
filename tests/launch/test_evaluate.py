"""launch/evaluate.py: metrics against its completions, perplexity against transformers, layouts, kill and resume."""

import json
import math
import weakref
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
import torch
from layouts import assert_close
from samples import write_jsonl
from scripts import kill_after, options, succeed, succeed_in_turn
from tiny import tiny_chat_model, tiny_llama
from tiny_run import tiny_run
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.engine.config import parse


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_chat_model(folder / "other", seed=3)
    tiny_llama(folder / "reward", score=True, vocab_size=260, seed=1)
    text = write_jsonl(folder / "text.jsonl", [{"text": "ab " * i} for i in range(1, 12)])
    chat = write_jsonl(folder / "chat.jsonl", [{"prompt": "p", "response": "r" * i} for i in (1, 9)])
    given = {
        **{"model_baseline": f"{folder}/other", "data_max_prompt_tokens": 96, "text_sources": [text]},
        **{"text_max_tokens": 24, "dialogues_sources": [chat], "dialogues_max_tokens": 64},
        **{"rollout_samples_per_prompt": 3, "rollout_max_new_tokens": 6, "reward_models": [str(folder / "reward")]},
        **{"reward_weights": [1.0, 0.1], "metrics_pass_at_k": [1, 2], "metrics_pass_threshold": 5.5, "run_log": None},
    }
    rows = [{"prompt": f"count\u2028to {i}"} for i in range(5)]  # of several lines where text is split by Unicode
    return tiny_run(folder, [*rows, {"prompt": "long " * 100}], "spread", **given)


def words(setting: Path, name: str, *arguments: object) -> list[str]:
    where = ("--config", setting / "config.toml", "--run.output", setting / name, "--run.resume", "auto")
    return ["evaluate", *map(str, (*where, *arguments))]


def run(setting: Path, name: str, *arguments: object) -> tuple[str, list[dict], dict]:
    """(stdout, rows of completions.jsonl, results.json) of an evaluation."""
    return succeed(*words(setting, name, *arguments)), *results_of(setting / name)


def results_of(out: Path) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().split("\n")[:-1]]
    return lines, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(setting):
    return run(setting, "alone")


def test_metrics_follow_from_the_completions(setting, alone):
    printed, lines, results = alone
    assert "1 dropped for more than 96 tokens" in printed and "win rate" in printed and "pass@2" in printed
    first, second = (str(setting / name) for name in ("model", "other"))
    assert len(lines) == 2 * 5 * 3 and {line["sample"] for line in lines} == {0, 1, 2}
    groups = {}
    for line in lines:
        parts = line["rewards"]
        assert parts[f"{setting}/rewards.py:spread"] == len(set(line["completion"]))
        assert line["reward"] == pytest.approx(parts[f"{setting}/rewards.py:spread"] + 0.1 * parts[f"{setting}/reward"])
        groups.setdefault((line["model"], line["source"]), []).append(line["reward"])
    for model in (first, second):
        own = [rewards for (name, _), rewards in groups.items() if name == model]
        assert results[model]["reward"]["value"] == pytest.approx(fmean(map(fmean, own)))
        for k in (1, 2):
            chances = [fmean(any(r >= 5.5 for r in some) for some in combinations(rewards, k)) for rewards in own]
            assert results[model][f"pass@{k}"]["value"] == pytest.approx(fmean(chances))
    pairs = [(groups[first, s], groups[second, s]) for s in {source for _, source in groups}]
    wins = fmean(fmean((a > b) + (a == b) / 2 for a in own for b in other) for own, other in pairs)
    assert results[first]["win rate"]["value"] == pytest.approx(wins)
    assert results[second]["win rate"]["value"] == pytest.approx(1 - wins)


def test_perplexity_equals_transformers(setting, alone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    tokenize = AutoTokenizer.from_pretrained(setting / "model").encode

    def perplexity(rows: list[tuple[list[int], int]]) -> float:
        nats = count = 0.0
        for ids, prompt in rows:
            labels = torch.tensor([-100] * prompt + ids[prompt:])[None]
            nats += model(input_ids=torch.tensor(ids)[None], labels=labels, num_items_in_batch=1).loss.item()
            count += len(ids) - prompt
        return math.exp(nats / count)

    texts = [tokenize("ab " * i) + [2] for i in range(1, 12)]
    pieces = [(ids[i : i + 24], 1) for ids in texts for i in range(0, len(ids) - 1, 23)]
    head = tokenize("<s>user: p</s><s>assistant: ", add_special_tokens=False)
    chats = [(head + tokenize("r" * i, add_special_tokens=False) + [2], len(head)) for i in (1, 9)]
    numbers = alone[2][str(setting / "model")]
    assert numbers["perplexity of text"]["value"] == pytest.approx(perplexity(pieces), rel=1e-5)
    assert numbers["perplexity of dialogues"]["value"] == pytest.approx(perplexity(chats), rel=1e-5)


def assert_same(out: Path, expected: tuple[str, list[dict], dict]) -> None:
    """Asserts that completions are equal, and rewards and results within 1e-4."""
    lines, results = results_of(out)
    for line, other in zip(lines, expected[1], strict=True):
        assert_close(line, other, 1e-4)
    assert_close(results, expected[2], 1e-4)


def test_layouts_agree(setting, alone):
    """Four ranks: tp or pp times dp."""
    succeed_in_turn([words(setting, axis, f"--parallel.{axis}", 2) for axis in ("tp", "pp")], ranks=4)
    for axis in ("tp", "pp"):
        assert_same(setting / axis, alone)


def test_unscored_responses_are_left_out_and_counted(setting, tmp_path):
    function = "def some(prompts, completions, **_): return [1 / ('3' not in prompt) for prompt in prompts]\n"
    (tmp_path / "some.py").write_text(function)
    given = ("--reward.functions", tmp_path / "some.py:some", "--reward.models", "--reward.weights")
    printed, lines, results = run(setting, "skip", *given, "--reward.on_failure", "skip")
    assert "not scored: " in printed and sum(line["reward"] is None for line in lines) == 2 * 3
    assert results[str(setting / "model")]["responses without a score"]["value"] == 3
    assert results[str(setting / "model")]["reward"]["value"] == 1.0
    assert results[str(setting / "model")]["prompts with fewer than 2 scored responses"]["value"] == 1


def test_models_are_freed_before_the_next_is_loaded(setting, launched, monkeypatch):
    evaluate, held, heads = launched("evaluate"), weakref.WeakSet(), []
    build = launched("common.run").build_decoder

    def watched(*given, head="lm", **options):
        assert head == "score" or not held
        heads.append(head)
        held.add(model := build(*given, head=head, **options))
        return model

    monkeypatch.setattr("common.run.build_decoder", watched)
    evaluate.start(EvaluateConfig, evaluate.main, "evaluate", words(setting, "freed")[1:])
    assert heads == ["lm", "score"] * 2


def test_resume_continues_after_the_last_chunk(setting, alone, launched):
    out, one_by_one = setting / "killed", ("--run.prompts_per_save", 1)
    (out / "begun").mkdir(parents=True)  # as a kill before its first file leaves it
    kill_after("begun/model_part_1.jsonl", out, *words(setting, "killed", *one_by_one))
    assert not (out / "completions.jsonl").exists(), "killed after the last chunk"
    evaluate, text = launched("evaluate"), (setting / "text.jsonl").read_text()
    for given, reported in (
        (("--rollout.top_k", 3), r"rollout.top_k=3 \(was 0\)"),
        (("--reward.functions", f"{setting}/rewards.py:length"), r"reward.functions=\S+:length \(was \S+:spread\)"),
        ((), "text.jsonl differs"),
    ):
        (setting / "text.jsonl").write_text(text.replace("ab", "ba"))
        with pytest.raises(SystemExit, match=reported):
            evaluate.start(EvaluateConfig, evaluate.main, "evaluate", words(setting, "killed", *one_by_one, *given)[1:])
    (setting / "text.jsonl").write_text(text)
    first, path = out / "begun" / "model_part_0.jsonl", out / "completions.jsonl"
    first.write_text(first.read_text().replace('"sample": 0', '"sample": 100'))  # marks the chunk, which is reused
    assert run(setting, "killed", *one_by_one)[1][0]["sample"] == 100
    path.write_text(path.read_text().replace('"sample": 100', '"sample": 0'))
    assert_same(out, alone)
    assert [path.name for path in (out / "begun").iterdir()] == ["asked.jsonl"]


def test_conflicting_options_are_refused():
    for changes, reported in (
        ({"data_sources": ()}, "data.sources, text.sources, dialogues.sources"),
        ({"metrics_pass_at_k": 2}, "metrics.pass_at_k=.2,.: .*a reward"),
        ({"metrics_pass_at_k": 2, "reward_functions": "a:f"}, "pass_at_k=.2,.: .*rollout.samples_per_prompt=1"),
        ({"model_baseline": "n"}, "model.baseline=n: .*reward"),
        ({"text_sources": "t.txt", "text_probabilities": "1.0"}, "text.probabilities="),
        ({"reward_functions": "a.py:f", "model_baseline": "./m"}, "model.baseline=./m"),
    ):
        with pytest.raises(ValueError, match=reported):
            parse(EvaluateConfig, options(**({"model_path": "m", "data_sources": "a.jsonl"} | changes))).check(1)
