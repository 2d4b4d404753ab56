"""Rejection sampling and iterative DPO: picked responses, rounds, and launch/rejection.py in every layout."""

import math
import shutil
import statistics
from pathlib import Path

import pytest
from layouts import assert_close
from scripts import agree, assert_resume_identical, digests, metrics, options, rewound, succeed, succeed_in_turn
from tiny import tiny_llama
from tiny_run import prompts, tiny_run
from trialign.algorithms.batch import Prompt, Rollout, single_turn
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.data import responses as stored
from trialign.algorithms.data.responses import pick, picked_pairs, picked_samples, read_responses, rows_of_step
from trialign.engine.config import parse

ROUNDS, PER_ROUND = 2, 2
STEPS = ROUNDS * PER_ROUND
NAN = math.nan


def rollouts() -> list[Rollout]:
    """Three responses to each of three prompts; the first two prompts have equal text."""
    prompts = [Prompt(i, [5, 6 + i], text, source=f"rows:{i}") for i, text in enumerate(("same", "same", "other"))]
    return [single_turn(prompt, [10 * prompt.index + j, 2], [0.0, 0.0], "stop") for prompt in prompts for j in range(3)]


def picked(rewards: list[float], method: str):
    done = rollouts()
    responses = stored.make_responses(done, [str(r.tokens[0]) for r in done], rewards, {"f": rewards})
    pick(responses, [r.prompt.index for r in done], method)  # pyright: ignore
    return responses


def test_sft_picks_the_best_response_of_each_prompt():
    responses = picked([1, 3, 2, 5, 5, NAN, 0, -1, 0], "sft")
    assert [a.completion for a in responses if a.picked] == ["1", "10", "20"]
    assert [list(sample.tokens) for sample in picked_samples(responses)] == [[5, 6, 1, 2], [5, 7, 10, 2], [5, 8, 20, 2]]
    assert all(list(sample.mask) == [0, 0, 1, 1] for sample in picked_samples(responses))
    assert responses[5].reward is None and responses[5].rewards == {"f": None}


def test_dpo_pairs_best_and_worst_and_drops_ties():
    responses = picked([1, 3, 2, 5, 5, NAN, 0, -1, 0], "dpo")
    pairs, _ = picked_pairs(responses)
    assert [(p.chosen.tokens[2], p.rejected.tokens[2]) for p in pairs] == [(1, 0), (20, 21)]


def test_round_without_a_pick_is_refused():
    with pytest.raises(ValueError, match=r"3 prompts.*equal rewards"):
        picked([1.0] * 9, "dpo")
    with pytest.raises(ValueError, match=r"3 prompts.*has a score"):
        picked([NAN] * 9, "sft")


def test_written_responses_are_read_back_exactly(tmp_path):
    responses = picked([0.1, 1 / 3, -2.5e-8, NAN, 1, 2, 3, 4, 5], "dpo")
    responses[0].reference = -1.7 / 3
    stored.write_responses(tmp_path / "rounds" / "round_0.jsonl", responses)
    assert read_responses(tmp_path / "rounds" / "round_0.jsonl") == responses
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: not a response"):
        read_responses(tmp_path / "bad.jsonl")


def test_rows_of_a_round_repeat_after_all_are_drawn():
    steps = [rows_of_step(5, 7, 1, step, 2) for step in range(5)]
    met = [row for step in steps for row in step]
    assert sorted(met[:5]) == sorted(met[5:]) == [0, 1, 2, 3, 4] and met[:5] != met[5:]
    assert [rows_of_step(5, 7, 2, step, 2) for step in range(5)] != steps


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rejection")
    tiny_llama(folder / "reward", score=True, vocab_size=260, seed=1)
    given = {
        **{"data_max_prompt_tokens": 96, "rollout_samples_per_prompt": 3, "rollout_max_new_tokens": 8},
        **{"reward_models": [str(folder / "reward")], "rejection_rounds": ROUNDS, "rejection_prompts_per_round": 8},
        **{"optimizer_lr": 1e-3, "optimizer_eps": 1e-5, "optimizer_schedule": "constant"},
        **{"update_batch_size": 4, "update_micro_batch_size": 4},
        **{"run_save_every": 1, "run_keep": STEPS, "run_show": 1},
    }
    return tiny_run(folder, prompts(12), "spread", **given)


def words(setting: Path, name: str, *arguments: object) -> list[str]:
    return ["rejection", *map(str, ("--config", setting / "config.toml", "--run.output", setting / name, *arguments))]


DPO = ("--rejection.method", "dpo")
SFT = ("--rejection.epochs", 2, "--optimizer.lr", "1e-2", "--rejection.rounds", 1)


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    succeed(*words(setting, "whole", *DPO))
    return setting / "whole"


