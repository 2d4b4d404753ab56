"""Prompts, rollouts of one or several turns, and the batch: packed samples with per-token tensors.

Per-token tensors are aligned to the PREDICTED token: entry t belongs to `tokens[t]`: its logprob under a policy, the
value of the state it was chosen in, the reward for choosing it. The model's output at t - 1 predicts it, so
`batch.response` (indices of the policy's tokens) are the targets, `batch.response - 1` the rows of hidden states that
predict them, and `batch.scatter` puts numbers of targets in place. Entries outside `mask` (prompts, turns of an
environment) are 0.

Every rank holds the same whole batch and computes some of its samples, so statistics of a batch are local sums, equal
in every layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .losses.aggregation import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Minibatches = tuple[tuple[tuple[int, ...], ...], ...]
"""Sample ids of each optimizer step of each epoch."""

Score = float | None
"""A reward: a finite number, NaN where its scorer failed (and abstains), None where the scorer is not for the row."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a dataset. `index` counts the prompts drawn in a run; `source` is its file and line."""

    index: int
    tokens: list[int]
    text: str  # for reward functions: the user's words, without the chat template
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    messages: tuple[dict[str, Any], ...] = ()  # the chat before the response, as the chat template takes it

    @property
    def where(self) -> str:
        """Its file and line, or its index, for messages."""
        return self.source or f"prompt {self.index}"


@dataclass(frozen=True)
class Turn:
    """Consecutive tokens of a rollout from one side: the policy, or its environment (a tool, a user).

    Attributes:
        tokens: including the end-of-sequence token where the policy's `finish` is "stop".
        logprobs: the sampler's, after temperature and truncation, one a token; None for an environment's turn.
        versions: of the weights that chose each token; empty for the environment.
        messages: an environment's turn as the chat template takes it.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    versions: list[int] = field(default_factory=list)
    finish: Literal["stop", "length", "abort"] = "stop"
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """A response to a prompt: turns of the policy, which has the first one, and of its environment."""

    prompt: Prompt
    turns: tuple[Turn, ...]

    @property
    def tokens(self) -> list[int]:
        """All tokens after the prompt."""
        return [token for turn in self.turns for token in turn.tokens]

    @property
    def mask(self) -> list[bool]:
        """Whether the policy chose each of `tokens`."""
        return [turn.logprobs is not None for turn in self.turns for _ in turn.tokens]

    @property
    def policy_turns(self) -> list[Turn]:
        """The policy's turns."""
        return [turn for turn in self.turns if turn.logprobs is not None]

    @property
    def length(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(len(turn.tokens) for turn in self.policy_turns)

    @property
    def finish(self) -> Literal["stop", "length", "abort"]:
        """`finish` of the policy's last turn."""
        return self.policy_turns[-1].finish


def single_turn(
    prompt: Prompt,
    tokens: list[int],
    logprobs: list[float],
    finish: Literal["stop", "length", "abort"],
    versions: list[int] | None = None,
) -> Rollout:
    """A rollout of one completion; without `versions` its tokens are of version 0."""
    return Rollout(prompt, (Turn(tokens, logprobs, [0] * len(tokens) if versions is None else versions, finish),))


def turn_texts(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of policy turns without special tokens and without the stop token, special or not."""
    tokens = [turn.tokens[:-1] if turn.finish == "stop" else turn.tokens for turn in turns]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def response_texts(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of responses: the policy's turns (`turn_texts`) joined by blank lines, without the environment's."""
    texts = iter(turn_texts([turn for rollout in rollouts for turn in rollout.policy_turns], tokenizer))
    return ["\n\n".join(next(texts) for _ in rollout.policy_turns) for rollout in rollouts]


@dataclass(frozen=True)
class Batch:
    """Samples (prompt and response) packed end to end without padding. The module docstring has the alignment."""

    tokens: Tensor  # [total] int64
    lengths: tuple[int, ...]  # tokens of each sample
    mask: Tensor  # [total] bool: the targets, in any number of turns; never a sample's first token
    versions: Tensor | None = None  # [total] int64: of the weights that chose each target
    rollout_logprobs: Tensor | None = None  # [total] fp32: the sampler's
    logprobs: Tensor | None = None  # [total] fp32: the actor's before the update ("old")
    ref_logprobs: Tensor | None = None  # [total] fp32: the reference's
    values: Tensor | None = None  # [total] fp32: the critic's before the update
    rewards: Tensor | None = None  # [total] fp32
    advantages: Tensor | None = None  # [total] fp32
    returns: Tensor | None = None  # [total] fp32
    weights: Tensor | None = None  # [total] fp32: weight of each token's loss; None: all 1
    names: tuple[str, ...] = ()  # of each sample for messages, such as file and line; () if unknown
    scores: Tensor | None = None  # [samples] fp32: rewards of responses; NaN for an unscored one
    group: Tensor | None = None  # [samples] int64: responses to one prompt share a number
    row_sizes: tuple[int, ...] = ()  # samples of each row, kept together by micro-batches; (): one sample a row
    minibatches: Minibatches = ()  # of the coming update; (): one that takes all samples, or none
    cu_seqlens: Tensor = field(init=False)  # [samples + 1] int32: sample i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]]
    positions: Tensor = field(init=False)  # [total] int64: index within the sample
    response: Tensor = field(init=False)  # [targets] int64: indices of the mask

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        assert self.lengths and min(self.lengths) > 0, "a batch without samples, or a sample without tokens"
        assert len(self.names) in (0, len(self.lengths)), "as many names as samples"
        assert not self.row_sizes or sum(self.row_sizes) == len(self.lengths), "rows that make up the samples"
        for name in PER_TOKEN:
            value = getattr(self, name)
            assert value is None or value.shape == (total,), f"{name} is {tuple(value.shape)}, not ({total},)"
        lengths = torch.tensor(self.lengths)  # [samples]
        ends = lengths.cumsum(0)
        derived = {
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
            "positions": torch.arange(total) - (ends - lengths).repeat_interleave(lengths),
            "response": self.mask.nonzero().squeeze(1),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value.to(self.tokens.device))
        assert not self.mask[self.cu_seqlens[:-1].long()].any(), "a sample whose first token is a target"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    def with_(self, **changes: Any) -> Batch:
        """The same samples with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        per_sample = {name: value for name in ("scores", "group") if (value := getattr(self, name)) is not None}
        return self.with_(**{name: value.to(device) for name, value in (self.per_token() | per_sample).items()})

    def per_token(self) -> dict[str, Tensor]:
        """The per-token tensors set so far, by name."""
        return {name: value for name in PER_TOKEN if (value := getattr(self, name)) is not None}

    def places(self, samples: Sequence[int]) -> Tensor:
        """Indices of these samples' tokens, [their total] int64."""
        ends = list(accumulate(self.lengths))
        return torch.cat([torch.arange(ends[i] - self.lengths[i], ends[i]) for i in samples]).to(self.tokens.device)

    def select(self, samples: Sequence[int]) -> Batch:
        """The samples with these ids, packed in the order given; where rows have several samples, whole rows."""
        places = self.places(samples)
        row_of = [row for row, size in enumerate(self.row_sizes) for _ in range(size)]
        per_token: dict[str, Any] = {name: value[places] for name, value in self.per_token().items()}
        return Batch(
            lengths=tuple(self.lengths[i] for i in samples),
            names=tuple(self.names[i] for i in samples if self.names),
            row_sizes=tuple(len(list(row)) for _, row in groupby(row_of[i] for i in samples if row_of)),
            **per_token,
        )

    def name(self, sample: int) -> str:
        """Name of a sample in messages."""
        return self.names[sample] if self.names else f"sample {sample + 1} of {len(self)}"

    def scatter(self, targets: Tensor) -> Tensor:
        """[targets] -> [total]: numbers of response tokens put in place, 0 elsewhere. Differentiable."""
        return targets.new_zeros(self.tokens.shape).index_copy(0, self.response, targets)

    @property
    def segments(self) -> Segments:
        """Segments over all tokens, [total]; the targets count."""
        return Segments(self.mask, self.cu_seqlens.long())

    @property
    def target_segments(self) -> Segments:
        """Segments over the targets alone, [targets]."""
        mask = torch.ones_like(self.response, dtype=torch.bool)
        return Segments(mask, torch.searchsorted(self.response, self.cu_seqlens.long()))

    @property
    def labels(self) -> Tensor:
        """[targets] int64: the response's tokens, predicted by the outputs at `response - 1`."""
        return self.tokens[self.response]

    @property
    def last(self) -> Tensor:
        """[samples] int64: index of each sample's last target, where its score is read, else of its last token."""
        begins, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        places = torch.arange(len(self.tokens), device=self.tokens.device)
        target = torch.where(self.mask, places, -1).cummax(0).values[ends - 1]
        return torch.where(target >= begins, target, ends - 1)


PER_TOKEN = (
    "tokens mask versions rollout_logprobs logprobs ref_logprobs values rewards advantages returns weights".split()
)
"""Names of the per-token tensors."""


def pack(sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None) -> Batch:
    """A batch of token sequences; without masks all tokens but each first one are targets (plain text)."""
    if masks is None:
        masks = [[place > 0 for place in range(len(sequence))] for sequence in sequences]
    return Batch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence]),
        lengths=tuple(len(sequence) for sequence in sequences),
        mask=torch.tensor([target for mask in masks for target in mask]),
    )


