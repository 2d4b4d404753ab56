"""Advantages where a deviation is 0 or nearly so, and on a device that is not the CPU."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from trialign.algorithms.advantages import (
    discounted_returns,
    gae,
    group_advantages,
    soft_overlong_penalty,
    token_rewards,
    whiten,
)
from trialign.algorithms.losses import policy as policy_loss
from trialign.algorithms.losses import preference
from trialign.algorithms.losses.aggregation import Segments, token_weights
from trialign.algorithms.losses.kl import kl_estimate
from trialign.algorithms.losses.value import value_loss
from trialign.algorithms.rewards.shaping import RunningMoments

BASELINES: Any = ("mean", "leave-one-out", "none")
SCALES: Any = ("none", "unbiased", "population", "leave-one-out", "batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", [0.0, 0.1, -1e10])
def test_the_one_right_answer_is_not_divided_by_the_deviation_of_its_equal_siblings(rest, dtype):
    """The sums of a group less one number do not tell that three numbers 0.1 have the deviation 0."""
    right = rest + abs(rest) + 1
    rewards = torch.tensor([right, rest, rest, rest, rest, rest, right, rest], dtype=dtype)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    made = group_advantages(rewards, group, "leave-one-out", "leave-one-out")
    torch.testing.assert_close(made[[0, 6]], (rewards[0] - rewards[1]).expand(2))
    wrong = torch.tensor([right, rest, rest], dtype=torch.float64)
    expected = (rest - wrong.mean()) / (wrong.std() + 1e-6)
    torch.testing.assert_close(made[[1, 2, 3, 4, 5, 7]].double(), expected.expand(6))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_equal_rewards_are_not_scaled(value, baseline, scale):
    rewards = torch.full((7,), value, dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    made = group_advantages(rewards, group, baseline, scale, eps=1e-9)
    expected = torch.full_like(rewards, value if baseline == "none" else 0.0)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_are_their_own_whatever_their_order_size_and_missing_scores(baseline, scale):
    """Each group alone, computed by hand; a score that is missing is as if its answer were not there."""
    rewards = torch.tensor([1.0, 5.0, 2.0, torch.nan, 4.0, 3.0, 7.0, 2.5, 6.0, -1.0], dtype=torch.float64)
    group = torch.tensor([0, 2, 0, 0, 2, 2, 3, 0, 5, 5])
    made = group_advantages(rewards, group, baseline, scale, eps=1e-3)
    scored = rewards[~rewards.isnan()]
    for number, (reward, own) in enumerate(zip(rewards, group, strict=True)):
        members = [i for i in range(10) if group[i] == own and not rewards[i].isnan()]
        others = rewards[[i for i in members if i != number]]
        if reward.isnan() or not len(others):
            assert made[number] == (reward if baseline == "none" and not reward.isnan() else 0)
            continue
        everyone = rewards[members]
        center = {"mean": everyone.mean(), "leave-one-out": others.mean(), "none": torch.tensor(0.0)}[baseline]
        deviation = {
            "unbiased": everyone.std(),
            "population": everyone.std(correction=0),
            "leave-one-out": others.std() if len(others) > 1 else torch.tensor(0.0),
            "batch": scored.std(),
        }.get(scale)
        expected = reward - center
        if deviation is not None and deviation > 0:
            expected = expected / (deviation + 1e-3)
        torch.testing.assert_close(made[number], expected)


def test_no_samples_have_no_advantages():
    assert len(group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, -3e12])
def test_the_running_deviation_of_rewards_that_are_equal_but_for_rounding_is_one(value):
    moments = RunningMoments()
    for _ in range(3):
        moments.update([value, math.nextafter(value, math.inf)])
        assert moments.deviation == 1.0
    moments.update([value * (1 + 1e-4)] * 6)
    assert moments.deviation == pytest.approx(abs(value) * 0.5e-4, rel=1e-3)


SEGMENTS = Segments.of_lengths(torch.tensor([4, 3]), torch.tensor([0, 1, 1, 1, 0, 1, 1]))
CU_SEQLENS = torch.tensor([0, 4, 7], dtype=torch.int32)
X, Y = torch.linspace(-1, 1, 7), torch.linspace(0, 1, 7)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 1])
KINDS: Any = ("k1", "k2", "k3", "abs", "k1+", "k3+")
AGGREGATIONS: Any = ("token-mean", "token-sum", "sample-mean", "sample-sum", "constant", "sum-of-sample-means")
PAIR_LOSSES: Any = (
    ("dpo", 0.1), ("robust", 0.1), ("ipo", 0), ("hinge", 0), ("exo", 0.1), ("apo_zero", 0), ("apo_down", 0)
)  # fmt: skip

# The functions that a batch's tensors go through on the way from rewards to losses.
ON_THE_WAY: dict[str, Callable[[], Any]] = {
    **{f"kl {kind}": lambda kind=kind: kl_estimate(X, Y, kind) for kind in KINDS},
    "token_rewards": lambda: token_rewards(torch.ones(2, device="cpu"), X, SEGMENTS, 0.1, clip=1.0),
    "whiten": lambda: whiten(X, SEGMENTS),
    "value_loss": lambda: value_loss(X, Y, Y, 0.2, 1.0),
    "gae": lambda: gae(X, Y, SEGMENTS, CU_SEQLENS, 0.9, 0.9, "zero"),
    "discounted_returns": lambda: discounted_returns(X, SEGMENTS, CU_SEQLENS, 0.9),
    "soft_overlong_penalty": lambda: soft_overlong_penalty(GROUP, 4, 2),
    **{
        f"group_advantages {baseline} {scale} {scored}": partial(
            group_advantages, X.where(GROUP < scored, torch.nan), GROUP, baseline, scale
        )
        for baseline in BASELINES
        for scale in SCALES
        for scored in (0, 1, 2)
    },
    **{
        f"token_weights {how}": lambda how=how: token_weights(SEGMENTS, how)
        for how in AGGREGATIONS
    },
    "ppo_loss": lambda: policy_loss.ppo_loss(X, Y, 0.2, 0.2, 3.0),
    "cispo_loss": lambda: policy_loss.cispo_loss(X, X, Y, 0.9, 1.0),
    "sequence_log_ratio": lambda: policy_loss.sequence_log_ratio(X, SEGMENTS, "own", "mean", 1.0),
    **{
        f"importance_weights {name}": lambda sizes=sizes: policy_loss.importance_weights(
            X, Y, SEGMENTS, low=0.5, high=2.0, **sizes
        )
        for name, sizes in policy_loss.CORRECTIONS.items()
    },
    **{
        f"pair_loss {kind}": lambda kind=kind, e=e: preference.pair_loss(X, Y, 0.1, kind, e)
        for kind, e in PAIR_LOSSES
    },
    "kto_loss": lambda: preference.kto_loss(X, Y > 0.5, preference.kto_reference(X), 0.1, 1.0, 2.0),
    "reward_loss": lambda: preference.reward_loss(X, Y, 0.5, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_every_tensor_is_made_on_the_device_of_the_inputs(name):
    """With another default device a tensor made without one meets the inputs', as a CPU tensor meets CUDA's."""
    expected = ON_THE_WAY[name]()
    with torch.device("meta"):
        made = ON_THE_WAY[name]()
    for ours, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (made, expected)), strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours, theirs)
