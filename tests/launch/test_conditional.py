"""Conditional SFT: rewards written into prompts, and launch/conditional.py in every layout."""

import json
import statistics
from contextlib import ExitStack
from pathlib import Path

import pytest
from scripts import (
    AXES,
    agree,
    agree_in_metrics,
    assert_resume_is_identical,
    launch,
    metrics,
    options,
    reports,
    succeed,
    succeed_in_turn,
)
from tiny import tiny_llama
from tiny_run import tiny_run
from trialign.algorithms.config.conditional import (
    ConditionalConfig,
    ConditionalRun,
    ConditionConfig,
    RewardedData,
)
from trialign.algorithms.data.conditional import ConditionedRows, as_rollouts, bucketed, read_rewarded
from trialign.algorithms.data.dialogues import Encoder
from trialign.engine.config import parse
from trialign.engine.mesh import build_mesh

STEPS = 4
RAW = ConditionConfig(normalize=False)


def rows(folder: Path, lines: list[dict], tokenizer, condition=RAW, **knobs) -> ConditionedRows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = RewardedData(sources=(str(path),), **knobs)
    return ConditionedRows(data, condition, {str(path): read_rewarded(str(path), data, True)}, tokenizer, (2,))


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
    halves = [statistics.fmean(scaled[:2])] * 2 + [statistics.fmean(scaled[2:])] * 2
    data = rows(tmp_path, lines, tiny, ConditionConfig(buckets=2, template="[{reward}] {input}"))
    assert [text[:16] for text in texts(data, tiny)] == [f"<s>user: [{z:.2f}] p</s>"[:16] for z in halves]
    assert "2 rewards written: -0.64, 0.64" in str(data)
    assert rows(tmp_path, lines, tiny, ConditionConfig(target_reward="9")).target_reward == "9"


def test_buckets_are_equally_full_and_keep_ties_together():
    assert bucketed([3.0, 1.0, 2.0, 4.0], 2) == [3.5, 1.5, 1.5, 3.5]
    assert bucketed([1.0, 1.0, 1.0, 5.0], 2) == [1.0, 1.0, 1.0, 5.0]
    many = bucketed([float(i) for i in range(100)], 5)
    assert [many.count(value) for value in sorted(set(many))] == [20] * 5
    with pytest.raises(ValueError, match="condition.buckets=2"):
        bucketed([1.0] * 4, 2)


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ({"prompt": "a", "response": "b"}, r"'reward' \(data.reward_key\)"),
        ({"prompt": "a", "response": "b", "reward": "9"}, "'reward' .*'9'"),
        ({"prompt": "a", "response": "b", "reward": True}, "'reward' .*True"),
        ({"prompt": "a", "response": "b", "reward": 10**400}, "'reward' .*1000"),
        ({"prompt": "a", "response": " ", "reward": 1}, "'response'"),
    ],
)
def test_bad_rows_are_refused_by_line(tiny, tmp_path, line, reported):
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{reported}"):
        rows(tmp_path, [line], tiny)


def test_too_long_rows_are_dropped_and_counted(tiny, tmp_path):
    lines = [{"prompt": "p", "response": "r" * n, "reward": n} for n in (1, 2, 40)]
    data = rows(tmp_path, lines, tiny, max_tokens=64)
    assert len(data) == 2 and "1 dropped for more than 64 tokens" in str(data)


@pytest.mark.parametrize(("after", "append"), [("</s>\n", False), ("", True)])
def test_scored_rollouts_end_with_the_turn(tiny, tmp_path, monkeypatch, after, append):
    monkeypatch.setattr(tiny, "chat_template", tiny.chat_template.replace("</s>", after))
    lines = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], "response": "r"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(lines[0]) + "\n")
    config = RewardedData(sources=(str(path),), append_eos=append)
    read = read_rewarded(str(path), config, False)
    (rollout,) = as_rollouts(read, list(Encoder(config, tiny, (2,)).responses([read[0].dialogue])))
    assert tiny.decode(rollout.tokens) == "r</s>"
    assert rollout.finish == "stop" and list(rollout.prompt.messages) == lines[0]["prompt"]


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
        **{"run_save_every": 1, "run_keep": STEPS, "run_show": 2, "run_show_tokens": 4},
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
    assert len(rewards) == 14 and [place for place, value in rewards.items() if value is None] == [
        f"{setting}/rows.jsonl:3"
    ]
    assert not (whole / "begun").exists()
    steps = metrics(whole)
    assert steps[-1]["eval_loss"] < steps[0]["eval_loss"] and steps[STEPS]["loss"] < steps[1]["loss"]
    AutoModelForCausalLM.from_pretrained(whole / "model")
    assert (whole / "conditional.png").stat().st_size > 10_000


def test_resume_is_bit_identical(setting, whole):
    given = ("conditional", "--config", setting / "config.toml")
    assert_resume_is_identical("checkpoints/step_*", setting / "killed", whole, STEPS, *given)


def test_scoring_resumes_after_the_last_chunk(setting, whole, tmp_path, monkeypatch, launched):
    conditional, module = launched("conditional"), launched("common.run")
    words = ["--config", str(setting / "config.toml"), "--run.output", str(tmp_path), "--run.rows_per_save", "4"]
    sizes, score = [], conditional.RowRewards.scores

    def stopped(self, rollouts):
        sizes.append(len(rollouts))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return score(self, rollouts)

    monkeypatch.setattr(conditional.RowRewards, "scores", stopped)

    def begin() -> dict[str, float | None]:
        with ExitStack() as stack:
            config = parse(ConditionalConfig, words)
            signals = module.StopSignals(tmp_path, main=True)
            rewards = conditional.RowRewards(module.Run(config, build_mesh(), stack, "conditional", signals))
            rewards.rows()
            return rewards.found

    with pytest.raises(KeyboardInterrupt):
        begin()
    found, expected = begin(), json.loads((whole / "rewards.json").read_text())
    assert found.keys() == expected.keys()
    for where, reward in expected.items():
        assert found[where] == (None if reward is None else pytest.approx(reward, rel=1e-5))
    assert sizes == [4, 4, 4, 4, 2]


@pytest.fixture(scope="module")
def moved(setting) -> None:
    """The run in every layout."""
    given = ("--config", setting / "config.toml")
    runs = [("conditional", *given, "--run.output", setting / axis, f"--parallel.{axis}", 2) for axis in AXES]
    succeed_in_turn(runs)


@pytest.mark.parametrize("axis", AXES)
def test_layouts_agree(setting, whole, moved, axis):
    agree(setting / axis, whole, STEPS)
    agree_in_metrics(setting / axis, whole)


def test_row_without_reward_is_reported_once(setting, tmp_path):
    given = ("--config", setting / "config.toml", "--run.output", tmp_path / "run")
    none = ("--reward.functions", "--reward.models", "--reward.weights")
    done = launch("conditional", *given, *none, ranks=2)
    assert done.returncode != 0 and reports(done, "rows.jsonl:1") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="template='{input}'"):
        ConditionConfig(template="{input}")
    with pytest.raises(ValueError, match="buckets=1"):
        ConditionConfig(buckets=1)
    with pytest.raises(ValueError, match="rows_per_save=0"):
        ConditionalRun(rows_per_save=0)
    config = parse(ConditionalConfig, options(model_path="m", data_sources="a", update_batch_size=3))
    with pytest.raises(ValueError, match="update.batch_size=3"):
        config.check(2)
