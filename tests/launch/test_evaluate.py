"""launch/evaluate.py: metrics against its completions, perplexity against transformers, layouts, kill and resume."""

import itertools
import json
import math
import statistics
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import write_jsonl
from scripts import kill_after, launch, options, succeed
from tiny import tiny_chat_model, tiny_llama
from tiny_run import tiny_run
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.engine.config import parse
from trialign.engine.mesh import build_mesh


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """Two tiny models, a reward model, prompts, text, dialogues and a config."""
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
    rows = [{"prompt": f"count to {i}"} for i in range(5)]
    return tiny_run(folder, [*rows, {"prompt": "long " * 100}], "spread", **given)


def run(setting: Path, name: str, *arguments: object, ranks: int = 1) -> tuple[str, list[dict], dict]:
    """(stdout, rows of completions.jsonl, results.json) of an evaluation."""
    out = setting / name
    where = ("--run.output", out, "--run.resume", "auto")
    printed = succeed("evaluate", "--config", setting / "config.toml", *where, *arguments, ranks=ranks)
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    return printed, lines, json.loads((out / "results.json").read_text())


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
        assert results[model]["reward"]["value"] == pytest.approx(statistics.fmean(map(statistics.fmean, own)))
        for k in (1, 2):
            chances = [
                statistics.fmean(any(r >= 5.5 for r in some) for some in itertools.combinations(rewards, k))
                for rewards in own
            ]
            assert results[model][f"pass@{k}"]["value"] == pytest.approx(statistics.fmean(chances))
    sources = {source for _, source in groups}
    wins = [
        statistics.fmean((a > b) + (a == b) / 2 for a in groups[first, s] for b in groups[second, s]) for s in sources
    ]
    assert results[first]["win rate"]["value"] == pytest.approx(statistics.fmean(wins))
    assert results[second]["win rate"]["value"] == pytest.approx(1 - statistics.fmean(wins))


def test_perplexity_equals_transformers(setting, alone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(setting / "model")

    def perplexity(rows: list[tuple[list[int], int]]) -> float:
        nats = count = 0.0
        for ids, prompt in rows:
            labels = torch.tensor([-100] * prompt + ids[prompt:])[None]
            with torch.no_grad():
                nats += model(input_ids=torch.tensor(ids)[None], labels=labels, num_items_in_batch=1).loss.item()
            count += len(ids) - prompt
        return math.exp(nats / count)

    texts = [tokenizer("ab " * i)["input_ids"] + [2] for i in range(1, 12)]
    pieces = [(ids[i : i + 24], 1) for ids in texts for i in range(0, len(ids) - 1, 23)]
    chats = []
    for i in (1, 9):
        head = tokenizer("<s>user: p</s><s>assistant: ", add_special_tokens=False)["input_ids"]
        chats.append((head + tokenizer("r" * i, add_special_tokens=False)["input_ids"] + [2], len(head)))
    numbers = alone[2][str(setting / "model")]
    assert numbers["perplexity of text"]["value"] == pytest.approx(perplexity(pieces), rel=1e-5)
    assert numbers["perplexity of dialogues"]["value"] == pytest.approx(perplexity(chats), rel=1e-5)


def assert_same(found: tuple[str, list[dict], dict], expected: tuple[str, list[dict], dict], rel: float = 1e-4) -> None:
    """Asserts that completions are equal, and rewards and results within a tolerance."""
    for line, other in zip(found[1], expected[1], strict=True):
        near = {key: pytest.approx(other[key], rel=rel) for key in ("reward", "rewards")}
        assert line == other | near
    for model, numbers in expected[2].items():
        for name, number in numbers.items():
            near = {key: value if value is None else pytest.approx(value, rel=rel) for key, value in number.items()}
            assert found[2][model][name] == near


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_layouts_agree(setting, alone, axis):
    """Four ranks: the axis times dp=2."""
    found = run(setting, axis, f"--parallel.{axis}", 2, ranks=4)
    assert found[0].count("completions:") == 1
    assert_same(found, alone)


def test_unscored_responses_are_left_out_and_counted(setting, tmp_path):
    (tmp_path / "some.py").write_text(
        "def some(prompts, completions, **_):\n"
        "    if any('3' in p for p in prompts):\n"
        "        raise RuntimeError('three!')\n"
        "    return [1.0 for _ in prompts]\n"
    )
    arguments = ("--reward.functions", tmp_path / "some.py:some", "--reward.models", "--reward.weights")
    stopped = launch("evaluate", "--config", setting / "config.toml", *arguments, "--run.output", tmp_path / "a")
    assert stopped.returncode != 0 and "three!" in stopped.stderr and not (tmp_path / "a").exists()
    printed, lines, results = run(setting, "skip", *arguments, "--reward.on_failure", "skip")
    assert "not scored: " in printed and sum(line["reward"] is None for line in lines) == 2 * 3
    assert results[str(setting / "model")]["answers without a score"]["value"] == 3
    assert results[str(setting / "model")]["reward"]["value"] == 1.0


def test_resume_continues_after_the_last_chunk(setting, alone):
    out = setting / "killed"
    one_by_one = ("--config", setting / "config.toml", "--run.output", out, "--run.prompts_per_save", 1)
    kill_after("begun/model_part_1.jsonl", out, "evaluate", *one_by_one)
    assert not (out / "completions.jsonl").exists(), "killed after the last chunk"
    first = out / "begun" / "model_part_0.jsonl"
    first.write_text(first.read_text().replace('"sample": 0', '"sample": 100'))  # marks the chunk, which is reused
    printed, lines, results = run(setting, "killed", "--run.prompts_per_save", 1)
    assert lines[0]["sample"] == 100
    lines[0]["sample"] = 0
    assert_same((printed, lines, results), alone, rel=1e-5)
    assert [path.name for path in (out / "begun").iterdir()] == ["asked.jsonl"]
    assert "this run has ended" in run(setting, "killed", "--run.prompts_per_save", 1)[0]
    other = launch("evaluate", *one_by_one, "--run.resume", "auto", "--rollout.top_k", 3)
    assert other.returncode != 0 and "rollout.top_k=3 (was 0)" in other.stderr


def new_run(launched: Any, stack: ExitStack, arguments: list[str]) -> Any:
    module = launched("common.run")
    signals = module.StopSignals(Path("nowhere"), main=True)
    return module.Run(parse(EvaluateConfig, arguments), build_mesh(), stack, "evaluate", signals)


def test_one_model_is_held_at_a_time(setting, launched, monkeypatch, tmp_path):
    evaluate, held = launched("evaluate"), []
    build = evaluate.build_decoder

    def watched(*arguments: Any, head: str = "lm", **options: Any) -> Any:
        if head == "lm":  # the reward model is built after it
            assert not [ref for ref in held if ref() is not None]
        model = build(*arguments, head=head, **options)
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluate, "build_decoder", watched)
    with ExitStack() as stack:
        arguments = ["--config", str(setting / "config.toml"), "--run.output", str(tmp_path), "--metrics.pass_at_k"]
        evaluate.main(new_run(launched, stack, arguments))
    assert len(held) == 4


