"""Overlays of launch/configs/presets: losses of PPO and GRPO under each are the pure functions with its numbers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from presets import ALGORITHMS, TRAINERS, grpo_options, preset
from samples import turn_masks
from tiny import VOCAB, tiny_llama
from trialign.algorithms.advantages import gae, group_advantages, token_rewards, whiten
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.preference import DPOConfig
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.config.rlhf import RLHFConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.grpo import actor_step as grpo_step
from trialign.algorithms.grpo import estimate_advantages, policy_losses, with_advantages
from trialign.algorithms.losses.aggregation import Segments, token_weights
from trialign.algorithms.losses.kl import kl_estimate
from trialign.algorithms.losses.policy import importance_weights, log_ratio, ppo_loss, sequence_log_ratio
from trialign.algorithms.losses.value import value_loss
from trialign.algorithms.ppo import actor_step, critic_step, with_rewards
from trialign.algorithms.ppo import with_gae as ppo_advantages
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Learner
from trialign.engine.config import CONFIGS, load
from trialign.engine.mesh import build_mesh
from trialign.models.config import HeadKind
from trialign.models.families.registry import read_config

SCORES = torch.tensor([30.0, -1.0, 0.5, 0.0, 2.0, 2.5])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
WHOLE = range(6)
SCRIPTS = {"ppo": PPOConfig, "grpo": GRPOConfig, "dpo": DPOConfig, "rejection": RejectionConfig, "rlhf": RLHFConfig}


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
        return now + batch.scatter(spread * torch.randn(len(batch.response), generator=generator))

    old, ref = near(0.3), near(1.0)
    loser = batch.last[3]
    old[loser] = now[loser] - far
    ref[batch.last[0]] += 12
    values = batch.scatter(torch.randn(len(batch.response), generator=generator))
    return batch.with_(logprobs=old, ref_logprobs=ref, rollout_logprobs=near(0.3), values=values)


def pure(batch: Batch) -> tuple[Segments, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segments, old and reference logprobs and values of a batch."""
    segments = Segments.of_lengths(torch.tensor(batch.lengths), batch.mask)
    assert batch.logprobs is not None and batch.ref_logprobs is not None and batch.values is not None
    return segments, batch.logprobs, batch.ref_logprobs, batch.values


@pytest.mark.parametrize("far", [3.0, 25.0])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_ppo_s_losses_are_the_pure_functions(folder, trainer, estimator, far):
    config = preset(PPOConfig, trainer)
    limited = preset(GRPOConfig, trainer).grpo if estimator == "k3" else config.ppo  # as the overlays' comments have it
    limits = limited.kl_input_limit, limited.kl_output_limit
    changes = {"kl_estimator": estimator, "kl_input_limit": limits[0], "kl_output_limit": limits[1]}
    config = replace(config, ppo=replace(config.ppo, **changes))
    actor, critic, options = learner(folder), learner(folder, "score"), config.ppo
    batch = batch_of(actor, far)
    now, value = actor.logprobs(batch), critic.values(batch)
    scored, _ = with_rewards(batch, SCORES, config, 0.1)
    scored, _ = ppo_advantages(scored, config)
    policy = actor_step(actor, scored, WHOLE, config, first=False)["policy_loss"]
    critics = critic_step(critic, scored, WHOLE, config)[0]["value_loss"]

    segments, old, ref, before = pure(batch)
    kl = kl_estimate(old, ref, estimator, *limits)
    rewards = token_rewards(SCORES, kl, segments, 0.1, clip=10.0 if trainer == "openrlhf" else 0.0)
    lam = 0.95 if trainer in ("trialign", "trl", "nemo_rl") else 1.0
    gaps = "zero" if trainer == "openrlhf" else "carry"
    advantages, returns = gae(rewards, before, segments, batch.cu_seqlens, 1.0, lam, gaps)
    how: Any = {"trl": "unbiased", "verl": "unbiased_eps", "nemo_rl": "unbiased_eps", "slime": "unbiased"}
    white = whiten(advantages, segments, how.get(trainer, "population"))
    d = log_ratio(now, old, 20.0 if trainer in ("openrlhf", "verl") else 0.0)
    losses = ppo_loss(d, white, 0.2, 0.2, 3.0 if trainer == "verl" else 0.0)[0]
    weights = token_weights(segments, options.loss_aggregation)
    assert policy == pytest.approx((losses * weights).sum().item(), rel=1e-5)
    clip = 0.5 if trainer in ("trialign", "openrlhf", "verl") else 0.2
    squares = value_loss(value, before, returns, clip, 1.0 if trainer == "slime" else 0.5)[0]
    assert critics == pytest.approx((squares * weights).sum().item(), rel=1e-5)
    assert options.loss_aggregation == ("sample-mean" if trainer == "slime" else "token-mean")