@pytest.fixture(scope="module")
def tuned(setting) -> Path:
    succeed(*words(setting, "tuned", *SFT))
    return setting / "tuned"


def test_outputs_of_a_run(whole):
    """Picks and metrics follow from the responses."""
    from transformers import AutoModelForCausalLM

    steps = metrics(whole)
    assert [step["round"] for step in steps] == [0, 0, 1, 1]
    assert ["reward" in step for step in steps] == [True, False] * 2
    for number in range(ROUNDS):
        responses = read_responses(whole / "rounds" / f"round_{number}.jsonl")
        assert len(responses) == 8 * 3
        for begin in range(0, 24, 3):
            group = responses[begin : begin + 3]
            rewards = [a.reward or 0.0 for a in group]
            assert all(a.reward == sum(v or 0.0 for v in a.rewards.values()) for a in group)
            picks = {a.picked: a.reward for a in group if a.picked}
            assert picks == ({"best": max(rewards), "worst": min(rewards)} if len(set(rewards)) > 1 else {})
        first, best = steps[number * PER_ROUND], [a.reward or 0.0 for a in responses if a.picked == "best"]
        assert first["reward"] == pytest.approx(statistics.fmean(a.reward or 0.0 for a in responses))
        assert first["reward_picked"] == pytest.approx(statistics.fmean(best))
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the policy is the round's reference
    AutoModelForCausalLM.from_pretrained(whole / "model")


@pytest.mark.parametrize(("run", "given"), [("whole", DPO), ("tuned", SFT)])
def test_resume_within_a_round_is_bit_identical(setting, request, run, given):
    words = ("rejection", "--config", setting / "config.toml", *given)
    whole, folder = request.getfixturevalue(run), setting / f"{run}-killed"
    assert_resume_identical("checkpoints/step_1", folder, whole, STEPS, *words)


def test_resume_reuses_the_responses_of_its_round(setting, whole, launched):
    """After sampling and before the round's first step; other sampling options discard the responses."""
    folder, other = (rewound(whole, setting / name, PER_ROUND) for name in ("between", "other"))
    responses = folder / "rounds" / "round_1.jsonl"
    written = responses.stat().st_mtime_ns
    succeed("rejection", "--resume", folder)
    assert digests(folder, STEPS) == digests(whole, STEPS) and responses.stat().st_mtime_ns == written
    printed = succeed("rejection", "--resume", other, "--rollout.temperature", 0.5)
    assert "resumed with rollout.temperature=0.5 (was 1.0)" in printed
    assert read_responses(other / "rounds" / "round_1.jsonl") != read_responses(responses)
    within, script = rewound(whole, setting / "within", 1), launched("rejection")
    shutil.rmtree(within / "rounds")
    with pytest.raises(SystemExit, match="within/rounds/round_0.jsonl: does not exist"):
        script.start(RejectionConfig, script.main, "rejection", ["--resume", str(within)])


def test_layouts_agree(setting, whole, tuned):
    """Four ranks: tp or pp times dp."""
    given = {"dpo-tp": DPO, "dpo-pp": DPO, "sft-tp": SFT}
    succeed_in_turn([words(setting, name, *own, f"--parallel.{name[4:]}", 2) for name, own in given.items()], ranks=4)
    for name, number in [("dpo-tp", 0), ("dpo-tp", 1), ("dpo-pp", 0), ("dpo-pp", 1), ("sft-tp", 0)]:
        run, other = setting / name, tuned if name == "sft-tp" else whole
        rows, others = (read_responses(path / "rounds" / f"round_{number}.jsonl") for path in (run, other))
        assert_close([vars(row) for row in rows], [vars(row) for row in others])
        agree(run, other, STEPS)


def test_sft_lowers_the_loss_on_the_picked_responses(tuned):
    steps = metrics(tuned)
    assert len(steps) == STEPS and steps[-1]["loss"] < steps[0]["loss"]
    responses = read_responses(tuned / "rounds" / "round_0.jsonl")
    assert sum(a.picked == "best" for a in responses) == 8 and not any(a.picked == "worst" for a in responses)
    assert steps[0]["picked"] == 8 and all(a.reference is None for a in responses)


def test_conflicting_options_are_refused():
    for changes, reported, world in (
        ({"rollout_samples_per_prompt": 1}, "rollout.samples_per_prompt=1", 1),
        ({"update_batch_size": 3, "parallel_dp": 2}, "update.batch_size=3", 2),
    ):
        given = {"model_path": "m", "data_sources": "a.jsonl", "reward_functions": "r.py:f"} | changes
        with pytest.raises(ValueError, match=reported):
            parse(RejectionConfig, options(**given)).check(world)
