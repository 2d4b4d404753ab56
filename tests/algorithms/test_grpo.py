"""GRPO and its kin: updates equal one process in every layout; advantages, groups, dynamic sampling and the script."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layouts import ALONE, FOUR_RANKS, TWO_RANKS, Layout, assert_layouts_agree, whole_states
from presets import ALGORITHMS, grpo_options
from samples import random_batch
from scripts import AXES, agree, assert_resume_identical, metrics, rewound, succeed, succeed_in_turn
from tiny import tiny_llama
from tiny_run import prompts, tiny_run
from trialign.algorithms.batch import Prompt, Rollout, pack, single_turn
from trialign.algorithms.config.common import ModelPaths, OptimizerConfig, RolloutConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.online import OnlineRunConfig
from trialign.algorithms.config.reward import PolicyReward
from trialign.algorithms.grpo import actor_step, update, with_advantages, with_forward_passes
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.policy_step import check_first_ratio, without_unscored
from trialign.algorithms.rewards.rewards import Scored
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Roles
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.groups import GroupSource, make_groups
from trialign.algorithms.rollout.source import Rollouts
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import Profiler
from trialign.engine.storage.checkpoint import Reader
from trialign.models.families.registry import read_config

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
SCORES = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, math.nan, 0.25, 0.25])
COMMON: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.1, "kl_coef": 0.1, "entropy_coef": 0.01, "ema_decay": 0.9}
COMMON |= {"rollout_ratio_high": 5.0, "micro_batch_size": 3}
MIXES = {  # all terms that may cross micro-batches: sequence ratios, sample means, KL, importance weights
    "sequence": grpo_options("gspo", **COMMON, kl_in="loss", rollout_correction="sequence-mask"),
    "token": grpo_options("dapo", **COMMON, kl_in="reward", rollout_correction="icepop"),
}


def config_of(options: GRPOOptions, **rollout) -> GRPOConfig:
    given = {"max_new_tokens": 16, "samples_per_prompt": 4} | rollout
    return GRPOConfig(grpo=options, rollout=RolloutConfig(**given))


def two_updates(rank: int, world: int, layout: Layout, folder: Path, config: GRPOConfig):
    """Metrics of two batches with two-turn samples; whole gradients, moments and weights."""
    mesh, shape, options = layout.mesh(), read_config(folder), config.grpo
    model = build_decoder(str(folder), shape, mesh, "float32", trained=True)
    # A large eps: Adam's first step turns the rounding of gradients that are all but 0 into whole steps otherwise.
    settings = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=0.5, warmup_ratio=0.0)
    actor = build_learner(model, settings, 8, ema_decay=options.ema_decay, temperature=0.8, sizes=options)
    needed = config.needs_reference
    reference = Role(build_decoder(str(folder), shape, mesh, "float32"), 0.8, options) if needed else None
    metrics = {}
    for number in range(2):
        batch = without_unscored(random_batch(number), SCORES)
        batch = batch.with_(group=GROUPS, minibatches=draw_minibatches(8, options, seed=number))
        batch = with_forward_passes(batch, Roles(actor, reference=reference), config)
        batch, numbers = with_advantages(batch, config)
        numbers |= update(Roles(actor), batch, config)
        metrics |= {f"{name}/{number}": value for name, value in numbers.items()}
    return metrics, whole_states(actor=actor)


def updates_of_each(rank: int, world: int, layout: Layout, folder: Path, options: dict[str, GRPOOptions]):
    return {name: two_updates(rank, world, layout, folder, config_of(own)) for name, own in options.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def test_layouts_equal_one_process(folder):
    algorithms = {name: grpo_options(name, micro_batch_size=3) for name in ALGORITHMS}
    assert_layouts_agree(updates_of_each, TWO_RANKS, folder, MIXES | algorithms)
    assert_layouts_agree(updates_of_each, FOUR_RANKS, folder, MIXES)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ratios_are_one_in_the_first_step_only(folder, algorithm):
    """`update` raises where the first is not exactly 1."""
    config = config_of(grpo_options(algorithm, minibatches=2, epochs=2, micro_batch_size=2))
    metrics, _ = two_updates(0, 1, ALONE, folder, config)
    assert metrics["first_ratio_error/0"] == metrics["first_ratio_error/1"] == 0
    assert metrics["ratio_min/0"] < 1 < metrics["ratio_max/0"] and metrics["grad_norm/1"] > 0
    assert ("kl/0" in metrics) == (config.grpo.kl_in != "off")


def test_first_ratios_other_than_one_raise(folder):
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", trained=True)
    batch = random_batch(0)
    batch = batch.with_(logprobs=batch.rollout_logprobs, advantages=batch.scatter(torch.ones(len(batch.response))))
    actor, config = build_learner(model, OptimizerConfig(), 1), config_of(grpo_options("dapo", first_ratio_limit=100.0))
    with pytest.raises(RuntimeError, match="allowed is 0 .*first_ratio_limit"):  # the option is CUDA's
        actor_step(actor, batch, range(8), config, first=True)


def test_first_ratios_may_differ_from_one_by_the_limit():
    extremes = {"ratio_min": 1 - 2**-11, "ratio_max": 1 + 2**-12}
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert check_first_ratio(extremes, 1e-3, cuda) == 2**-11
    for device in (cpu, cuda):
        assert check_first_ratio({}, 0.0, device) == check_first_ratio({"ratio_min": 1, "ratio_max": 1}, 0, device) == 0
    for device, limit, allowed in ((cuda, 1e-4, "0.0001"), (cpu, 1e-3, "0")):
        with pytest.raises(RuntimeError, match=rf"0.000488 from 1 .*allowed is {allowed} \(first_ratio_limit"):
            check_first_ratio(extremes, limit, device)
    with pytest.raises(RuntimeError, match="up to nan from 1"):
        check_first_ratio({"ratio_min": math.nan, "ratio_max": math.nan}, math.inf, cuda)


@pytest.mark.parametrize(
    ("kl_in", "epochs", "truncation"),
    [("score", 1, {}), ("reward", 2, {}), ("advantage", 2, {"top_p": 0.5}), ("loss", 1, {"top_p": 0.5})],
)
def test_logged_kl_is_of_the_actors_own_logprobs(folder, kl_in, epochs, truncation):
    """Actor and reference are equal before the first step, while the sampler's logprobs are random."""
    options = grpo_options("dapo", kl_in=kl_in, kl_estimator="k1", kl_coef=0.1, epochs=epochs, micro_batch_size=3)
    metrics, _ = two_updates(0, 1, ALONE, folder, config_of(options, **truncation))
    assert metrics["kl/0"] == metrics["kl_per_token/0"] == 0
    assert ("sampler_mismatch/0" in metrics) == (not truncation)


