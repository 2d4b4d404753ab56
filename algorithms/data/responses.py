"""Scored responses of the policy: which of them are learned from, and the JSONL files that keep them.

Rejection sampling learns the best response to each prompt, iterative DPO the best against the worst, and a reward model
the pairs that a scorer has ranked. A row keeps the tokens as they were sampled: a resumed run goes on with the same
rows, and a reward model learns at the very token that it is read at, the end of sequence of a response that ended, the
last word of one that was cut.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..batch import Rollout, Score
from .dialogues import Sample
from .preferences import Pair
from .sources import Read, read_rows
from .streams import Mixture
from .text_files import write_jsonl


class Scored(NamedTuple):
    """A response with its reward."""

    prompt: str
    response: str
    reward: float


def by_prompt(responses: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Prompt -> the responses to it, in the order they came in."""
    groups: dict[str, list[Scored]] = {}
    for response in responses:
        groups.setdefault(response.prompt, []).append(response)
    return groups


def best_of_n(responses: Sequence[Scored]) -> list[Scored]:
    """The response of the highest reward to each prompt, the first among equals; prompts in the order they came in.

    Rejection sampling as in https://arxiv.org/abs/2307.09288, section 3.2.3.
    """
    return [max(group, key=lambda response: response.reward) for group in by_prompt(responses).values()]


def best_against_worst(responses: Sequence[Scored], count: int = 1) -> list[tuple[Scored, Scored]]:
    """(chosen, rejected): each prompt's best response and its worst, for iterative DPO; equal rewards give no pair.

    Args:
        count: pairs of a prompt with twice as many responses: the second best and the second worst, and so on.
    """
    pairs = []
    for group in by_prompt(responses).values():
        best, worst = sorted(group, key=lambda r: -r.reward), sorted(group, key=lambda r: r.reward)
        pairs += [pair for pair in zip(best[:count], worst[:count], strict=True) if pair[0].reward > pair[1].reward]
    return pairs


@dataclass
class Response:
    """A response as its row of a file holds it."""

    prompt: str
    source: str
    completion: str
    reward: float | None  # after shaping; None where a scorer unscored
    rewards: dict[str, float | None]
    finish: str
    picked: Literal["", "best", "worst"]
    prompt_tokens: list[int]
    tokens: list[int]
    reference: float | None = None  # log-probability under the policy that the round began with, where DPO needs it
    mask: list[int] = field(default_factory=list)  # 1 where the policy chose the token; empty: all, one turn

    def sample(self) -> Sample:
        """The response as a row to learn from."""
        return sampled_row(self.prompt_tokens, self.tokens, self.mask, self.prompt, self.source)


def sampled_row(
    prompt_tokens: Sequence[int], tokens: Sequence[int], mask: Sequence[int], prompt: str, where: str
) -> Sample:
    """A sampled response up to its last target, token for token, as a row to learn from."""
    targets = (bytes(mask) or b"\1" * len(tokens)).rstrip(b"\0")
    tokens = [*prompt_tokens, *tokens[: len(targets)]]
    return Sample(array("i", tokens), bytes(len(prompt_tokens)) + targets, prompt, where)


def score_or_none(score: Score) -> float | None:
    """A score as JSON has it: null where there is none."""
    return None if score is None or math.isnan(score) else score


def make_responses(
    rollouts: Sequence[Rollout],
    completions: Sequence[str],
    rewards: Sequence[float],
    scores: Mapping[str, Sequence[Score]],
) -> list[Response]:
    """Rollouts with their rewards, none of them picked.

    Args:
        completions: their texts.
        rewards: after shaping; NaN where there is none.
        scores: by name, kept beside.
    """
    return [
        Response(
            rollout.prompt.text,
            rollout.prompt.source,
            completion,
            score_or_none(rewards[i]),
            {name: score_or_none(values[i]) for name, values in scores.items()},
            rollout.finish,
            "",
            rollout.prompt.tokens,
            rollout.tokens,
            mask=[int(target) for target in rollout.mask] if len(rollout.turns) > 1 else [],
        )
        for i, (rollout, completion) in enumerate(zip(rollouts, completions, strict=True))
    ]


def pick(responses: Sequence[Response], prompts: Sequence[int], method: Literal["sft", "dpo"]) -> None:
    """Marks the best response to each prompt as picked, for DPO the worst too; one without a reward never is.

    Args:
        prompts: number of the prompt of each response.

    Raises:
        ValueError: no response can be picked.
    """
    scored = [
        Scored(str(prompt), str(i), response.reward)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        if response.reward is not None
    ]
    best = best_of_n(scored) if method == "sft" else [chosen for chosen, _ in best_against_worst(scored)]
    worst = [] if method == "sft" else [rejected for _, rejected in best_against_worst(scored)]
    if not best:
        why = "the responses to each score the same" if scored else "no response has a score"
        raise ValueError(f"nothing to learn from {len(set(prompts))} prompts: {why}")
    for response in best:
        responses[int(response.response)].picked = "best"
    for response in worst:
        responses[int(response.response)].picked = "worst"


