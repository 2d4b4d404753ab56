"""A round of rejection sampling or iterative DPO: all its answers with what was picked of them, kept as JSONL.

A line holds tokens and rewards as they were, so that a run that is resumed within a round goes on with the same rows.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..batch import Rollout
from ..rewards.functions import Score
from .dialogues import Sample
from .preferences import Pair
from .prompts import Mixture
from .selection import Scored, best_against_worst, best_of_n


@dataclass
class Answer:
    """An answer of a round."""

    prompt: str
    source: str
    completion: str
    reward: float | None  # what is compared; None where a scorer abstained
    rewards: dict[str, float | None]
    finish: str
    picked: Literal["", "best", "worst"]
    prompt_tokens: list[int]
    tokens: list[int]
    reference: float | None = None  # log-probability under the policy that the round began with, where DPO needs it

    def sample(self) -> Sample:
        """The answer as a row to learn from."""
        mask = bytes(len(self.prompt_tokens)) + b"\1" * len(self.tokens)
        return Sample(array("i", [*self.prompt_tokens, *self.tokens]), mask, self.prompt, self.source)


def make_answers(
    rollouts: Sequence[Rollout],
    completions: Sequence[str],
    rewards: Sequence[float],
    scores: Mapping[str, Sequence[Score]],
    method: Literal["sft", "dpo"],
) -> list[Answer]:
    """The answers of a round, the best of each prompt picked, for DPO the worst too.

    Args:
        rewards: what is compared; NaN where there is none, and such an answer is never picked.
        scores: by name, kept beside the answers.

    Raises:
        ValueError: nothing is to be picked.
    """
    scored = [
        Scored(str(rollout.prompt.index), str(i), reward)
        for i, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True))
        if not math.isnan(reward)
    ]
    if method == "sft":
        picked: dict[int, Literal["best", "worst"]] = {int(best.answer): "best" for best in best_of_n(scored)}
    else:
        picked = {}
        for best, worst in best_against_worst(scored):
            picked |= {int(best.answer): "best", int(worst.answer): "worst"}
    if not picked:
        prompts = len({rollout.prompt.index for rollout in rollouts})
        why = "the answers to each score the same" if scored else "no answer has a score"
        raise ValueError(f"nothing to learn from {prompts} prompts: {why}")
    answers = unpicked(rollouts, completions, rewards, scores)
    for i, name in picked.items():
        answers[i].picked = name
    return answers


def unpicked(
    rollouts: Sequence[Rollout],
    completions: Sequence[str],
    rewards: Sequence[float],
    scores: Mapping[str, Sequence[Score]],
) -> list[Answer]:
    """The answers with their rewards, as `make_answers` takes them."""
    return [
        Answer(
            rollout.prompt.text,
            rollout.prompt.source,
            completion,
            known(rewards[i]),
            {name: known(values[i]) for name, values in scores.items()},
            rollout.finish,
            "",
            rollout.prompt.tokens,
            rollout.tokens,
        )
        for i, (rollout, completion) in enumerate(zip(rollouts, completions, strict=True))
    ]


def known(value: Score) -> float | None:
    """A score as JSON has it: null where there is none."""
    return None if value is None or math.isnan(value) else value


def winners(answers: Sequence[Answer]) -> list[Sample]:
    """What SFT learns."""
    return [answer.sample() for answer in answers if answer.picked == "best"]


def matches(answers: Sequence[Answer]) -> tuple[list[Pair], list[tuple[float, float]]]:
    """What DPO learns, and the reference's log-probabilities of it: best and worst of each prompt, in order."""
    best = [answer for answer in answers if answer.picked == "best"]
    worst = [answer for answer in answers if answer.picked == "worst"]
    pairs = [Pair(a.sample(), b.sample(), 0.0) for a, b in zip(best, worst, strict=True)]
    return pairs, [(a.reference or 0.0, b.reference or 0.0) for a, b in zip(best, worst, strict=True)]


def drawn(rows: int, seed: int, number: int, step: int, count: int) -> list[int]:
    """The rows of a step of a round, each met once before any is met again.

    Args:
        number: of the round.
        step: within the round.
        count: rows of a step.
    """
    draws = Mixture([rows], (), (seed << 32) + number)
    draws.load_state({"drawn": step * count, "positions": [step * count], "rows": [rows]})
    return [draws.next()[1] for _ in range(count)]


def write_round(path: Path, answers: Sequence[Answer]) -> None:
    """Keeps a round."""
    write_rows(path, map(asdict, answers))


def as_line(row: object) -> str:
    """A row as a line of JSONL. What JSON has no form for, a date for instance, becomes a string."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """JSONL, written aside, then swapped in whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(map(as_line, rows))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_round(path: Path) -> list[Answer]:
    """A round as it was kept.

    Raises:
        ValueError: a line is not an answer; names the line.
    """
    answers = []
    with open(path, encoding="utf-8") as file:  # its lines end at line feeds alone: what is in strings may be others
        for number, line in enumerate(file, 1):
            try:
                answers.append(Answer(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not an answer of a round: {error}") from None
    return answers


class Rounds:
    """What a checkpoint knows of its rounds: a resume must cut the run into the same ones."""

    def __init__(self, method: str, steps: int, answers: int):
        self.facts = {"method": method, "steps_per_round": steps, "answers": answers}

    def state(self) -> dict[str, str | int]:
        """For a checkpoint."""
        return self.facts

    def load_state(self, state: dict[str, str | int]) -> None:
        """Raises ValueError where the run was begun with other rounds."""
        if state != self.facts:
            raise ValueError(f"the run was begun with rounds of {state}, now {self.facts}")
