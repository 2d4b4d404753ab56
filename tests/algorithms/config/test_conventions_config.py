"""The `convention` section: under each preset the losses of PPO and GRPO are the pure functions with its choices."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from samples import turn_masks
from tiny import VOCAB, tiny_llama
from trialign.algorithms.advantages import (
    GroupRule,
    WhitenRule,
    gae,
    group_advantages,
    kl_estimate,
    token_rewards,
    whiten,
)
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.common import OptimizerConfig, RewardConfig, UpdateConfig
from trialign.algorithms.config.convention import ConventionConfig, GroupConvention, PPOConvention
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions, GRPORollout
from trialign.algorithms.config.ppo import ActorConfig, CriticConfig, PPOConfig, PPOOptions
from trialign.algorithms.config.preference import DPOConfig, DPOLoss
from trialign.algorithms.config.presets import PRESETS, Convention, ConventionName
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.grpo import advantages_of, step, token_losses, with_advantages
from trialign.algorithms.losses.aggregation import Segments, token_weights
from trialign.algorithms.losses.policy import importance_weights, log_ratio, ppo_loss, sequence_log_ratio
from trialign.algorithms.ppo import actor_step, critic_step, with_rewards
from trialign.algorithms.ppo import with_advantages as ppo_advantages
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.role import Learner
from trialign.engine.mesh import build_mesh
from trialign.kernels.ppo_loss import clipped_value_loss
from trialign.models.config import HeadKind
from trialign.models.families.registry import read_config

SCORES = torch.tensor([30.0, -1.0, 0.5, 0.0, 2.0, 2.5])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
WHOLE = range(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def learner(folder: Path, head: HeadKind = "lm") -> Learner:
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", head=head, trained=True)
    return build_learner(model, OptimizerConfig(lr=0.0), 1, sizes=UpdateConfig(micro_batch_size=3))


def batch_of(actor: Learner, far: float = 3.0) -> Batch:
    """Six answers of 2 to 9 tokens; one token of a losing answer has the log-ratio `far`, which meets dual clips, and
    beyond 20 all limits; one of the first answer is far from its reference."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 14, (6,), generator=generator).tolist()
    samples = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    batch = pack(samples, turn_masks(lengths, [max(1, n // 3) for n in lengths]))
    now = actor.logprobs(batch)

    def near(spread: float) -> torch.Tensor:
        return now + batch.spread(spread * torch.randn(len(batch.response), generator=generator))

    old, ref = near(0.3), near(1.0)
    loser = batch.last[3]
    old[loser] = now[loser] - far
    ref[batch.last[0]] += 12
    values = batch.spread(torch.randn(len(batch.response), generator=generator))
    return batch.with_(logprobs=old, ref_logprobs=ref, rollout_logprobs=near(0.3), values=values)


def pure(batch: Batch) -> tuple[Segments, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segments, old and reference logprobs and values of a batch."""
    segments = Segments.of_lengths(torch.tensor(batch.lengths), batch.mask)
    assert batch.logprobs is not None and batch.ref_logprobs is not None and batch.values is not None
    return segments, batch.logprobs, batch.ref_logprobs, batch.values


def sampled(batch: Batch) -> torch.Tensor:
    assert batch.rollout_logprobs is not None
    return batch.rollout_logprobs


@pytest.mark.parametrize("far", [3.0, 25.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_ppo_s_losses_are_the_preset_s(folder, preset, far):
    rules, config = PRESETS[preset], PPOConfig(convention=PPOConvention(preset), ppo=PPOOptions(kl="k3"))
    actor, critic = learner(folder), learner(folder, "score")
    batch = batch_of(actor, far)
    now, value = actor.logprobs(batch), critic.values(batch)
    scored, _ = with_rewards(batch, SCORES, config, 0.1)
    scored, _ = ppo_advantages(scored, config)
    policy = actor_step(actor, scored, WHOLE, config, first=False)["policy_loss"]
    critics = critic_step(critic, scored, WHOLE, config)[0]["value_loss"]

    segments, old, ref, before = pure(batch)
    kl = kl_estimate(old, ref, "k3", replace(rules.kl, weighted=False))
    rewards = token_rewards(SCORES, kl, segments, 0.1, clip=rules.token_clip)
    advantages, returns = gae(rewards, before, segments, batch.cu_seqlens, 1.0, rules.lam, rules.gaps)
    white = whiten(advantages, segments, rules.whiten)
    d = log_ratio(now, old, rules.log_ratio_limit)
    losses = ppo_loss(d, white, 0.2, 0.2, rules.dual_clip or None)[0]
    expected = (losses * token_weights(segments, rules.aggregation)).sum().item()
    assert policy == pytest.approx(expected, rel=1e-5)
    squares = clipped_value_loss(value, before, returns, rules.value_clip)[0] * rules.value_loss_factor / 0.5
    expected = (squares * token_weights(segments, rules.value_aggregation)).sum().item()
    assert critics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("far", [3.0, 25.0])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
@pytest.mark.parametrize("preset", PRESETS)
def test_grpo_s_losses_are_the_preset_s(folder, preset, algorithm, far):
    rules = PRESETS[preset]
    config = GRPOConfig(convention=GroupConvention(preset), grpo=GRPOOptions(algorithm=algorithm))
    actor = learner(folder)
    batch = batch_of(actor, far)
    now = actor.logprobs(batch)
    scored, _ = with_advantages(batch, SCORES, GROUP, config)
    made = step(actor, scored, WHOLE, config, first=False)

    segments, old, ref, _ = pure(batch)
    grouped = group_advantages(SCORES, GROUP, rules.group)
    grouped = grouped if rules.token_clip is None else grouped.clamp(*rules.token_clip)
    d, advantages = log_ratio(now, old, rules.log_ratio_limit), segments.spread(grouped)
    if algorithm == "gspo":
        d = sequence_log_ratio(now - old, segments, rules.gspo_gradient).clamp(
            max=10.0 if preset == "verl" else math.inf
        )
        losses = ppo_loss(d, advantages, 3e-4, 4e-4)[0]
        weights = token_weights(segments, "sample-mean")
    else:
        losses = ppo_loss(d, advantages, 0.2, 0.2, rules.dual_clip or None)[0]
        weights = token_weights(segments, rules.aggregation)
        kl = kl_estimate(now, ref, "k3", rules.kl, old)
        assert made["kl_loss"] == pytest.approx((kl * weights).sum().item(), rel=1e-4)
    if preset == "trl":  # corrects for the sampler unless told not to
        bounds = {"low": rules.importance_low, "high": rules.importance_high}
        losses = losses * importance_weights(old, sampled(batch), segments, level="sequence", outside="zero", **bounds)
    assert made["policy_loss"] == pytest.approx((losses * weights).sum().item(), rel=1e-4)


def test_presets_differ_where_they_say(folder):
    """No two presets of these make one number of one batch: the tests above could tell them apart."""
    actor = learner(folder)
    batch = batch_of(actor)
    losses = {}
    for preset in PRESETS:
        config = GRPOConfig(convention=GroupConvention(preset), grpo=GRPOOptions(kl_coef=0.1))
        scored, _ = with_advantages(batch, SCORES, GROUP, config)
        made = step(actor, scored, WHOLE, config, first=False)
        losses[preset] = (round(made["policy_loss"], 5), made["kl_loss"])
    assert len(set(losses.values())) == len(PRESETS), losses


KNOBS = {
    "ppo": (
        PPOConfig(
            ppo=PPOOptions(lam=0.5),
            reward=RewardConfig(clip=2.0),
            actor=ActorConfig(dual_clip=0.0),
            critic=CriticConfig(value_clip=0.0),
            convention=PPOConvention(
                "verl",
                kl_input_limit=3.0,
                kl_output_limit=0.0,
                reward_clip_at="token",
                gaps="zero",
                whiten_variance="population",
                whiten_floor="clamp",
                whiten_eps=1e-4,
                log_ratio_limit=0.0,
                aggregation="sample-sum",
                value_aggregation="sum-of-sample-means",
                value_loss_factor=1.0,
            ),
        ).rules,
        {"lam": 0.5, "dual_clip": 0.0, "value_clip": 0.0, "token_clip": (-2.0, 2.0), "gaps": "zero",
         "log_ratio_limit": 0.0, "aggregation": "sample-sum", "value_aggregation": "sum-of-sample-means",
         "value_loss_factor": 1.0},
    ),
    "grpo": (
        GRPOConfig(
            convention=GroupConvention(
                "nemo",
                kl_weighted="off",
                group_eps=0.5,
                group_alone="reward",
                gspo_gradient="own",
                sequence_log_ratio_limit=7.0,
                cispo_bounds="absolute",
                whiten_eps=1e-3,
            ),
            reward=RewardConfig(clip=3.0),
            grpo=GRPOOptions(importance_low=0.25, importance_high=4.0, dual_clip=5.0, baseline="mean"),
        ).choices.rules,
        {"group": GroupRule("others", "others", 0.5, "reward"), "gspo_gradient": "own", "score_clip": 3.0,
         "sequence_log_ratio_limit": 7.0, "whiten_returns": WhitenRule(eps=1e-3),
         "cispo_bounds": "absolute", "importance_low": 0.25, "importance_high": 4.0, "dual_clip": 5.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOBS)
def test_a_given_knob_wins_over_the_preset(case):
    rules, expected = KNOBS[case]
    assert {name: getattr(rules, name) for name in expected} == expected
    if case == "ppo":
        assert rules.whiten == replace(PRESETS["verl"].whiten, unbiased=False, floor="clamp", eps=1e-4)
        assert (rules.kl.input_limit, rules.kl.output_limit, rules.kl.clamped) == (3.0, 0.0, ("k1", "k2", "k3", "abs"))
    else:
        assert rules.kl == replace(PRESETS["nemo"].kl, weighted=False)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("section", [ConventionConfig, PPOConvention, GroupConvention])
def test_nothing_given_is_the_preset(section, preset):
    assert section(preset).resolved() == PRESETS[preset]
    assert {field.name for field in fields(Convention)} >= {"lam", "ipo", "value_clip"}


def test_grpo_s_choices_are_the_knob_s_then_the_algorithm_s_then_the_convention_s():
    def made(**knobs):
        return GRPOConfig(convention=GroupConvention("slime"), grpo=GRPOOptions(**knobs)).choices

    assert made().aggregation == "sample-mean" and made(algorithm="dapo").aggregation == "token-mean"
    assert made(algorithm="dapo", aggregation="constant").aggregation == "constant"
    nemo = GRPOConfig(convention=GroupConvention("nemo"))
    assert nemo.choices.group == PRESETS["nemo"].group
    rloo = replace(nemo, grpo=GRPOOptions(algorithm="rloo")).choices.group
    assert (rloo.baseline, rloo.scale) == ("others", "none")
    assert made(algorithm="dr_grpo").constant == GRPORollout().max_new_tokens
    trl = GRPOConfig(convention=GroupConvention("trl"), grpo=GRPOOptions(algorithm="cispo")).choices
    assert trl.bounds == made(algorithm="cispo").bounds == (0.0, 5.0)
    assert made(algorithm="dapo").overlong_buffer == 1024 // 5 and made(algorithm="dapo", overlong_buffer=0).dynamic


def choices_of(preset: ConventionName, **knobs):
    return GRPOConfig(convention=GroupConvention(preset), grpo=GRPOOptions(**knobs)).choices


@pytest.mark.parametrize(
    ("algorithm", "places"),
    [
        ("grpo", ["loss"] * 6),
        ("rloo", ["score", "reward", "score", "score", "score", "score"]),
        ("reinforce++", ["reward", "reward", "reward", "reward", "advantage", "reward"]),
        ("reinforce++_baseline", ["reward", "reward", "reward", "off", "advantage", "advantage"]),
    ],
)
def test_where_the_kl_goes(algorithm, places):
    assert [choices_of(preset, algorithm=algorithm).kl_in for preset in PRESETS] == places
    assert choices_of("verl", algorithm=algorithm, kl_in="advantage").kl_in == "advantage"


def test_rloo_s_ratio_and_the_correction_are_the_preset_s():
    trl, verl = choices_of("trl", algorithm="rloo"), choices_of("verl", algorithm="rloo")
    assert (trl.level, trl.aggregation, trl.importance) == ("sequence-sum", "sample-mean", "off")
    assert (verl.level, verl.aggregation, verl.importance) == ("token", "token-mean", "off")
    assert choices_of("trl", algorithm="rloo", level="token").level == "token"
    assert choices_of("trl").importance == choices_of("slime", importance="sequence-icepop").importance
    assert choices_of("trl", importance="off").importance == choices_of("trialign").importance == "off"


def advantages_under(preset: ConventionName, algorithm: str, mask: list[bool]) -> torch.Tensor:
    """Of two answers with rewards 1 and 3, four tokens each, whose KL is 1 at every token."""
    segments = Segments.of_lengths(torch.tensor([4, 4]), torch.tensor(mask))
    choices = choices_of(preset, algorithm=algorithm, kl_coef=0.1, whiten="off")
    ends, group = torch.tensor([0, 4, 8]).int(), torch.zeros(2).long()
    return advantages_of(torch.tensor([1.0, 3.0]), group, torch.ones(8), segments, ends, choices)[1]


def test_the_kl_of_later_tokens_or_a_token_s_own():
    every = [True] * 8
    later = [r + kl for r in (-1, 1) for kl in (-0.4, -0.3, -0.2, -0.1)]
    for preset, expected in {
        "openrlhf": later, "verl": [-1] * 4 + [1] * 4, "nemo": [-1.1] * 4 + [0.9] * 4, "slime": [-1.1] * 4 + [0.9] * 4
    }.items():  # fmt: skip
        made = advantages_under(preset, "reinforce++_baseline", every)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float32))
    gap = [True, False, True, True, True, True, False, False]
    own = torch.tensor([0.9, 0, 0.9, 0.9, 2.9, 2.9, 0, 0])
    torch.testing.assert_close(advantages_under("nemo", "reinforce++", gap), own)


@pytest.mark.parametrize("config", [PPOConfig, GRPOConfig, RejectionConfig])
def test_one_clip_of_the_reward_and_the_preset_s(config):
    """trialign clips the score at 10, OpenRLHF what a token is given, nobody else; a clip that is given wins."""
    section = {PPOConfig: PPOConvention, GRPOConfig: GroupConvention, RejectionConfig: ConventionConfig}[config]

    def shaped(preset: ConventionName, **reward) -> list[float]:
        made = config(convention=section(preset), reward=RewardConfig(**reward))
        return RewardShaper(made.reward, made.rules)([30.0, -12.0, 1.0], [True] * 3)

    clipped, whole = [10.0, -10.0, 1.0], [30.0, -12.0, 1.0]
    assert [shaped(preset) == clipped for preset in PRESETS] == [True, False, False, False, False, False]
    assert shaped("openrlhf") == shaped("trialign", clip=0) == whole
    assert shaped("verl", clip=5) == [5.0, -5.0, 1.0]
    assert shaped("openrlhf", clip=5) == ([5.0, -5.0, 1.0] if config is RejectionConfig else whole)
    rules = config(convention=section("openrlhf"), reward=RewardConfig(clip=5)).rules
    assert rules.token_clip == (None if config is RejectionConfig else (-5.0, 5.0))


def test_gspo_s_log_ratio_is_bounded_as_a_whole():
    """No token's is: OpenRLHF has no bound at all, verl one of the mean."""
    segments = Segments.of_lengths(torch.tensor([2]), torch.ones(2).bool())
    for preset, expected in (("openrlhf", 5.0), ("verl", 5.0), ("trialign", 5.0)):
        choices = choices_of(preset, algorithm="gspo")  # pyright: ignore[reportArgumentType]
        ratio = token_losses(torch.tensor([40.0, -30.0]), torch.zeros(2), torch.ones(2), segments, choices)[1]
        assert ratio.log().tolist() == pytest.approx([expected] * 2)
    ratio = token_losses(torch.full((2,), 40.0), torch.zeros(2), torch.ones(2), segments, choices_of("verl"))[1]
    assert ratio.log().tolist() == pytest.approx([20.0] * 2)
    verl = choices_of("verl", algorithm="gspo")
    ratio = token_losses(torch.full((2,), 40.0), torch.zeros(2), torch.ones(2), segments, verl)[1]
    assert ratio.log().tolist() == pytest.approx([10.0] * 2)


def test_defaults_that_no_vector_shows():
    """Numbers that the golden cases are given as arguments: what each trainer has where nothing is said."""
    named = [
        (r.lam, r.value_clip, r.dual_clip, r.log_ratio_limit, r.sequence_log_ratio_limit) for r in PRESETS.values()
    ]
    assert named == [
        (0.95, 0.5, 0.0, 0.0, 0.0),
        (1.0, 0.5, 0.0, 20.0, 0.0),
        (0.95, 0.2, 0.0, 0.0, 0.0),
        (1.0, 0.5, 3.0, 20.0, 10.0),
        (0.95, 0.2, 0.0, 0.0, 0.0),
        (1.0, 0.2, 0.0, 0.0, 0.0),
    ]
    bounds = [(r.importance, r.importance_low, r.importance_high) for r in PRESETS.values()]
    assert bounds == [
        ("off", 0.0, 2.0), ("off", 0.5, 5.0), ("sequence-icepop", 0.0, 3.0), *[("off", 0.0, 2.0)] * 3
    ]  # fmt: skip


@pytest.mark.parametrize("config", [DPOConfig, RejectionConfig])
def test_ipo_s_log_ratio_is_the_preset_s_unless_it_is_said(config):
    def made(preset: ConventionName, **loss):
        return config(convention=ConventionConfig(preset), loss=DPOLoss(**loss)).pair_loss.average

    assert (made("trl", kind="ipo"), made("openrlhf", kind="ipo"), made("trl", kind="dpo")) == ("mean", "sum", "sum")
    assert made("trl", kind="ipo", average="sum") == "sum" and made("trialign", average="mean") == "mean"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOConvention(kl_input_limit=-2), "kl_input_limit=-2: must be 0 or more, or -1"),
        (lambda: PPOConvention(value_loss_factor=0.0), "value_loss_factor=0.0: must be above 0, or -1"),
        (lambda: GroupConvention(group_eps=math.inf), "group_eps=inf: must be 0 or more, or -1"),
        (lambda: PPOOptions(lam=1.5), "lam=1.5: must be from 0 to 1, or -1 (as convention.preset says)"),
        (lambda: ActorConfig(dual_clip=0.5), "dual_clip=0.5: must be 0 (off) or above 1, or -1"),
        (lambda: GRPOOptions(kl_coef=math.nan), "kl_coef=nan: must be 0 or more, or -1"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
