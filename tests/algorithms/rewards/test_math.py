"""The math scorer, case by case: answers found in a text, and answers that are equal."""

import json
import time
from pathlib import Path

import pytest
from trialign.algorithms.rewards.functions import RewardFunction
from trialign.algorithms.rewards.math.reward import correct, math

MATH = "trialign.algorithms.rewards.math.reward:math"


def test_rewards_of_known_completions():
    """[completion, reference, reward] of every way that models and data sets write answers which has come up."""
    cases = json.loads((Path(__file__).parent / "math_cases.json").read_text(encoding="utf-8"))
    earned = math([""] * len(cases), [case[0] for case in cases], [case[1] for case in cases])
    assert [case for case, reward in zip(cases, earned, strict=True) if case[2] != reward] == []
    assert len(cases) > 500


def test_rows_that_cannot_be_scored_are_named_before_the_run():
    rows = [(f"a.jsonl:{i}", {"answer": "3"}) for i in range(2500)]
    rows[1700] = ("a.jsonl:1700", {"answer": "none"})
    rows[2499] = ("a.jsonl:2499", {"answer": "\\frac{1}{"})
    with RewardFunction(MATH) as reward, pytest.raises(ValueError) as error:
        reward.check(rows)
    assert "a.jsonl:1700: answer='none'" in str(error.value) and "a.jsonl:2499: answer=" in str(error.value)
    with RewardFunction(MATH, skip_failures=True) as reward:
        reward.check(rows)
        assert len(reward.failures) == 1 and "a.jsonl:1700" in reward.failures[0]
    with RewardFunction(MATH) as reward, pytest.raises(ValueError, match="needs the column 'answer'.*they have topic"):
        reward.check([("a.jsonl:1", {"topic": "3"})])


@pytest.mark.parametrize(
    "text", [r"\int_0^{10^9} x^x dx", r"9^{9^{9}}+\sqrt{2}", r"\frac{1}{7^{99999}+\sqrt{2}}^{99999}"]
)
def test_endless_algebra_is_wrong_and_the_next_answer_is_scored(text):
    """A power of 10**9 digits is one C call, which Python's signal handlers wait for: the kernel ends the process."""
    begun = time.monotonic()
    assert not correct(rf"\boxed{{{text}}}", r"2\sqrt{3}")
    assert time.monotonic() - begun < 100
    assert correct(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")


@pytest.mark.parametrize("text", ["1" * 20000, "1," * 5000, "\\frac{1" * 3000, "9^999 " * 500, "{" * 5000])
def test_long_texts_are_scored(text):
    assert correct(f"{text} so it is 3", 3)
    assert not correct("1" * 20000, 3)
