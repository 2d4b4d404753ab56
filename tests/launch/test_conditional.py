"""Conditional SFT: rewards written into prompts, and launch/conditional.py in every layout."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from samples import write_jsonl
from scripts import AXES, agree, assert_resume_identical, metrics, options, succeed, succeed_in_turn
from tiny import tiny_llama
from tiny_run import tiny_run
from trialign.algorithms.config.conditional import ConditionalConfig, ConditionalRun, ConditionConfig, RewardedData
from trialign.algorithms.data.conditional import ConditionedRows, as_rollouts, bucketed, read_rewarded
from trialign.algorithms.data.dialogues import Encoder
from trialign.engine.config import parse

STEPS = 4
RAW = ConditionConfig(normalize=False)


def rows(folder: Path, lines: list[dict], tokenizer, condition=RAW) -> ConditionedRows:
    path = str(write_jsonl(folder / "rows.jsonl", lines))
    data = RewardedData(sources=(path,))
    return ConditionedRows(data, condition, {path: read_rewarded(path, data, True)}, tokenizer, (2,))


def texts(data: ConditionedRows, tokenizer) -> list[str]:
    return [tokenizer.decode(sample.tokens) for sample in data.rows()]


def test_reward_is_written_into_the_last_user_turn(tiny, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [{"prompt": "hi", "response": "yo", "reward": 1}, {"prompt": chat, "response": "d", "reward": -0.256}]
    data = rows(tmp_path, lines, tiny)
    assert texts(data, tiny) == [
        "<s>user: hi <rm_score>: 1.00 </s><s>assistant: yo</s>",
        "<s>user: a</s><s>assistant: b</s><s>user: c <rm_score>: -0.26 </s><s>assistant: d</s>",
    ]
    learned = [[t for t, target in zip(s.tokens, s.mask, strict=True) if target] for s in data.rows()]
    assert [tiny.decode(tokens) for tokens in learned] == ["yo</s>", "d</s>"]
    assert data.written == ["-0.26", "1.00"] and data.target_reward == "1.00"
    prompts = [tiny.decode(prompt.tokens) for prompt, _ in data.prompts(2)]
    assert prompts[0].endswith("<s>user: hi <rm_score>: 1.00 </s><s>assistant: ")
    assert prompts[1].endswith("c <rm_score>: 1.00 </s><s>assistant: ")  # the best reward, not the row's own


def test_rewards_are_normalized_and_bucketed(tiny, tmp_path):
    values = [0.0, 1.0, 2.0, 7.0]
    lines = [{"prompt": "p", "response": "r", "reward": value} for value in values]
    scaled = [(value - 2.5) / statistics.stdev(values) for value in values]
    data = rows(tmp_path, lines, tiny, ConditionConfig(template="[{reward}] {input}"))
    assert [text[:17] for text in texts(data, tiny)] == [f"<s>user: [{z:.2f}] p</s>"[:17] for z in scaled]
    data = rows(tmp_path, lines, tiny, ConditionConfig(buckets=2, target_reward="9"))
    assert data.written == ["-0.64", "0.64"] and data.target_reward == "9"
    assert [text.split()[3] for text in texts(data, tiny)] == ["-0.64", "-0.64", "0.64", "0.64"]
    assert bucketed([1.0, 1.0, 5.0, 1.0], 2) == [1.0, 1.0, 5.0, 1.0]  # equal rewards share a bucket
    with pytest.raises(ValueError, match="condition.buckets=2"):
        bucketed([1.0] * 4, 2)


def test_bad_rows_are_refused_by_line(tiny, tmp_path):
    for column, reported in (
        ({}, r"'reward' \(data.reward_key\)"),
        ({"reward": True}, "'reward' .*True"),
        ({"reward": 10**400}, "'reward' .*1000"),
    ):
        with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{reported}"):
            rows(tmp_path, [{"prompt": "a", "response": "b"} | column], tiny)


@pytest.mark.parametrize(("after", "append"), [("</s>\n", False), ("", True)])
def test_scored_rollouts_end_with_the_turn(tiny, tmp_path, monkeypatch, after, append):
    monkeypatch.setattr(tiny, "chat_template", tiny.chat_template.replace("</s>", after))
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "response": "r"}]))
    config = RewardedData(sources=(path,), append_eos=append)
    read = read_rewarded(path, config, False)
    (rollout,) = as_rollouts(read, list(Encoder(config, tiny, (2,)).responses([read[0].dialogue])))
    assert tiny.decode(rollout.tokens) == "r</s>"
    assert rollout.finish == "stop" and list(rollout.prompt.messages) == prompt


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conditional")
    tiny_llama(folder / "reward", score=True, vocab_size=260, seed=1)
    rows = [{"prompt": f"count to {i}", "response": "x" * i, "topic": i % 2} for i in range(1, 15)]
    given = {
        **{"data_max_tokens": 96, "data_eval_fraction": 0.2, "condition_buckets": 3},
        **{"reward_functions": [f"{folder}/topics.py:length"], "reward_models": [str(folder / "reward")]},
        **{"reward_weights": [1.0, 0.01], "reward_on_failure": "skip", "optimizer_lr": 1e-2, "optimizer_eps": 1e-5},
        **{"update_batch_size": 4, "update_micro_batch_size": 2, "run_steps": STEPS, "run_eval_every": 2},
        **{"run_save_every": 1, "run_keep": STEPS, "run_rows_per_save": 4, "run_show": 2, "run_show_tokens": 4},
    }
    (folder / "topics.py").write_text(
        "def length(prompts, completions, topic, **_):\n"
        "    assert set(topic) <= {0, 1, None} and all(p.startswith('count') for p in prompts)\n"
        "    nan = float('nan')\n"
        "    return [nan if p == 'count to 3' else len(c) + t for p, c, t in zip(prompts, completions, topic)]\n"
    )
    return tiny_run(folder, [*rows, {"prompt": "p", "response": "long" * 60}], **given)


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    printed = succeed("conditional", "--config", setting / "config.toml", "--run.output", setting / "whole")
    parts = ("1 dropped for more than 96 tokens", "1 dropped without a score", "3 rewards written")
    assert all(part in printed for part in (*parts, "stop tokens: </s> (2)", "before", "after", "as the reward in"))
    return setting / "whole"


def test_outputs_of_a_run(setting, whole):
    from transformers import AutoModelForCausalLM

    rewards = json.loads((whole / "rewards.json").read_text())
    unscored = [place for place, value in rewards.items() if value is None]
    assert (len(rewards), unscored) == (14, [f"{setting}/rows.jsonl:3"])
    assert not (whole / "begun").exists()
    steps = metrics(whole)
    assert steps[-1]["eval_loss"] < steps[0]["eval_loss"] and steps[STEPS]["loss"] < steps[1]["loss"]
    AutoModelForCausalLM.from_pretrained(whole / "model")


@pytest.mark.parametrize("file", ["begun/part_0.jsonl", "checkpoints/step_*"])
def test_resume_is_bit_identical(setting, whole, file):
    """Killed after the first chunk of rewards, which is not scored again, or within the steps."""
    given = ("conditional", "--config", setting / "config.toml")
    printed = assert_resume_identical(file, setting / file[:5], whole, STEPS, *given)
    assert "4 of 14 rows are scored" not in printed.splitlines()


def test_layouts_agree(setting, whole):
    given = ("--config", setting / "config.toml")
    succeed_in_turn([("conditional", *given, "--run.output", setting / a, f"--parallel.{a}", 2) for a in AXES])
    for axis in AXES:
        agree(setting / axis, whole, STEPS, logged=True)


def test_bad_options_are_refused():
    table: list[Any] = [(ConditionConfig, "template", "{input}"), (ConditionConfig, "buckets", 1)]
    for cls, option, value in [*table, (ConditionalRun, "rows_per_save", 0)]:
        with pytest.raises(ValueError, match=f"{option}=.?{value}"):
            cls(**{option: value})
    config = parse(ConditionalConfig, options(model_path="m", data_sources="a", update_batch_size=3))
    with pytest.raises(ValueError, match="update.batch_size=3"):
        config.check(2)
