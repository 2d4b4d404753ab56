"""Evaluation metrics against enumeration, and their intervals against the definition."""

import itertools
import math
import statistics

import pytest
from trialign.algorithms.metrics import pass_at_k, prompt_wins, wilson, win_rate


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_equals_enumeration(samples, passed):
    for k in range(1, samples + 1):
        choices = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices), rel=1e-12)
    with pytest.raises(ValueError, match=f"pass@{samples + 1} of {samples} samples"):
        pass_at_k(samples, passed, samples + 1)


def test_wilson_interval_ends_where_the_score_test_turns():
    """Ends are the rates whose own standard error is 1/1.96 of their distance to the observed rate."""
    for won, count in ((3, 10), (7.5, 30), (99, 100)):
        value, low, high = wilson(won / count, count)
        assert low < value < high
        for end in (low, high):
            error = math.sqrt(end * (1 - end) / count)
            assert abs(value - end) / error == pytest.approx(statistics.NormalDist().inv_cdf(0.975), rel=1e-9)
    assert wilson(1.0, 10).high == pytest.approx(1.0) and 0.6 < wilson(1.0, 10).low < 1
    assert wilson(0.0, 10).low == pytest.approx(0.0, abs=1e-12) and 0 < wilson(0.0, 10).high < 0.4


def test_win_rate_counts_ties_as_half():
    assert prompt_wins([1.0, 3.0], [2.0, 3.0]) == (0 + 0 + 1 + 0.5) / 4
    one, other = [[1.0], [2.0], [0.0], [5.0]], [[0.0], [2.0], [1.0], [4.0]]
    there, back = win_rate(one, other), win_rate(other, one)
    assert there.value == 2.5 / 4
    assert back.value == pytest.approx(1 - there.value) and back.low == pytest.approx(1 - there.high)