@pytest.mark.parametrize("far", [3.0, 25.0])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_grpo_s_losses_are_the_pure_functions(folder, trainer, algorithm, far):
    config: GRPOConfig = preset(GRPOConfig, trainer, algorithm)
    actor = learner(folder)
    batch = batch_of(actor, far)
    now = actor.logprobs(batch)
    scored, _ = with_advantages(batch.with_(scores=SCORES, group=GROUP), config)
    made = grpo_step(actor, scored, WHOLE, config, first=False)

    segments, old, ref, _ = pure(batch)
    how: Any = ("leave-one-out", "leave-one-out") if trainer == "nemo_rl" else ("mean", "unbiased")
    eps = {"openrlhf": 1e-9, "trl": 1e-4}.get(trainer, 1e-6)
    grouped = group_advantages(SCORES, GROUP, *how, eps, "reward" if trainer == "verl" else "zero")
    grouped = grouped.clamp(-10, 10) if trainer == "openrlhf" else grouped
    d, advantages = log_ratio(now, old, 20.0 if trainer in ("openrlhf", "verl") else 0.0), segments.broadcast(grouped)
    if algorithm == "gspo":
        d = sequence_log_ratio(now - old, segments).clamp(max=10.0 if trainer == "verl" else math.inf)
        losses = ppo_loss(d, advantages, 3e-4, 4e-4)[0]
        weights = token_weights(segments, "sample-mean")
    else:
        losses = ppo_loss(d, advantages, 0.2, 0.2, 3.0 if trainer == "verl" else 0.0)[0]
        weights = token_weights(segments, "sample-mean" if trainer == "slime" else "token-mean")
        limits = (20.0 if trainer in ("verl", "nemo_rl") else 0.0), (0.0 if trainer in ("trialign", "trl") else 10.0)
        kl = kl_estimate(now, ref, "k3", *limits, ratio=(now - old).exp() if trainer == "nemo_rl" else None)
        assert made["kl_loss"] == pytest.approx((kl * weights).sum().item(), rel=1e-4)
    if trainer == "trl":  # corrects for the sampler by default
        assert batch.rollout_logprobs is not None
        sampled = batch.rollout_logprobs
        losses = losses * importance_weights(old, sampled, segments, level="sequence", outside="zero", high=3.0)
    assert made["policy_loss"] == pytest.approx((losses * weights).sum().item(), rel=1e-4)


def test_no_two_overlays_give_one_number_of_one_batch(folder):
    """The tests above could tell them apart."""
    actor = learner(folder)
    batch, losses = batch_of(actor), {}
    for trainer in TRAINERS:
        config = preset(GRPOConfig, trainer)
        config = replace(config, grpo=replace(config.grpo, kl_coef=0.1))
        scored, _ = with_advantages(batch.with_(scores=SCORES, group=GROUP), config)
        made = grpo_step(actor, scored, WHOLE, config, first=False)
        losses[trainer] = (round(made["policy_loss"], 5), made["kl_loss"])
    assert len(set(losses.values())) == len(TRAINERS), losses