def test_chunks_of_other_options_or_files_are_refused(launched, tmp_path):
    file, text = tmp_path / "data.jsonl", "a\u2028b\x85c"
    file.write_text("x")

    def store(seed: int, show: int = 0) -> Any:
        run = new_run(launched, ExitStack(), options(run_output=tmp_path, run_seed=seed, run_show=show))
        return launched("common.chunks").ChunkStore(run, "begun", ("run.seed",), [str(file), str(tmp_path / "nowhere")])

    assert store(1).read("part_0") is None
    store(1).write("part_0", [text, (1, None)])
    store(1, show=3).check()
    assert store(1).read("part_0") == [text, [1, None]] and store(1).read("part_1") is None
    with pytest.raises(ValueError, match=r"run.seed=2 \(was 1\).*begun"):
        store(2).check()
    file.write_text("y")
    with pytest.raises(ValueError, match="data.jsonl"):
        store(1).check()


def test_prompts_with_too_few_scored_responses_are_counted(launched):
    measured = launched("evaluate").measured
    rewards = {"a:1": [1.0, 0.0, 1.0], "a:2": [1.0, None, None], "a:3": [None] * 3}
    responses = [
        {"source": source, "reward": reward, "tokens": 1, "finish": "stop"}
        for source, own in rewards.items()
        for reward in own
    ]
    arguments = options(metrics_pass_at_k=(1, 2, 3), reward_functions="a.py:f", rollout_samples_per_prompt=3)
    config = parse(EvaluateConfig, arguments)
    numbers = {name: number.value for name, number in measured(responses, config).items()}
    assert numbers["reward"] == pytest.approx((2 / 3 + 1) / 2) and numbers["answers without a score"] == 5
    assert [numbers[f"prompts with fewer than {k} scored answers"] for k in (1, 2, 3)] == [1, 2, 2]
    assert numbers["pass@1"] == pytest.approx((2 / 3 + 1) / 2) and numbers["pass@3"] == 1.0
    numbers = measured([response | {"reward": None} for response in responses], config)
    assert numbers["prompts with fewer than 1 scored answers"].value == 3 and "pass@1" not in numbers


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"model_path": ""}, "model.path"),
        ({"data_sources": ()}, "data.sources, text.sources, dialogues.sources"),
        ({"metrics_pass_at_k": 2}, "metrics.pass_at_k=.2,.: .*data.sources and a reward"),
        (
            {"metrics_pass_at_k": 2, "reward_functions": "a.py:f"},
            "metrics.pass_at_k=.2,.: .*rollout.samples_per_prompt=1",
        ),
        ({"model_baseline": "n"}, "model.baseline=n: .*reward"),
        ({"dialogues_eval_fraction": 0.5}, "dialogues.eval_fraction"),
        ({"text_sources": "t.txt", "text_probabilities": "1.0"}, "text.probabilities="),
        ({"reward_functions": "a.py:f", "model_baseline": "./m"}, "model.baseline=./m"),
    ],
)
def test_conflicting_options_are_refused(changes, reported):
    argv = options(**({"model_path": "m", "data_sources": "a.jsonl"} | changes))
    with pytest.raises(ValueError, match=reported):
        parse(EvaluateConfig, argv).check(1)
