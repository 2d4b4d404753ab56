"""launch/rlhf.py: preferences of scored responses, its stages, kill and resume, layouts, and its report."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from samples import write_jsonl
from scripts import AXES, ROOT, agree, digests, kill_after, metrics, options, succeed, succeed_in_turn
from tiny_run import tiny_run
from trialign.algorithms.config.reward import RewardConfig
from trialign.algorithms.config.rlhf import SET_BY_PIPELINE, SET_IN_EVERY_STAGE, PromptsConfig, RLHFConfig, stages
from trialign.algorithms.data.prompts import split_prompts
from trialign.algorithms.data.responses import Response, label_pairs, read_sampled_pairs
from trialign.engine.config import flatten, load, parse, to_toml

PPO_STEPS = 3
NAMES = ("sft", "preferences", "reward", "ppo", "evaluation")


def response(prompt: int, number: int, reward: float | None) -> Response:
    own = (reward, {"f": reward}, "stop", "", [5, prompt], [number, 2])
    return Response(f"p{prompt}", f"x:{prompt}", f"a{number}", *own)


def test_better_response_is_chosen_and_ties_are_counted():
    rewards = [[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, None, 1.0, 1.0], [None] * 4, [0.5, None, None, -0.5]]
    responses = [response(p, 10 * p + i, r) for p, own in enumerate(rewards) for i, r in enumerate(own)]
    found = label_pairs(responses, 2)
    pairs = [(row["chosen"], row["rejected"]) for row in found.rows]
    assert pairs == [("a0", "a3"), ("a2", "a1"), ("a10", "a13"), ("a40", "a43")]
    assert found.counts == {"prompts": 5, "responses": 20, "without_score": 7, "pairs": 4, "ties": 2}
    assert len(label_pairs(responses, 1).rows) == 3


def test_written_pairs_are_read_back_exactly(tmp_path):
    rows = label_pairs([response(7, 1, 0.0), response(7, 3, 1.0)], 1).rows
    (pair,) = read_sampled_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", rows)))
    assert list(pair.chosen.tokens) == [5, 7, 3, 2] and list(pair.rejected.tokens) == [5, 7, 1, 2]
    assert list(pair.chosen.mask) == [0, 0, 1, 1] and pair.margin == 0.0


def test_equal_prompts_are_in_one_split(tmp_path):
    rows = [{"prompt": f"p{i % 10}", "row": i} for i in range(30)]
    source = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    train, evaluated = split_prompts(PromptsConfig(sources=(source,), eval_fraction=0.3), 1)
    assert len(evaluated) == 9 and not {r["prompt"] for r in train} & {r["prompt"] for r in evaluated}
    assert sorted(r["row"] for r in train + evaluated) == list(range(30))
    with pytest.raises(ValueError, match=r"prompts.eval_fraction=0.96 of 10 prompts"):
        split_prompts(PromptsConfig(sources=(source,), eval_fraction=0.96), 1)


def test_stages_start_from_results_of_earlier_stages():
    config = load(RLHFConfig, ROOT / "launch" / "configs" / "rlhf_smollm2.toml")
    tied, root = stages(config), config.run.output
    assert tied.sft.model.path == config.model.path
    assert {stage.model.path for stage in (tied.preferences, tied.reward, tied.ppo)} == {f"{root}/sft/model"}
    assert tied.ppo.model.critic == tied.ppo.reward.models[0] == f"{root}/reward/model"
    weights = dict(zip(tied.ppo.reward.names, tied.ppo.reward.weights, strict=True))
    assert weights == {"launch/examples/sentiment.py:sentiment": 0.0, f"{root}/reward/model": 1.0}
    assert (tied.evaluation.model.path, tied.evaluation.model.baseline) == (f"{root}/ppo/model", f"{root}/sft/model")
    assert tied.ppo.data.sources == (f"{root}/prompts/train.jsonl",)
    assert tied.evaluation.data.sources == (f"{root}/prompts/eval.jsonl",)
    assert type(tied.evaluation.reward) is RewardConfig  # without clip and penalty


def test_options_set_by_the_pipeline_exist():
    for stage, names in [("sft", SET_IN_EVERY_STAGE), *SET_BY_PIPELINE.items()]:
        known = flatten(getattr(RLHFConfig(), stage))
        for name in names:
            assert any(option == name or option.startswith(f"{name}.") for option in known), f"{stage}.{name}"


GIVEN = {"model_path": "m", "prompts_sources": "p.jsonl", "sft_data.sources": "d.jsonl"}
GIVEN |= {"preferences_reward.functions": "r.py:f"}


def test_conflicting_options_are_refused():
    for changes, reported in (
        ({"model_path": ""}, "model.path"),
        ({"sft_data.sources": ()}, r"\[sft\] data.sources"),
        ({"preferences_reward.functions": ()}, r"\[preferences\] .*reward.functions"),
        ({"preferences_run.pairs_per_prompt": 3}, r"\[preferences\] .*run.pairs_per_prompt=3"),
        ({"sft_model.path": "x"}, "sft.model.path=x: .*; set model.path"),
        ({"ppo_run.resume": "r"}, "ppo.run.resume=r: .*; --resume RUN"),
        ({"evaluation_reward.time_limit": 3}, "evaluation.reward.time_limit=3.0: .*preferences.reward"),
        ({"preferences_reward.models": "a/model"}, "preferences.reward: r.py:f, model, model"),
        ({"model_path": "runs/rlhf/ppo/model"}, "model.path=runs/rlhf/ppo/model: .*run.output=runs/rlhf"),
    ):
        words = options(**{name: value for name, value in (GIVEN | changes).items() if value != ()})
        with pytest.raises(ValueError, match=reported):
            parse(RLHFConfig, words).check(1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rlhf")
    rows = write_jsonl(folder / "dialogues.jsonl", [{"prompt": f"say {i}", "response": "yes & no"} for i in range(10)])
    trained = ("sft_optimizer", "reward_optimizer", "ppo_actor.optimizer", "ppo_critic.optimizer")
    given: dict[str, Any] = {f"{o}.{name}": value for o in trained for name, value in (("lr", 1e-3), ("eps", 1e-5))}
    given |= {f"{stage}_rollout.max_new_tokens": 6 for stage in ("preferences", "ppo", "evaluation")}
    given |= {f"{stage}_run.save_every": 1 for stage in ("sft", "reward", "ppo")}
    given |= {
        **{"data_sources": None, "prompts_sources": [f"{folder}/rows.jsonl"], "prompts_max_prompt_tokens": 64},
        **{"prompts_eval_fraction": 0.3, "sft_data.sources": [rows], "sft_data.max_tokens": 64},
        **{"sft_data.eval_fraction": 0.2, "sft_update.batch_size": 4, "sft_run.show_tokens": 4},
        **{"preferences_rollout.samples_per_prompt": 4, "preferences_run.pairs_per_prompt": 2},
        **{"preferences_reward.functions": [f"{folder}/rewards.py:spread"], "preferences_run.prompts_per_save": 6},
        **{"reward_update.batch_size": 4, "ppo_run.steps": PPO_STEPS, "ppo_run.prompts_per_step": 4},
        **{"ppo_run.show": 1, "evaluation_rollout.samples_per_prompt": 2, "run_show": 3},
    }
    return tiny_run(folder, [{"prompt": f"count to <{i}>"} for i in range(20)], layers=2, **given)


def arguments(setting: Path, name: str) -> tuple[object, ...]:
    return "--config", setting / "config.toml", "--run.output", setting / name


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    printed = succeed("rlhf", *arguments(setting, "whole"))
    assert f"report: {setting / 'whole' / 'report.html'}" in printed
    return setting / "whole"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_outputs_of_the_stages(whole):
    """Pairs of each split's own prompts, learned rewards, and a model that transformers loads."""
    from transformers import AutoModelForCausalLM

    done = json.loads((whole / "stages.json").read_text())
    assert tuple(done) == NAMES and all(fact["seconds"] > 0 for fact in done.values())
    sides = ("train", "eval")
    prompts = {side: {row["prompt"] for row in lines(whole / "prompts" / f"{side}.jsonl")} for side in sides}
    counts = json.loads((whole / "preferences" / "counts.json").read_text())
    for side, own in prompts.items():
        pairs = lines(whole / "preferences" / f"{side}.jsonl")
        assert {row["prompt"] for row in pairs} <= own and len(pairs) == counts[side]["pairs"]
        assert counts[side]["pairs"] + counts[side]["ties"] == 2 * len(own) and counts[side]["responses"] == 4 * len(
            own
        )
        assert all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
    steps = metrics(whole / "ppo")
    assert len(steps) == PPO_STEPS and all(step["reward"] == pytest.approx(step["reward/model"]) for step in steps)
    assert all("reward/rewards.py:spread" in step for step in steps)
    assert {row["prompt"] for row in lines(whole / "evaluation" / "completions.jsonl")} == prompts["eval"]
    AutoModelForCausalLM.from_pretrained(whole / "ppo" / "model")


