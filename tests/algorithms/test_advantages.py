"""Advantages of groups by hand, and the running deviation of rewards."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from trialign.algorithms.advantages import (
    Baseline,
    Gaps,
    Scale,
    Whitening,
    gae,
    group_advantages,
    token_rewards,
    whiten,
)
from trialign.algorithms.losses.aggregation import Segments
from trialign.algorithms.rewards.shaping import RunningMoments

BASELINES, SCALES = get_args(Baseline), get_args(Scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", [0.0, 0.1, -1e10])
def test_leave_one_out_deviation_of_equal_rewards_is_zero(rest, dtype):
    """The one right response is not divided: sums of the group less its own would have rounded the deviation."""
    right = rest + abs(rest) + 1
    rewards = torch.tensor([right, rest, rest, rest, rest, rest, right, rest], dtype=dtype)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    result = group_advantages(rewards, group, "leave-one-out", "leave-one-out")
    torch.testing.assert_close(result[[0, 6]], (rewards[0] - rewards[1]).expand(2))
    wrong = torch.tensor([right, rest, rest], dtype=torch.float64)
    expected = (rest - wrong.mean()) / (wrong.std() + 1e-6)
    torch.testing.assert_close(result[[1, 2, 3, 4, 5, 7]].double(), expected.expand(6))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_equal_rewards_are_not_scaled(baseline, scale):
    rewards = torch.full((7,), 0.7, dtype=torch.float64)
    result = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1, 1]), baseline, scale, eps=1e-9)
    expected = torch.full_like(rewards, 0.7 if baseline == "none" else 0.0)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-15)
    assert not len(group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_advantages_equal_each_group_by_hand(baseline, scale):
    """In any order and size; unscored responses count nowhere."""
    rewards = torch.tensor([1.0, 5.0, 2.0, torch.nan, 4.0, 3.0, 7.0, 2.5, 6.0, -1.0], dtype=torch.float64)
    group = torch.tensor([0, 2, 0, 0, 2, 2, 3, 0, 5, 5])
    result = group_advantages(rewards, group, baseline, scale, eps=1e-3)
    scored = rewards[~rewards.isnan()]
    for number, (reward, own) in enumerate(zip(rewards, group, strict=True)):
        members = [i for i in range(10) if group[i] == own and not rewards[i].isnan()]
        others = rewards[[i for i in members if i != number]]
        if reward.isnan() or not len(others):
            assert result[number] == (reward if baseline == "none" and not reward.isnan() else 0)
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
        torch.testing.assert_close(result[number], expected)


@pytest.mark.parametrize("scored", [0, 1, 4])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_advantages_stay_on_the_device_of_their_inputs(baseline, scale, scored):
    """Also with a single scored response, or none: a tensor on the default device would not meet those of the batch."""
    rewards = torch.tensor([float(i) if i < scored else torch.nan for i in range(4)])
    group = torch.tensor([0, 0, 1, 1])
    expected = group_advantages(rewards, group, baseline, scale)
    with torch.device("meta"):
        assert torch.equal(group_advantages(rewards, group, baseline, scale), expected)


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_numbers_outside_the_mask_change_nothing(hidden):
    """Of an environment's tokens, between two turns and at the end of a sample."""
    segments = Segments.of_lengths(torch.tensor([6, 3]), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0]))
    rewards, values = torch.linspace(-1, 1, 9), torch.linspace(2, 1, 9)
    cu_seqlens, scores = torch.tensor([0, 6, 9], dtype=torch.int32), torch.tensor([1.0, -2.0])

    def results(x: Tensor, y: Tensor) -> list[Tensor]:
        white = [whiten(x, segments, how) for how in get_args(Whitening)]
        found = [part for gaps in get_args(Gaps) for part in gae(x, y, segments, cu_seqlens, 0.9, 0.8, gaps)]
        return [*white, *found, token_rewards(scores, x, segments, 0.1), segments.sums(x), segments.means(x)]

    masked = [x.where(segments.mask, torch.tensor(hidden)) for x in (rewards, values)]
    for got, expected in zip(results(*masked), results(rewards, values), strict=True):
        assert torch.equal(got, expected) and expected.any()


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, -3e12])
def test_running_deviation_of_equal_rewards_is_one(value):
    """Equal but for rounding."""
    moments = RunningMoments()
    for _ in range(3):
        moments.update([value, math.nextafter(value, math.inf)])
        assert moments.deviation == 1.0
    moments.update([value * (1 + 1e-4)] * 6)
    assert moments.deviation == pytest.approx(abs(value) * 0.5e-4, rel=1e-3)