def picked_samples(responses: Sequence[Response]) -> list[Sample]:
    """Rows of SFT: the best response to each prompt."""
    return [response.sample() for response in responses if response.picked == "best"]


def picked_pairs(responses: Sequence[Response]) -> tuple[list[Pair], list[tuple[float, float]]]:
    """Rows of DPO and the reference's log-probabilities of them: best and worst of each prompt, in order."""
    best = [response for response in responses if response.picked == "best"]
    worst = [response for response in responses if response.picked == "worst"]
    pairs = [Pair(a.sample(), b.sample(), 0.0) for a, b in zip(best, worst, strict=True)]
    return pairs, [(a.reference or 0.0, b.reference or 0.0) for a, b in zip(best, worst, strict=True)]


class LabeledPairs(NamedTuple):
    """Rows of preferences out of scored responses, and how many responses there were."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]


def label_pairs(responses: Sequence[Response], pairs: int) -> LabeledPairs:
    """Pairs of responses to the same prompt, the one with the higher reward chosen.

    Args:
        pairs: of a prompt; see `best_against_worst`.

    Returns:
        rows with the texts, the rewards and the tokens, and how many prompts, responses, responses without a score,
        pairs and ties there were; a tie is two responses whose rewards are equal, and gives no row.
    """
    scored = [Scored(r.source, str(i), r.reward) for i, r in enumerate(responses) if r.reward is not None]
    rows = []
    for best, worst in best_against_worst(scored, pairs):
        chosen, rejected = responses[int(best.response)], responses[int(worst.response)]
        masks = {"chosen_mask": chosen.mask, "rejected_mask": rejected.mask}
        rows.append(
            {
                "prompt": chosen.prompt,
                "chosen": chosen.completion,
                "rejected": rejected.completion,
                "chosen_reward": chosen.reward,
                "rejected_reward": rejected.reward,
                "source": chosen.source,
                "prompt_tokens": chosen.prompt_tokens,
                "chosen_tokens": chosen.tokens,
                "rejected_tokens": rejected.tokens,
                "chosen_finish": chosen.finish,
                "rejected_finish": rejected.finish,
                **{name: mask for name, mask in masks.items() if mask},
            }
        )
    counts = {
        "prompts": len({response.source for response in responses}),
        "answers": len(responses),
        "without_score": len(responses) - len(scored),
        "pairs": len(rows),
        "ties": sum(min(pairs, len(group) // 2) for group in by_prompt(scored).values()) - len(rows),
    }
    return LabeledPairs(rows, counts)


def read_sampled_pairs(source: str, read: Read = read_rows) -> list[Pair]:
    """The pairs of a file of `label_pairs`'s rows, token for token."""

    def sample(row: dict[str, Any], where: str, side: str) -> Sample:
        tokens, mask = row[f"{side}_tokens"], row.get(f"{side}_mask") or []
        return sampled_row(row["prompt_tokens"], tokens, mask, row["prompt"], where)

    return [Pair(sample(row, at, "chosen"), sample(row, at, "rejected"), 0.0) for at, row in read(source, {})]


def write_responses(path: Path, responses: Sequence[Response]) -> None:
    """Writes responses as JSONL, those of one turn without a mask."""
    rows = map(asdict, responses)
    write_jsonl(path, ({name: value for name, value in row.items() if name != "mask" or value} for row in rows))


def read_responses(path: Path) -> list[Response]:
    """The responses of a file.

    Raises:
        ValueError: a line is not a response; names the line.
    """
    responses = []
    with open(path, encoding="utf-8") as file:  # its lines end at line feeds alone: what is in strings may be others
        for number, line in enumerate(file, 1):
            try:
                responses.append(Response(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a response: {error}") from None
    return responses


def rows_of_step(rows: int, seed: int, number: int, step: int, count: int) -> list[int]:
    """The rows of a step of a round, each met once before any is met again.

    Args:
        number: of the round.
        step: within the round.
        count: rows of a step.
    """
    draws = Mixture([rows], (), (seed << 32) + number)
    draws.load_state({"drawn": step * count, "positions": [step * count], "rows": [rows]})
    return [draws.next()[1] for _ in range(count)]


class RoundSizes:
    """Sizes of a run's rounds, in its checkpoints: a resume must cut the run into the same ones."""

    def __init__(self, method: str, steps: int, responses: int):
        self.sizes = {"method": method, "steps_per_round": steps, "answers": responses}

    def state(self) -> dict[str, str | int]:
        """For a checkpoint."""
        return self.sizes

    def load_state(self, state: dict[str, str | int]) -> None:
        """Raises ValueError where the run was begun with other rounds."""
        if state != self.sizes:
            raise ValueError(f"the run was begun with rounds of {state}, now {self.sizes}")