def from_rollouts(rollouts: Sequence[Rollout]) -> Batch:
    """The batch of these rollouts with the sampler's logprobs and the versions of the weights.

    Raises:
        ValueError: the first turn is not the policy's, or a policy turn has no tokens or other numbers of logprobs or
            versions than tokens; names the row.
    """
    for rollout in rollouts:
        turns, where = rollout.turns, rollout.prompt.source or repr(rollout.prompt.text)
        if not turns or turns[0].logprobs is None:
            raise ValueError(f"{where}: a response of {len(turns)} turns must begin with the policy's")
        for turn in rollout.policy_turns:
            counts = len(turn.tokens), len(turn.logprobs or ()), len(turn.versions)
            if not turn.tokens or len(set(counts)) > 1:
                raise ValueError(f"{where}: a turn of {counts[0]} tokens, {counts[1]} logprobs, {counts[2]} versions")
    batch = pack(
        [rollout.prompt.tokens + rollout.tokens for rollout in rollouts],
        [[False] * len(rollout.prompt.tokens) + rollout.mask for rollout in rollouts],
    )
    turns = [turn for rollout in rollouts for turn in rollout.policy_turns]
    logprobs = torch.tensor([value for turn in turns for value in turn.logprobs or ()], dtype=torch.float32)
    versions = torch.tensor([version for turn in turns for version in turn.versions])
    seen: dict[str, int] = {}  # responses to a prompt so far
    names = []
    for where in (rollout.prompt.where for rollout in rollouts):
        seen[where] = seen.get(where, 0) + 1
        names.append(f"{where}, response {seen[where]}")
    return batch.with_(rollout_logprobs=batch.scatter(logprobs), versions=batch.scatter(versions), names=tuple(names))