def test_kl_in_the_score_precedes_the_baseline_and_in_the_reward_follows_it():
    batch = pack([[1, 2, 3]] * 2).with_(rollout_logprobs=torch.tensor([0, -1.0, -1.0, 0, -1.0, -1.0]))
    batch = batch.with_(ref_logprobs=torch.tensor([0, -1.5, -1.5, 0, -1.0, -1.0]))  # d = 0.5 a token of the first
    batch = batch.with_(scores=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    for kl_in, expected in (("score", [0.4, 0.4, -0.4, -0.4]), ("reward", [0.3, 0.4, -0.5, -0.5])):
        options = grpo_options("dr_grpo", kl_estimator="k1", kl_coef=0.2, kl_in=kl_in)
        result, metrics = with_advantages(batch, config_of(options))
        assert result.advantages is not None and "kl" not in metrics  # the sampler's logprobs are not the actor's
        assert result.advantages[result.mask].tolist() == pytest.approx(expected)


ADVANTAGES = {"grpo": 1.5, "dapo": 1.5, "dr_grpo": 0.75, "rloo": 1.0}
ADVANTAGES |= dict.fromkeys(("reinforce++", "reinforce++_baseline"), math.sqrt(3))


@pytest.mark.parametrize("algorithm", ADVANTAGES)
def test_advantages_of_one_right_response_of_four(algorithm):
    """On every target; an unscored response has none and changes no baseline."""
    scores = torch.tensor([1, math.nan, 0, 0, 0])
    batch = without_unscored(pack([[1, 2, 3]] * 5), scores).with_(scores=scores, group=torch.zeros(5).long())
    result, _ = with_advantages(batch.with_(rollout_logprobs=torch.zeros(15)), config_of(grpo_options(algorithm)))
    assert result.advantages is not None and not result.advantages[~result.mask].any()
    first = ADVANTAGES[algorithm]
    assert result.advantages[result.mask].tolist() == pytest.approx([first] * 2 + [-first / 3] * 6, rel=1e-5)


def rollouts_of(count: int, start: int = 0) -> list[Rollout]:
    """Responses of 1, 2, 3, ... tokens, four to a prompt."""
    prompts = [Prompt((start + i) // 4, [1], "", source=f"p.jsonl:{(start + i) // 4}") for i in range(count)]
    return [single_turn(prompt, [1] * (i + 1), [0.0] * (i + 1), "stop") for i, prompt in enumerate(prompts)]


def test_dynamic_sampling_draws_until_groups_have_spread():
    """Rewards of three draws: one group of three with spread, none of two, one of two; then draws run out."""
    draws = iter([[1, 0, 0, 0, 1, 1, 1, 1, math.nan, 2, 2, 2], [0.0] * 8, [0.0] * 4 + [3, 3, 4, 4]])
    asked = []

    def draw(step: int, prompts: int) -> Rollouts:
        asked.append(prompts)
        return Rollouts(step, rollouts_of(4 * prompts, 100 * len(asked)), 4)

    mesh = build_mesh()
    generator, profiler = SimpleNamespace(mesh=mesh), Profiler(mesh)
    source: Any = SimpleNamespace(draw=draw, generator=generator, profiler=profiler)
    rewards: Any = lambda rollouts, batch: Scored(*([values := next(draws), values]))  # noqa: E731
    rewards.metrics = {}
    options = grpo_options("dapo", overlong_buffer=0.0, max_draws=3)
    config = dataclasses.replace(config_of(options), run=OnlineRunConfig(prompts_per_step=3))
    drawn = GroupSource(source, rewards, config).next(0)
    assert asked == [3, 2, 2] and drawn.rewards.tolist() == [1, 0, 0, 0, 3, 3, 4, 4, 1, 1, 1, 1]
    assert rewards.metrics == {"groups_with_spread": 2 / 7, "draws": 3, "groups_filled": 1}


def test_groups_have_one_size_and_spread_before_the_length_penalty():
    for missing in (0, 7):
        rollouts = [rollout for i, rollout in enumerate(rollouts_of(8)) if i != missing]
        with pytest.raises(ValueError, match=rf"p.jsonl:{missing // 4}: 3 .*rollout.samples_per_prompt=4"):
            make_groups(rollouts, [0.0] * 7, [0.0] * 7, config_of(grpo_options("dapo")))
    config = config_of(grpo_options("dapo", overlong_buffer=0.5, overlong_penalty=0.5), max_new_tokens=4)
    (group,) = make_groups(rollouts_of(4), [1.0] * 4, [1.0] * 4, config)
    assert group.rewards == [1.0, 1.0, 0.75, 0.5] and not group.has_spread


def test_options_that_do_not_fit_are_refused():
    given: dict[str, Any] = {
        "model": ModelPaths("m"),
        "data": PromptData(("p",)),
        "reward": PolicyReward(functions=("a:b",)),
    }
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rollout": RolloutConfig(samples_per_prompt=1)}, "samples_per_prompt=1"),
        ({"grpo": GRPOOptions(minibatches=3)}, "grpo.minibatches=3"),
        ({"grpo": GRPOOptions(clip_low=1.0)}, "grpo.clip_low=1.0"),
        ({"grpo": GRPOOptions(policy_loss="cispo", clip_low=0.0, clip_high=0.0)}, "grpo.clip_high=0.0"),
        ({"grpo": GRPOOptions(micro_batch_tokens=99)}, "micro_batch_tokens=99"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            GRPOConfig(**(given | changes)).check(1)
    with pytest.raises(ValueError, match="rollout_ratio_high=2.0: .*rollout_ratio_low=3.0"):
        GRPOOptions(rollout_ratio_low=3.0, rollout_ratio_high=2.0)


def test_killed_and_resumed_runs_equal_the_whole_run(tmp_path):
    """Bit for bit in one process; within rounding from the fourth step on in every layout of two ranks."""
    given = {
        "data_max_prompt_tokens": 96, "rollout_max_new_tokens": 8, "rollout_samples_per_prompt": 2,
        "reward_functions": [f"{tmp_path}/own.py:length"], "reward_normalize": True, "reward_on_failure": "skip",
        "optimizer_lr": 1e-3, "optimizer_eps": 1e-5, "grpo_clip_high": 0.28, "grpo_dynamic_sampling": True,
        "grpo_overlong_buffer": 0.2, "grpo_kl_in": "loss", "grpo_kl_coef": 0.01, "grpo_minibatches": 2,
        "grpo_micro_batch_size": 2, "run_steps": 6, "run_prompts_per_step": 4, "run_save_every": 1, "run_show": 1,
    }  # fmt: skip
    arguments = ("grpo", "--config", tiny_run(tmp_path, prompts(20), **given) / "config.toml")
    (tmp_path / "own.py").write_text(
        "def length(prompts, completions, goal, **fields):\n"
        "    if 'say 13 words' in prompts: raise ValueError('thirteen')\n"
        "    return [-abs(len(c) // 3 - g) / 10 for c, g in zip(completions, goal)]\n"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = succeed(*arguments, "--run.output", whole)
    assert "stop tokens: </s> (2)" in output and "not scored: reward function" in output and "thirteen" in output
    steps = metrics(whole)
    assert any(step.get("unscored") == 2 for step in steps) and all(step["draws"] >= 1 for step in steps)
    assert_resume_identical("checkpoints/step_2", killed, whole, 6, *arguments, "--run.keep", 6)

    from transformers import AutoModelForCausalLM

    master = Reader(whole / "checkpoints" / "step_6")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(killed / "model", dtype=torch.float32)
    for (name, weight), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(weight, master.read(f"actor/master/{name}")) and not torch.equal(weight, before), name
    folders = {axis: rewound(killed, tmp_path / axis, 4) for axis in AXES}
    succeed_in_turn([("grpo", "--resume", folders[axis], f"--parallel.{axis}", 2) for axis in AXES])
    for folder in folders.values():
        agree(folder, whole, 6)
