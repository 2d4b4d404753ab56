"""Preferences out of scored answers: prompts split into those that are learned from and those held out, and pairs.

A pair keeps the tokens as they were sampled. A reward model then learns at the very token at which it will be asked:
the end of sequence of an answer that ended, the last word of one that was cut.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config.rlhf import PromptsConfig
from .chat import column
from .dialogues import Sample
from .preferences import Pair
from .responses import Answer
from .selection import Scored, best_against_worst
from .sources import Read, read_rows

Rows = list[dict[str, Any]]


def split_prompts(config: PromptsConfig, seed: int) -> tuple[Rows, Rows]:
    """(rows of prompts to learn from, rows held out), in the order of the data; equal prompts go to the same side.

    Raises:
        ValueError: a source cannot be read or lacks the column, or one of the sides would be empty.
    """
    rows, keys = [], []
    for source in config.sources:
        for where, row in read_rows(source, config.keys):
            keys.append(json.dumps(column(where, row, config.prompt_key, "prompts.prompt_key"), sort_keys=True))
            rows.append(row)
    distinct = list(dict.fromkeys(keys))
    count = max(1, round(config.eval_fraction * len(distinct)))
    if count >= len(distinct):
        raise ValueError(
            f"prompts.eval_fraction={config.eval_fraction} of {len(distinct)} prompts leaves none to learn from"
        )
    order = np.random.default_rng((seed, 0, 0, 1)).permutation(len(distinct))
    chosen = {distinct[i] for i in order[:count]}
    sides = [[row for key, row in zip(keys, rows, strict=True) if (key in chosen) == out] for out in (False, True)]
    return sides[0], sides[1]


class Labels(NamedTuple):
    """What the answers to some prompts say."""

    pairs: Rows
    counts: dict[str, int]


def label(answers: Sequence[Answer], pairs: int) -> Labels:
    """Pairs of answers to the same prompt, the one with the higher reward chosen.

    Args:
        pairs: of a prompt; see `best_against_worst`.

    Returns:
        rows with the texts, the rewards and the tokens, and how many prompts, answers, answers without a score, pairs
        and ties there were; a tie is two answers whose rewards are equal, and gives no row.
    """
    scored = [Scored(a.source, str(i), a.reward) for i, a in enumerate(answers) if a.reward is not None]
    found = [
        (answers[int(pair.chosen.answer)], answers[int(pair.rejected.answer)])
        for pair in best_against_worst(scored, pairs)
    ]
    sizes: dict[str, int] = {}
    for answer in scored:
        sizes[answer.prompt] = sizes.get(answer.prompt, 0) + 1
    rows = [
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
        }
        for chosen, rejected in found
    ]
    counts = {
        "prompts": len({answer.source for answer in answers}),
        "answers": len(answers),
        "without_score": len(answers) - len(scored),
        "pairs": len(rows),
        "ties": sum(min(pairs, size // 2) for size in sizes.values()) - len(rows),
    }
    return Labels(rows, counts)


def read_labeled(source: str, read: Read = read_rows) -> list[Pair]:
    """The pairs of a file of `label`'s rows, token for token."""

    def sample(row: dict[str, Any], where: str, side: str) -> Sample:
        prompt, answer = row["prompt_tokens"], row[f"{side}_tokens"]
        return Sample(array("i", [*prompt, *answer]), bytes(len(prompt)) + b"\1" * len(answer), row["prompt"], where)

    return [Pair(sample(row, at, "chosen"), sample(row, at, "rejected"), 0.0) for at, row in read(source, {})]
