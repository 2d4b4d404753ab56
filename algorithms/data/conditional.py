"""Rows of conditional SFT: responses with their rewards in the prompts (https://arxiv.org/abs/2308.12050)."""

from __future__ import annotations

import statistics
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..batch import Prompt, Rollout, single_turn
from ..config.conditional import ConditionConfig, RewardedData
from .chat import column, shorten
from .dialogues import Dialogue, Encoder, Sample
from .preferences import read_response
from .sources import Read, RowReader, read_rows
from .streams import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rewarded:
    """A row: a response with its reward."""

    dialogue: Dialogue
    fields: dict[str, Any]  # the other columns, for reward functions
    reward: float | None  # None before scoring, or without a score

    @property
    def last_user(self) -> int:
        """Number of the user's last message before the response, which gets the reward."""
        messages = self.dialogue.messages
        return max(i for i, message in enumerate(messages[: self.dialogue.learned[0]]) if message["role"] == "user")

    @property
    def words(self) -> str:
        """Text of that message."""
        return self.dialogue.messages[self.last_user]["content"]

    def with_words(self, words: str) -> Dialogue:
        """The dialogue with another last message of the user."""
        place, messages = self.last_user, self.dialogue.messages
        changed = [*messages[:place], {**messages[place], "content": words}, *messages[place + 1 :]]
        return self.dialogue._replace(messages=changed)


def read_rewarded(source: str, config: RewardedData, given: bool, read: Read = read_rows) -> list[Rewarded]:
    """The rows of a source.

    Args:
        given: read the column of rewards; otherwise rewards are None.

    Raises:
        ValueError: a column is missing or malformed, or a reward is no finite number; names the row.
    """
    rows = []
    for where, row in read(source, config.keys):
        dialogue = read_response(where, row, config.response_key, "response_key", config)
        if not any(message["role"] == "user" for message in dialogue.messages):
            raise ValueError(f"{where}: no user message for the reward")
        reward = column(where, row, config.reward_key, "data.reward_key") if given else None
        limit = sys.float_info.max  # an integer may be larger than any float
        if given and (isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= limit):
            raise ValueError(f"{where}: {config.reward_key!r} must be a finite number, not {shorten(reward)}")
        own = (config.prompt_key, config.response_key)
        fields = {key: value for key, value in row.items() if key not in own}
        rows.append(Rewarded(dialogue, fields, None if reward is None else float(reward)))
    return rows


def as_rollouts(rows: Sequence[Rewarded], samples: Sequence[Sample]) -> list[Rollout]:
    """The responses as finished rollouts, for scorers."""
    rollouts = []
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        begin = sample.mask.index(1)
        tokens = sample.tokens[begin:].tolist()
        messages = tuple(row.dialogue.prompt_messages(row.dialogue.learned[0]))
        prompt = Prompt(i, sample.tokens[:begin].tolist(), sample.text, row.fields, sample.where, messages)
        rollouts.append(single_turn(prompt, tokens, [0.0] * len(tokens), "stop"))
    return rollouts


def conditioned(template: str, words: str, reward: str) -> str:
    """The user's words with a reward, by a template with {input} and {reward}."""
    return template.replace("{reward}", reward).replace("{input}", words)  # words with {reward} stay as they are


def normalized(rewards: Sequence[float]) -> list[float]:
    """Rewards minus their mean, divided by their (unbiased) standard deviation. ValueError if all are equal."""
    deviation = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    if deviation == 0:
        raise ValueError(f"{len(rewards)} rewards are all {rewards[:1]}: equal rewards cannot be normalized")
    mean = statistics.fmean(rewards)
    return [(reward - mean) / deviation for reward in rewards]


def bucketed(rewards: Sequence[float], count: int) -> list[float]:
    """Mean of each reward's quantile bucket; equal rewards share a bucket.

    Raises:
        ValueError: all are in one bucket.
    """
    ordered = sorted(rewards)
    buckets = [count * bisect_left(ordered, reward) // len(rewards) for reward in rewards]
    if len(set(buckets)) < 2:
        raise ValueError(f"{len(rewards)} rewards fall into one of condition.buckets={count}: use fewer buckets")
    means = {b: statistics.fmean(r for r, own in zip(rewards, buckets, strict=True) if own == b) for b in set(buckets)}
    return [means[bucket] for bucket in buckets]


class ConditionedRows(RowStream[Sample]):
    """Stream of conditional SFT. Rewards are normalized and bucketed over all rows, eval split included.

    Args:
        rows: of each source; those without a reward are dropped and counted.
        too_long: names of rows longer than `data.max_tokens` even without a reward.
        reader: the reader of `rows`.

    Raises:
        ValueError: no row has a reward, rewards do not differ, or no row is short enough.
    """

    def __init__(
        self,
        config: RewardedData,
        condition: ConditionConfig,
        rows: Mapping[str, Sequence[Rewarded]],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        seed: int = 0,
        too_long: frozenset[str] = frozenset(),
        reader: RowReader | None = None,
    ):
        every = [row for own in rows.values() for row in own]
        rewarded = [row for row in every if row.reward is not None]
        self.unscored = len(every) - len(rewarded) - len(too_long)
        if not rewarded:
            raise ValueError(f"none of {len(every)} rows has a reward")
        rewards = [row.reward or 0.0 for row in rewarded]
        rewards = normalized(rewards) if condition.normalize else rewards
        rewards = bucketed(rewards, condition.buckets) if condition.buckets else rewards
        texts = [f"{reward:.2f}" for reward in rewards]
        self.written = sorted(set(texts), key=float)
        self.target_reward, template = condition.target_reward or self.written[-1], condition.template
        dialogues = {
            row.dialogue.where: row.with_words(conditioned(template, row.words, text))
            for row, text in zip(rewarded, texts, strict=True)
        }
        dialogues |= {row.dialogue.where: row.dialogue for row in every if row.dialogue.where in too_long}

        self.encoder = Encoder(config, tokenizer, stop_ids)

        def load(source: str) -> list[Sample]:
            mine = [dialogues[row.dialogue.where] for row in rows[source] if row.dialogue.where in dialogues]
            return list(self.encoder.responses(mine))

        super().__init__(config, load, lambda sample: [len(sample.tokens)], seed, reader=reader)
        self._template = template
        self._rows = {row.dialogue.where: row for row in rewarded}

    def __str__(self) -> str:
        some = self.written if len(self.written) <= 6 else [*self.written[:2], "...", *self.written[-2:]]
        text = f"{super().__str__()}; {len(self.written)} rewards written: {', '.join(some)}"
        text += f"; {self.unscored} dropped without a score" if self.unscored else ""
        return text + str(self.encoder)

    def prompts(self, count: int) -> list[tuple[Prompt, list[int]]]:
        """(prompt with the target reward, response tokens of the data) of first rows, preferably of the eval split."""
        rows = [self._rows[sample.where] for sample in (self.eval_rows or list(self.rows()))[:count]]
        dialogues = [row.with_words(conditioned(self._template, row.words, self.target_reward)) for row in rows]
        found = []
        samples = self.encoder.responses(dialogues)
        for i, (row, dialogue, sample) in enumerate(zip(rows, dialogues, samples, strict=True)):
            begin, messages = sample.mask.index(1), tuple(dialogue.prompt_messages(dialogue.learned[0]))
            prompt = Prompt(i, sample.tokens[:begin].tolist(), row.words, row.fields, sample.where, messages)
            found.append((prompt, sample.tokens[begin:].tolist()))
        return found