@pytest.mark.parametrize("path", sorted((CONFIGS / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_every_table_of_an_overlay_is_some_script_s(path):
    """Files of trainers load under every script; those of algorithms under theirs, behind every trainer's."""
    own = {"ipo": ("dpo", "rejection")} | dict.fromkeys(ALGORITHMS, ("grpo",))
    for script in own.get(path.stem, SCRIPTS):
        for trainer in TRAINERS[1:]:
            load(SCRIPTS[script], f"presets/{trainer}.toml", path, script=script)


def test_later_files_win_over_earlier_ones_and_tables_hold_where_they_should():
    assert grpo_options("dapo", "slime").loss_aggregation == "token-mean"
    assert grpo_options(trainer="slime").loss_aggregation == "sample-mean"
    assert grpo_options(trainer="trl").rollout_correction == "sequence-icepop"
    assert grpo_options("rloo", "trl").rollout_correction == grpo_options().rollout_correction == "off"
    trl, verl = grpo_options("rloo", "trl"), grpo_options("rloo", "verl")
    assert (trl.ratio_level, trl.loss_aggregation) == ("sequence-sum", "sample-mean")
    assert (verl.ratio_level, verl.loss_aggregation) == ("token", "token-mean")
    assert (trl.baseline, trl.scale_rewards) == ("leave-one-out", "none")
    assert preset(RLHFConfig, "verl").ppo.ppo.lam == 1.0 and preset(RLHFConfig).ppo.ppo.lam == 0.95
    assert preset(DPOConfig, "trl", "ipo").loss.average_log_probs
    assert not preset(DPOConfig, "openrlhf", "ipo").loss.average_log_probs
    assert not preset(DPOConfig, "trl").loss.average_log_probs
    averaged = [preset(cls, trainer).loss.nll_average_log_probs for cls in (DPOConfig, RejectionConfig) for trainer in
                TRAINERS]  # fmt: skip
    assert averaged == [trainer != "nemo_rl" for trainer in TRAINERS] * 2


@pytest.mark.parametrize(
    ("algorithm", "places"),
    [
        ("grpo", ["loss"] * 6),
        ("dapo", ["off"] * 6),
        ("rloo", ["score", "reward", "score", "score", "score", "score"]),
        ("reinforce++", ["reward", "reward", "reward", "reward", "advantage", "reward"]),
        ("reinforce++_baseline", ["reward", "reward", "reward", "off", "advantage", "advantage"]),
    ],
)
def test_where_the_kl_goes(algorithm, places):
    assert [grpo_options(algorithm, trainer).kl_in for trainer in TRAINERS] == places
    limits = {"openrlhf": (0.0, 10.0), "nemo_rl": (20.0, 10.0)}
    if algorithm not in ("grpo", "dapo"):  # their estimator is k1, which verl and slime do not limit
        for trainer in TRAINERS:
            made = grpo_options(algorithm, trainer)
            assert (made.kl_estimator, made.kl_input_limit, made.kl_output_limit) == (
                "k1",
                *limits.get(trainer, (0, 0)),
            )


def advantages_under(trainer: str, algorithm: str, mask: list[bool]) -> torch.Tensor:
    """Of two responses with rewards 1 and 3, four tokens each, whose KL is 1 at every token."""
    segments = Segments.of_lengths(torch.tensor([4, 4]), torch.tensor(mask))
    options = grpo_options(algorithm, trainer, kl_coef=0.1, whiten="off")
    ends, group = torch.tensor([0, 4, 8]).int(), torch.zeros(2).long()
    return estimate_advantages(torch.tensor([1.0, 3.0]), group, torch.ones(8), segments, ends, options)[1]


def test_the_kl_of_later_tokens_or_a_token_s_own():
    every = [True] * 8
    later = [r + kl for r in (-1, 1) for kl in (-0.4, -0.3, -0.2, -0.1)]
    own = [-1.1] * 4 + [0.9] * 4
    for trainer, expected in {"openrlhf": later, "verl": [-1] * 4 + [1] * 4, "nemo_rl": own, "slime": own}.items():
        made = advantages_under(trainer, "reinforce++_baseline", every)
        torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float32))
    gap = [True, False, True, True, True, True, False, False]
    expected = torch.tensor([0.9, 0, 0.9, 0.9, 2.9, 2.9, 0, 0])
    torch.testing.assert_close(advantages_under("nemo_rl", "reinforce++", gap), expected)


def test_a_reward_is_clipped_once():
    """trialign clips the score at 10, OpenRLHF what a token is given, nobody else."""
    for cls in (PPOConfig, GRPOConfig):
        rewards = [preset(cls, trainer).reward for trainer in TRAINERS]
        assert [reward.score_clip for reward in rewards] == [10, 0, 0, 0, 0, 0]
        assert [reward.token_clip for reward in rewards] == [0, 10, 0, 0, 0, 0]
    assert [preset(RejectionConfig, trainer).reward.clip for trainer in TRAINERS] == [10, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("trainer", "algorithm", "logprobs", "expected"),
    [
        ("openrlhf", "gspo", [40.0, -30.0], 5.0),
        ("verl", "gspo", [40.0, -30.0], 5.0),
        ("trialign", "gspo", [40.0, -30.0], 5.0),
        ("verl", "grpo", [40.0, 40.0], 20.0),
        ("verl", "gspo", [40.0, 40.0], 10.0),
    ],
)
def test_gspo_s_log_ratio_is_limited_as_a_whole(trainer, algorithm, logprobs, expected):
    """No token's is: OpenRLHF has no limit at all, verl one of the mean."""
    segments, options = Segments.of_lengths(torch.tensor([2]), torch.ones(2).bool()), grpo_options(algorithm, trainer)
    ratio = policy_losses(torch.tensor(logprobs), torch.zeros(2), torch.ones(2), segments, options)[1]
    assert ratio.log().tolist() == pytest.approx([expected] * 2)