def test_resume_after_kills_in_two_stages_is_bit_identical(setting, whole):
    folder = setting / "killed"
    kill_after("preferences/part_0.jsonl", folder, "rlhf", *arguments(setting, "killed"))
    assert not (folder / "preferences" / "train.jsonl").exists(), "killed after the stage"
    tuned = (folder / "sft" / "model" / "model.safetensors").stat().st_mtime_ns
    kill_after("ppo/checkpoints/step_1", folder, "rlhf", "--resume", folder)
    assert not (folder / "ppo" / "checkpoints" / f"step_{PPO_STEPS}").exists(), "killed after the stage"
    printed = succeed("rlhf", "--resume", folder)
    assert "stage 3 of 5: reward is finished" in printed and f"{PPO_STEPS}/{PPO_STEPS}" in printed
    assert "step 1/" not in printed and (folder / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == tuned
    for name, steps in (("sft", 2), ("ppo", PPO_STEPS)):
        assert digests(folder / name, steps) == digests(whole / name, steps)
        assert metrics(folder / name) == metrics(whole / name)
    assert (folder / "report.html").exists()


def test_changed_options_of_a_finished_stage_are_refused(whole, launched):
    rlhf = launched("rlhf")
    config, done = load(RLHFConfig, whole / "config.toml"), rlhf.finished(whole)
    rlhf.check_finished(replace(config, parallel=replace(config.parallel, tp=2)), done)
    other = replace(config.reward, optimizer=replace(config.reward.optimizer, lr=0.5))
    with pytest.raises(ValueError, match="reward.optimizer.lr=0.5: .*0.001"):
        rlhf.check_finished(replace(config, reward=other), done)
    del done["reward"]
    rlhf.check_finished(replace(config, reward=other), done)


def test_changed_prompts_are_refused(setting, whole, launched, tmp_path):
    rlhf = launched("rlhf")
    shutil.copytree(whole / "prompts", tmp_path / "run" / "prompts")
    shutil.copy(whole / "config.toml", tmp_path / "run")
    rows = lines(setting / "rows.jsonl")
    other = write_jsonl(tmp_path / "other.jsonl", [*rows[:-1], {"prompt": "count no more"}])
    arguments = ["--resume", str(tmp_path / "run"), "--prompts.sources", str(other)]
    with pytest.raises(SystemExit, match=r"prompts.sources=\('\S+other.jsonl',\)"):
        rlhf.start(RLHFConfig, rlhf.main, "rlhf", arguments)


def test_layouts_agree(setting, whole):
    succeed_in_turn([("rlhf", *arguments(setting, axis), f"--parallel.{axis}", 2) for axis in AXES])
    done = json.loads((whole / "stages.json").read_text())
    for axis in AXES:
        run = setting / axis
        for stage in ("sft", "reward", "ppo"):
            agree(run / stage, whole / stage, done[stage]["steps"])
        assert f"{axis}=2" in text_of((run / "report.html").read_text())


def text_of(html: str) -> str:
    """A page's text on one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_report_is_self_contained_with_curves_samples_and_config(whole):
    html = (whole / "report.html").read_text()
    text = text_of(html)
    assert not re.search(r"<[^>]+(src|href|srcset)=", html)
    assert not any(part in html for part in ("<script", "http", "@import", "url("))
    assert html.count("<svg ") == 2 + 4 + 4 + 4
    points = [len(own.split()) for own in re.findall('<polyline points="(.*?)"', html)]
    assert len(points) == 5 + 7 + 5 and min(points) >= 2 and points[-1] == PPO_STEPS
    rows, model = lines(whole / "evaluation" / "completions.jsonl"), str(whole / "sft" / "model")
    for row in [row for row in rows if row["model"] == model and row["sample"] == 0][:3]:
        assert " ".join(row["completion"].replace("\0", "\N{REPLACEMENT CHARACTER}").split()) in text
    assert " ".join(to_toml(load(RLHFConfig, whole / "config.toml")).split()) in text


def test_report_escapes_responses(setting, whole, launched):
    folder = setting / "hostile"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoints*", "model*"))
    path = folder / "evaluation" / "completions.jsonl"
    text = path.read_text().replace(str(whole), str(folder))
    rows = [json.loads(line) | {"completion": "<script>alert(1)</script>"} for line in text.splitlines()]
    write_jsonl(path, rows)
    config = load(RLHFConfig, folder / "config.toml")
    config = replace(config, run=replace(config.run, output=str(folder)))
    html = launched("report.html").page(config, json.loads((folder / "stages.json").read_text()))
    assert "<script" not in html and "<script>alert(1)</script>" in text_of(html)
