"""GRPO and its kin: two updates are the same in every layout and for every cut; groups, drawing, and the script."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from layouts import ALONE, TWO_RANKS, Layout, assert_close, assert_layouts_agree, whole_states
from presets import ALGORITHMS, grpo_options
from samples import turn_masks
from scripts import AXES, agree, digests, kill_after, metrics, rewound, succeed, succeed_in_turn
from tiny import VOCAB, tiny_chat_model, tiny_llama
from trialign.algorithms.batch import Batch, Prompt, Rollout, pack, single_turn
from trialign.algorithms.config.common import ModelPaths, OptimizerConfig, RolloutConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.online import OnlineRun
from trialign.algorithms.config.reward import PolicyReward
from trialign.algorithms.grpo import actor_step, update, with_advantages, with_passes
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.policy_step import without_unscored
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Roles
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.groups import GroupPool, make_groups
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.checkpoint import Reader
from trialign.models.families.registry import read_config

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
SCORES = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, math.nan, 0.25, 0.25])
# All that may lie across micro-batches: sequence ratios, sample means, a KL and an importance correction of answers.
WHOLE = grpo_options(
    "gspo",
    clip_low=0.1,
    clip_high=0.1,
    kl_in="loss",
    kl_coef=0.1,
    rollout_correction="sequence-mask",
    rollout_ratio_high=5.0,
    entropy_coef=0.01,
    micro_batch_size=3,
    ema_decay=0.9,
)


def random_batch(seed: int) -> Batch:
    """Eight answers of 2 to 13 tokens with a sampler's made-up logprobs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (8,), generator=generator).tolist()
    samples = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    batch = pack(samples, turn_masks(lengths, [max(1, n // 3) for n in lengths]))
    return batch.with_(rollout_logprobs=batch.scatter(-4 + torch.randn(len(batch.response), generator=generator) / 10))


def config_of(knobs: GRPOOptions) -> GRPOConfig:
    return GRPOConfig(grpo=knobs, rollout=RolloutConfig(max_new_tokens=16, samples_per_prompt=4))


def two_updates(rank: int, world: int, layout: Layout, folder: Path, knobs: GRPOOptions = WHOLE):
    """Metrics of two batches, and gradients and weights put together from all ranks."""
    mesh = layout.mesh()
    config, shape = config_of(knobs), read_config(folder)
    model = build_decoder(str(folder), shape, mesh, "float32", trained=True)
    # A large eps: Adam's first step turns the rounding of gradients that are all but 0 into whole steps otherwise.
    settings = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=0.5, warmup_ratio=0.0)
    actor = build_learner(model, settings, 8, ema_decay=knobs.ema_decay, temperature=0.8, sizes=knobs)
    needed = config.needs_reference
    reference = Role(build_decoder(str(folder), shape, mesh, "float32"), 0.8, knobs) if needed else None
    metrics = {}
    for number in range(2):
        batch = without_unscored(random_batch(number), SCORES)
        batch = batch.with_(minibatches=draw_minibatches(8, knobs, seed=number))
        batch = with_passes(batch, Roles(actor, reference=reference), config)
        batch, made = with_advantages(batch.with_(group=GROUPS), config)
        made |= update(Roles(actor), batch, config)
        metrics |= {f"{name}/{number}": value for name, value in made.items()}
    return metrics, whole_states(actor=actor)


MIXES = {
    "sequence": WHOLE,
    "token": grpo_options(
        "dapo",
        **{name: getattr(WHOLE, name) for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "ema_decay")},
        rollout_correction="icepop",
        rollout_ratio_high=5.0,
        micro_batch_size=3,
        kl_in="reward",
    ),
}


def every_recipe(rank: int, world: int, layout: Layout, folder: Path):
    """Two updates of each algorithm, and of the mixes above."""
    options = MIXES | {name: grpo_options(name, micro_batch_size=3) for name in ALGORITHMS}
    return {name: two_updates(rank, world, layout, folder, option) for name, option in options.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(folder):
    return {kind: two_updates(0, 1, ALONE, folder, knobs) for kind, knobs in MIXES.items()}


def test_layouts_equal_one_process(folder):
    assert_layouts_agree(every_recipe, TWO_RANKS, folder)


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 1}, {"micro_batch_size": 8}, {"micro_batch_tokens": 40}], ids=str
)
def test_micro_batches_do_not_matter(folder, alone, changes):
    """With one sample a micro-batch, one of them has no targets: the answer without a score."""
    assert_close(two_updates(0, 1, ALONE, folder, dataclasses.replace(WHOLE, **changes)), alone["sequence"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_on_and_off_policy(folder, algorithm):
    """The first ratio is exactly 1 (update raises otherwise), later ones are not, and the weights move."""
    knobs = grpo_options(algorithm, minibatches=2, epochs=2, micro_batch_size=2)
    metrics, _ = two_updates(0, 1, ALONE, folder, knobs)
    assert metrics["ratio_min/0"] < 1 < metrics["ratio_max/0"] and metrics["grad_norm/1"] > 0
    assert ("kl/0" in metrics) == (config_of(knobs).grpo.kl_in != "off")
    once, _ = two_updates(0, 1, ALONE, folder, grpo_options(algorithm))
    assert once["ratio_min/0"] == once["ratio_max/0"] == 1


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("kl_in", ["score", "reward", "advantage", "loss"])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_new_tokens": 4}], ids=str)
def test_the_kl_in_the_log_is_of_the_actor_s_own_logprobs(folder, cut, kl_in, epochs):
    """Actor and reference are equal before the first step, whatever the sampler's logprobs (made up here) are."""
    mesh, shape = build_mesh(), read_config(folder)
    knobs = grpo_options("dapo", kl_in=kl_in, kl_estimator="k1", kl_coef=0.1, epochs=epochs, micro_batch_size=3)
    config = dataclasses.replace(config_of(knobs), rollout=RolloutConfig(max_new_tokens=16, **cut))
    model = build_decoder(str(folder), shape, mesh, "float32", trained=True)
    actor = build_learner(model, OptimizerConfig(), 8, sizes=knobs)
    reference = Role(build_decoder(str(folder), shape, mesh, "float32"), sizes=knobs)
    batch = without_unscored(random_batch(0), SCORES)
    batch = batch.with_(minibatches=draw_minibatches(8, knobs, seed=0))
    batch = with_passes(batch, Roles(actor, reference=reference), config)
    batch, metrics = with_advantages(batch.with_(group=GROUPS), config)
    metrics |= update(Roles(actor), batch, config)
    assert metrics["kl"] == 0 and metrics["kl_per_token"] == 0
    assert ("sampler_mismatch" in metrics) == (not cut)


def advantages(scores: list[float], group: list[int], **knobs) -> list[float]:
    """What each answer's tokens get; three tokens an answer."""
    batch = pack([[1, 2, 3]] * len(scores)).with_(rollout_logprobs=torch.zeros(3 * len(scores)))
    config = config_of(grpo_options(**knobs))
    scored = without_unscored(batch.with_(group=torch.tensor(group)), torch.tensor(scores))
    made, _ = with_advantages(scored, config)
    assert made.advantages is not None
    assert torch.equal(made.advantages[1::3], made.advantages[2::3]) and not made.advantages[::3].any()
    return made.advantages[1::3].tolist()


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("grpo", [1.5, -0.5, -0.5, -0.5]),
        ("dapo", [1.5, -0.5, -0.5, -0.5]),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("reinforce++", [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
        ("reinforce++_baseline", [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
    ],
)
def test_the_winner_of_1_0_0_0(algorithm, expected):
    assert advantages([1, 0, 0, 0], [0] * 4, algorithm=algorithm) == pytest.approx(expected, rel=1e-5)


def test_an_answer_without_a_score_moves_no_baseline():
    with_it = advantages([1.0, math.nan, 0.0, 0.5, 0.5], [0, 0, 0, 1, 1], algorithm="reinforce++_baseline")
    without_it = advantages([1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1], algorithm="reinforce++_baseline")
    assert with_it[1] == 0 and [with_it[i] for i in (0, 2, 3, 4)] == without_it


def test_a_kl_in_the_score_comes_before_the_baseline_and_in_the_reward_after_it():
    batch = pack([[1, 2, 3]] * 2).with_(rollout_logprobs=torch.tensor([0, -1.0, -1.0, 0, -1.0, -1.0]))
    batch = batch.with_(ref_logprobs=torch.tensor([0, -1.5, -1.5, 0, -1.0, -1.0]))  # d = 0.5 a token of the first
    scores, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    base = grpo_options("dr_grpo", kl_estimator="k1", kl_coef=0.2)
    for where, expected in (("score", [0.4, 0.4, -0.4, -0.4]), ("reward", [0.3, 0.4, -0.5, -0.5])):
        knobs = dataclasses.replace(base, **{"kl_in": where})
        made, metrics = with_advantages(batch.with_(scores=scores, group=group), config_of(knobs))
        assert made.advantages is not None and "kl" not in metrics  # the sampler's logprobs are not the actor's
        assert made.advantages[made.mask].tolist() == pytest.approx(expected)


def test_ratios_that_are_not_one_at_first_stop_the_run(folder):
    mesh, shape = build_mesh(), read_config(folder)
    model = build_decoder(str(folder), shape, mesh, "float32", trained=True)
    actor = build_learner(model, OptimizerConfig(), 1)
    batch = random_batch(0)
    batch = batch.with_(logprobs=batch.rollout_logprobs, advantages=batch.scatter(torch.ones(len(batch.response))))
    with pytest.raises(RuntimeError, match="not at exactly 1"):
        actor_step(actor, batch, range(8), config_of(grpo_options("dapo")), first=True)


def drawn(rewards: list[float], start: int = 0) -> list[Rollout]:
    """Answers with these rewards, four to a prompt."""
    prompts = [Prompt((start + i) // 4, [1], "", source=f"p.jsonl:{(start + i) // 4}") for i in range(len(rewards))]
    return [single_turn(prompt, [1] * (i + 1), [0.0] * (i + 1), "stop") for i, prompt in enumerate(prompts)]


def test_groups_without_spread_are_drawn_again_until_there_are_enough():
    config = config_of(grpo_options("dapo", overlong_buffer=0.0))
    pool = GroupPool(3, True, 3)
    assert pool.missing == 3
    one = [1, 0, 0, 0, 1, 1, 1, 1, math.nan, 2, 2, 2]
    pool.add(make_groups(drawn(one), one, one, config))
    assert pool.missing == 2
    two = [0.0] * 8
    pool.add(make_groups(drawn(two, 12), two, two, config))
    assert pool.missing == 2
    three = [0.0] * 4 + [3, 3, 4, 4]
    pool.add(make_groups(drawn(three, 20), three, three, config))
    assert pool.missing == 0
    groups, metrics = pool.take()
    assert [group.scores for group in groups] == [[1, 0, 0, 0], [3, 3, 4, 4], [1, 1, 1, 1]]
    assert metrics == {"groups_with_spread": 2 / 7, "draws": 3, "groups_filled": 1}


@pytest.mark.parametrize("left_out", [0, 3, 4, 7])
def test_a_group_of_another_size_is_refused_by_its_row(left_out):
    config = config_of(grpo_options("dapo", overlong_buffer=0.0))
    rollouts = drawn([0.0, 1.0] * 4)
    del rollouts[left_out]
    message = rf"p.jsonl:{left_out // 4}: 3 answers, but rollout.samples_per_prompt=4 in every group"
    with pytest.raises(ValueError, match=message):
        make_groups(rollouts, [0.0] * 7, [0.0] * 7, config)


def test_long_answers_pay_and_their_spread_is_judged_before():
    config = dataclasses.replace(
        config_of(grpo_options("dapo", overlong_buffer=0.5, overlong_penalty=0.5)),
        rollout=RolloutConfig(max_new_tokens=4, samples_per_prompt=4),
    )
    (group,) = make_groups(drawn([1.0] * 4), [1.0] * 4, [1.0] * 4, config)
    assert group.rewards == [1.0, 1.0, 0.75, 0.5] and not group.has_spread


GIVEN = {
    "model": ModelPaths("m"),
    "data": PromptData(("p.jsonl",)),
    "reward": PolicyReward(functions=("a:b",)),
}
REFUSED = {
    "one answer": ({"rollout": RolloutConfig(samples_per_prompt=1)}, 1, "samples_per_prompt=1: grpo.baseline=mean"),
    "minibatches": ({"grpo": GRPOOptions(minibatches=3)}, 1, "256 samples do not divide by grpo.minibatches=3"),
    "ranks": ({"run": OnlineRun(prompts_per_step=1)}, 3, "do not divide by dp=3"),
    "clip": ({"grpo": GRPOOptions(clip_low=1.0)}, 1, "grpo.clip_low=1.0: must be below 1"),
    "ratios": ({"grpo": GRPOOptions(policy_loss="cispo", clip_low=0.0, clip_high=0.0)}, 1, "grpo.clip_high=0.0"),
    "budget": ({"grpo": GRPOOptions(micro_batch_tokens=99)}, 1, "micro_batch_tokens=99 is less than"),
    "no reward": ({"reward": PolicyReward()}, 1, "no reward: give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    changes, world, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        GRPOConfig(**(GIVEN | changes)).check(world)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_chat_model(folder / "model")
    rows = [{"prompt": f"say {i} words", "goal": i % 7} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def length(prompts, completions, goal, **fields):\n"
        "    if 'say 13 words' in prompts and len(prompts) == 1: raise ValueError('thirteen')\n"
        "    if 'say 13 words' in prompts: raise ValueError('thirteen among others')\n"
        "    return [-abs(len(c) // 3 - g) / 10 for c, g in zip(completions, goal)]\n"
    )
    (folder / "config.toml").write_text(f"""
[model]
path = "{folder}/model"
dtype = "float32"
[data]
sources = ["{folder}/prompts.jsonl"]
max_prompt_tokens = 96
[rollout]
max_new_tokens = 8
samples_per_prompt = 2
[reward]
functions = ["{folder}/reward.py:length"]
normalize = true
on_failure = "abstain"
[optimizer]
lr = 1e-3
eps = 1e-5
[grpo]
clip_high = 0.28
dynamic_sampling = true
overlong_buffer = 0.2
kl_in = "loss"
kl_coef = 0.01
minibatches = 2
micro_batch_size = 2
[run]
steps = 6
prompts_per_step = 4
save_every = 1
show = 1
log = []
""")
    return folder


def test_killed_and_resumed_on_other_ranks_it_ends_the_same_and_its_export_loads(setting, tmp_path):
    """The run that nothing interrupts; one that is killed and goes on alone, bit for bit; and on from its fourth step
    in every layout of two ranks."""
    config = f"{setting}/config.toml"
    said = succeed("grpo", "--config", config, "--run.output", str(tmp_path / "whole"))
    assert "stop tokens: </s> (2)" in said and "abstains: reward function" in said and "thirteen" in said
    steps = metrics(tmp_path / "whole")
    assert any(step.get("abstained") == 2 for step in steps) and all(step["draws"] >= 1 for step in steps)

    killed = tmp_path / "killed"
    kill_after("checkpoints/step_2", killed, "grpo", "--config", config, "--run.output", str(killed), "--run.keep", "6")
    assert not (killed / "checkpoints" / "step_6").exists(), "killed too late to show anything"
    succeed("grpo", "--resume", str(killed))
    assert digests(killed, 6) == digests(tmp_path / "whole", 6) and metrics(killed) == steps

    from transformers import AutoModelForCausalLM

    master = Reader(tmp_path / "whole" / "checkpoints" / "step_6")
    start = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(killed / "model", dtype=torch.float32)
    for (name, weight), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(weight, master.read(f"actor/master/{name}")) and not torch.equal(weight, before), name

    folders = {axis: rewound(killed, tmp_path / axis, 4) for axis in AXES}
    succeed_in_turn([("grpo", "--resume", folders[axis], f"--parallel.{axis}", 2) for axis in AXES])
    for folder in folders.values():
        agree(folder, tmp_path / "whole", 6)
