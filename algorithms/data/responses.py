"""Selection of scored responses for training, and their JSONL files.

Rejection sampling learns the best response to each prompt, iterative DPO the best against the worst, a reward model the
ranked pairs. Rows keep the sampled tokens: a resumed run has the same rows, and a reward model is trained at the token
where its score is read (the end of sequence, or the last token of a truncated response).
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
    """Prompt -> its responses, in order."""
    groups: dict[str, list[Scored]] = {}
    for response in responses:
        groups.setdefault(response.prompt, []).append(response)
    return groups


def best_of_n(responses: Sequence[Scored]) -> list[Scored]:
    """The response with the highest reward to each prompt, the first of equal ones; prompts in order.

    Rejection sampling, https://arxiv.org/abs/2307.09288, section 3.2.3.
    """
    return [max(group, key=lambda response: response.reward) for group in by_prompt(responses).values()]


def best_against_worst(responses: Sequence[Scored], count: int = 1) -> list[tuple[Scored, Scored]]:
    """(chosen, rejected): the best and the worst response to each prompt, for iterative DPO; no pair of equal rewards.

    Args:
        count: pairs per prompt: second best against second worst, and so on.
    """
    pairs = []
    for group in by_prompt(responses).values():
        best, worst = sorted(group, key=lambda r: -r.reward), sorted(group, key=lambda r: r.reward)
        pairs += [pair for pair in zip(best[:count], worst[:count], strict=True) if pair[0].reward > pair[1].reward]
    return pairs


@dataclass
class Response:
    """A row of a file of responses."""

    prompt: str
    source: str
    completion: str
    reward: float | None  # after shaping; None without a score
    rewards: dict[str, float | None]
    finish: str
    picked: Literal["", "best", "worst"]
    prompt_tokens: list[int]
    tokens: list[int]
    reference: float | None = None  # log-probability under the initial policy of the round, for DPO
    mask: list[int] = field(default_factory=list)  # 1 at the policy's tokens; empty: all, one turn

    def sample(self) -> Sample:
        """The response as a training row."""
        return sampled_row(self.prompt_tokens, self.tokens, self.mask, self.prompt, self.source)


def sampled_row(
    prompt_tokens: Sequence[int], tokens: Sequence[int], mask: Sequence[int], prompt: str, where: str
) -> Sample:
    """A sampled response up to its last target as a training row, with the sampled tokens."""
    targets = (bytes(mask) or b"\1" * len(tokens)).rstrip(b"\0")
    tokens = [*prompt_tokens, *tokens[: len(targets)]]
    return Sample(array("i", tokens), bytes(len(prompt_tokens)) + targets, prompt, where)


def score_or_none(score: Score) -> float | None:
    """A score, None instead of NaN, for JSON."""
    return None if score is None or math.isnan(score) else score


def make_responses(
    rollouts: Sequence[Rollout],
    completions: Sequence[str],
    rewards: Sequence[float],
    scores: Mapping[str, Sequence[Score]],
) -> list[Response]:
    """Rows of rollouts with rewards and scores, none of them picked.

    Args:
        completions: their texts.
        rewards: after shaping; NaN without a score.
        scores: of each scorer.
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
    """Mark the best response to each prompt as picked, for DPO the worst too; never one without a reward.

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
        why = "equal rewards of the responses to each" if scored else "no response has a score"
        raise ValueError(f"nothing to learn from {len(set(prompts))} prompts: {why}")
    for response in best:
        responses[int(response.response)].picked = "best"
    for response in worst:
        responses[int(response.response)].picked = "worst"


def picked_samples(responses: Sequence[Response]) -> list[Sample]:
    """Rows of SFT: the best response to each prompt."""
    return [response.sample() for response in responses if response.picked == "best"]


def picked_pairs(responses: Sequence[Response]) -> tuple[list[Pair], list[tuple[float, float]]]:
    """Rows of DPO, best and worst response to each prompt in order, and their reference log-probabilities."""
    best = [response for response in responses if response.picked == "best"]
    worst = [response for response in responses if response.picked == "worst"]
    pairs = [Pair(a.sample(), b.sample(), 0.0) for a, b in zip(best, worst, strict=True)]
    return pairs, [(a.reference or 0.0, b.reference or 0.0) for a, b in zip(best, worst, strict=True)]


class LabeledPairs(NamedTuple):
    """Preference rows from scored responses, and counts."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]


def label_pairs(responses: Sequence[Response], pairs: int) -> LabeledPairs:
    """Pairs of responses to the same prompt, the one with the higher reward chosen.

    Args:
        pairs: of a prompt; see `best_against_worst`.

    Returns:
        rows with texts, rewards and tokens; counts of prompts, responses, responses without a score, pairs, and ties
        (pairs of equal rewards, without a row).
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
        "responses": len(responses),
        "without_score": len(responses) - len(scored),
        "pairs": len(rows),
        "ties": sum(min(pairs, len(group) // 2) for group in by_prompt(scored).values()) - len(rows),
    }
    return LabeledPairs(rows, counts)


def read_sampled_pairs(source: str, read: Read = read_rows) -> list[Pair]:
    """Pairs of a file of `label_pairs`, with the sampled tokens."""

    def sample(row: dict[str, Any], where: str, side: str) -> Sample:
        tokens, mask = row[f"{side}_tokens"], row.get(f"{side}_mask") or []
        return sampled_row(row["prompt_tokens"], tokens, mask, row["prompt"], where)

    return [Pair(sample(row, at, "chosen"), sample(row, at, "rejected"), 0.0) for at, row in read(source, {})]


def write_responses(path: Path, responses: Sequence[Response]) -> None:
    """Write responses as JSONL; those of one turn without a mask."""
    rows = map(asdict, responses)
    write_jsonl(path, ({name: value for name, value in row.items() if name != "mask" or value} for row in rows))


def read_responses(path: Path) -> list[Response]:
    """Read `write_responses`'s file; ValueError with the line of an invalid one."""
    responses = []
    with open(path, encoding="utf-8") as file:  # lines end with line feeds only: strings may hold other line separators
        for number, line in enumerate(file, 1):
            try:
                responses.append(Response(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a response: {error}") from None
    return responses


def rows_of_step(rows: int, seed: int, number: int, step: int, count: int) -> list[int]:
    """Rows of a step of a round, in shuffled epochs.

    Args:
        number: of the round.
        step: within the round.
        count: rows of a step.
    """
    draws = Mixture([rows], (), (seed << 32) + number)
    draws.load_state({"drawn": step * count, "positions": [step * count], "rows": [rows]})
    return [draws.next()[1] for _ in range(count)]
