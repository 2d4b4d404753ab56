"""Verifiable math reward: correctness of final answers.

    reward.functions = ["trialign.algorithms.rewards.math.reward:math"]

The answer is what is in the last \\boxed{}, or else follows the last ####, or else "the answer is", or else the last
number of the text. A reference that is one number is compared by value, exactly: 0.75, 3/4, \\frac{3}{4} and 75% are
one, and so are 2 km and 2000 m. Points, lists and intervals are compared entry by entry, choices and words as such, and
all other mathematics by `math-verify`.
"""

from __future__ import annotations

from typing import Any

from .answers import Answer, final_answer, last_choice, stated_expression, stated_number
from .equality import alternatives, choice, entries, equal, readable
from .numerals import numeral
from .symbolic import LONGEST
from .tex import last_boxed, tidy


def math(prompts: list[str], completions: list[str], answer: list[Any], **fields: list) -> list[float]:
    """1 for completions whose answer equals the row's column `answer`, else 0.

    Raises:
        ValueError: a row's answer holds nothing to compare with.
    """
    return [float(correct(completion, wanted)) for completion, wanted in zip(completions, answer, strict=True)]


def check_math(answer: list[Any], **fields: list) -> list[str | None]:
    """Reason why a row's reference cannot be read, or None, for each row; called before the run."""
    reasons: list[str | None] = []
    for wanted in answer:
        try:
            reference(wanted)
            reasons.append(None)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


def correct(text: str, wanted: Any) -> bool:
    """Whether a response's answer equals the reference: a number, or a text with it as in a response.

    Raises:
        ValueError: `wanted` holds nothing to compare with.
    """
    right = reference(wanted)
    answer = final_answer(text)
    if answer.found == "text":
        return _is_stated(right, answer)
    if len(answer.text) > LONGEST:
        return False
    try:
        return any(_is(right, answer._replace(text=given)) for given in alternatives(answer.text))
    except RecursionError:  # brackets within brackets without end
        return False


def _is_stated(right: str, answer: Answer) -> bool:
    """Whether an unmarked answer of a text is correct."""
    letter = last_choice(answer.text) if choice(right) else ""
    number = numeral(right)
    if letter or number is None:
        return equal(right, letter or stated_expression(answer))
    stated = stated_number(answer)
    return stated is not None and stated.equals(number)


def _is(right: str, answer: Answer) -> bool:
    """Whether a marked answer is correct."""
    if equal(right, answer.text):
        return True
    several, number = entries(right), numeral(right)
    if several and answer.found == "box" and len(answer.boxes) == len(several.entries):
        return equal(right, ", ".join(answer.boxes))
    listed = entries(answer.text)
    if number is None or answer.found == "box" or listed and all(map(numeral, listed.entries)):
        return False
    stated = stated_number(answer)
    return stated is not None and stated.equals(number)


def reference(wanted: Any) -> str:
    """Normalized reference of a row.

    Raises:
        ValueError: it is nothing to compare with.
    """
    if isinstance(wanted, str | int | float) and not isinstance(wanted, bool):
        text = str(wanted)
        inside = last_boxed(text)
        if inside is None and "####" in text:
            inside = text.rpartition("####")[2]
        right = next(iter(alternatives(tidy(text if inside is None else inside))), "").strip()
        if len(right) <= LONGEST and readable(right):
            return right
    raise ValueError(f"answer={wanted!r:.60}: is neither a number nor mathematics that can be read")
