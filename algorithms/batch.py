"""The batch: packed samples and what PPO learns about each of their tokens.

Convention: per-token tensors are aligned to the PREDICTED token. Entry t speaks of `tokens[t]`: its logprob under some
policy, the value of the state it was chosen in, the reward for choosing it. What predicts tokens[t] is the model's
output at t - 1, so `batch.response` (where the answers' tokens are) names the targets, `batch.response - 1` the rows of
hidden states that predict them, and `batch.spread` puts per-target numbers back in place. Entries outside `mask`
(prompts) are 0.

Every rank holds the same whole batch; ranks differ in which samples they compute, so statistics over a batch are plain
local sums and the same in every layout.
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
"""A reward: a finite number; NaN where a scorer failed and abstains; None where the row is not its own."""


@dataclass(frozen=True)
class Prompt:
    """One prompt out of a dataset. `index` counts the prompts drawn in a run; `source` says where it was read."""

    index: int
    tokens: list[int]
    text: str  # what a reward function gets: the user's words, without the chat template
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    messages: tuple[dict[str, Any], ...] = ()  # the whole chat that is answered, as the chat template gets it


@dataclass(frozen=True)
class Rollout:
    """One answer. `tokens` ends with the end of sequence where `finish` is "stop"."""

    prompt: Prompt
    tokens: list[int]
    logprobs: list[float]  # of the sampler, after temperature and truncation
    finish: Literal["stop", "length"]


def response_texts(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The answers in words, without special tokens and without the token that ended them, special or not."""
    tokens = [rollout.tokens[:-1] if rollout.finish == "stop" else rollout.tokens for rollout in rollouts]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


@dataclass(frozen=True)
class Batch:
    """Packed samples: prompt and response of each, end to end, no padding. See the module for the alignment."""

    tokens: Tensor  # [total] int64
    lengths: tuple[int, ...]  # tokens of each sample
    mask: Tensor  # [total] bool: the targets, which are the tokens of answers; never a sample's first
    rollout_logprobs: Tensor | None = None  # [total] fp32: the sampler's
    logprobs: Tensor | None = None  # [total] fp32: the actor's before the update ("old")
    ref_logprobs: Tensor | None = None  # [total] fp32: the reference's
    values: Tensor | None = None  # [total] fp32: the critic's before the update
    rewards: Tensor | None = None  # [total] fp32
    advantages: Tensor | None = None  # [total] fp32
    returns: Tensor | None = None  # [total] fp32
    weights: Tensor | None = None  # [total] fp32: what each token's loss counts for; None: all alike
    names: tuple[str, ...] = ()  # of each sample, where it was read, for messages; () where nobody knows
    row_sizes: tuple[int, ...] = ()  # samples of each row, which micro-batches keep together; (): one sample a row
    minibatches: Minibatches = ()  # of the update to come; (): none, or one that takes all samples at once
    cu_seqlens: Tensor = field(init=False)  # [samples + 1] int32: sample i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]]
    positions: Tensor = field(init=False)  # [total] int64: place within the sample
    response: Tensor = field(init=False)  # [targets] int64: where mask holds

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        assert self.lengths and min(self.lengths) > 0, "a batch without samples, or a sample without tokens"
        assert len(self.names) in (0, len(self.lengths)), "as many names as samples"
        assert not self.row_sizes or sum(self.row_sizes) == len(self.lengths), "rows that make up the samples"
        for name in PER_TOKEN:
            value = getattr(self, name)
            assert value is None or value.shape == (total,), f"{name} is {tuple(value.shape)}, not ({total},)"
        device = self.tokens.device
        lengths = torch.tensor(self.lengths)  # [samples]
        ends = lengths.cumsum(0)
        positions = torch.arange(total) - (ends - lengths).repeat_interleave(lengths)
        derived = {
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
            "positions": positions,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value.to(device))
        object.__setattr__(self, "response", self.mask.nonzero().squeeze(1))
        assert not self.mask[self.cu_seqlens[:-1].long()].any(), "a sample whose first token is a target"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    def with_(self, **changes: Any) -> Batch:
        """The same samples with some per-token tensors replaced."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        return self.with_(**{name: value.to(device) for name, value in self.per_token().items()})

    def per_token(self) -> dict[str, Tensor]:
        """The per-token tensors that are known so far, by name."""
        return {name: value for name in PER_TOKEN if (value := getattr(self, name)) is not None}

    def places(self, samples: Sequence[int]) -> Tensor:
        """Places of these samples' tokens: [their total] int64."""
        ends = list(accumulate(self.lengths))
        return torch.cat([torch.arange(ends[i] - self.lengths[i], ends[i]) for i in samples]).to(self.tokens.device)

    def select(self, samples: Sequence[int]) -> Batch:
        """The samples with these indices, packed again in the order given; of several samples a row, whole rows."""
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
        """What a message calls a sample."""
        return self.names[sample] if self.names else f"sample {sample + 1} of {len(self)}"

    def spread(self, targets: Tensor) -> Tensor:
        """`targets` [targets], one number for each response token, in their places among all: [total], 0 elsewhere."""
        return targets.new_zeros(self.tokens.shape).index_copy(0, self.response, targets)

    @property
    def segments(self) -> Segments:
        """The samples and their targets over all tokens, [total]."""
        return Segments.of_lengths(torch.tensor(self.lengths), self.mask)

    @property
    def target_segments(self) -> Segments:
        """The samples over their targets alone, [targets]."""
        sample = torch.bucketize(self.response, self.cu_seqlens[1:].long(), right=True)
        return Segments(torch.ones_like(sample, dtype=torch.bool), sample, len(self))

    @property
    def labels(self) -> Tensor:
        """[targets] int64: the response's tokens, which the outputs at `response - 1` predict."""
        return self.tokens[self.response]

    @property
    def last(self) -> Tensor:
        """[samples] int64: where each sample's last token is, its last target, which gets the score."""
        return self.cu_seqlens[1:].long() - 1


PER_TOKEN = (
    "tokens",
    "mask",
    "rollout_logprobs",
    "logprobs",
    "ref_logprobs",
    "values",
    "rewards",
    "advantages",
    "returns",
    "weights",
)


def pack(sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None) -> Batch:
    """A batch of token sequences. Without masks all tokens but each first one are targets (plain text)."""
    if masks is None:
        masks = [[place > 0 for place in range(len(sequence))] for sequence in sequences]
    return Batch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence]),
        lengths=tuple(len(sequence) for sequence in sequences),
        mask=torch.tensor([target for mask in masks for target in mask]),
    )


def after_prompts(lengths: Sequence[int], prompt_lengths: Sequence[int]) -> list[list[bool]]:
    """Masks of samples that are a prompt and, from there to their end, its answer."""
    return [[place >= prompt for place in range(n)] for n, prompt in zip(lengths, prompt_lengths, strict=True)]


def from_rollouts(rollouts: Sequence[Rollout]) -> Batch:
    """The batch of these answers, with the sampler's logprobs in place.

    Raises:
        ValueError: an answer without tokens, or without as many logprobs.
    """
    for rollout in rollouts:
        if not rollout.tokens or len(rollout.tokens) != len(rollout.logprobs):
            counts = f"{len(rollout.tokens)} tokens and {len(rollout.logprobs)} logprobs"
            raise ValueError(f"the answer to {rollout.prompt.source or rollout.prompt.text!r} has {counts}")
    samples = [r.prompt.tokens + r.tokens for r in rollouts]
    batch = pack(samples, after_prompts([len(s) for s in samples], [len(r.prompt.tokens) for r in rollouts]))
    sampling = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs], dtype=torch.float32)
    seen: dict[str, int] = {}  # answers to a prompt so far
    names = []
    for prompt in (rollout.prompt for rollout in rollouts):
        where = prompt.source or f"prompt {prompt.index}"
        seen[where] = seen.get(where, 0) + 1
        names.append(f"{where}, response {seen[where]}")
    return batch.with_(rollout_logprobs=batch.spread(sampling), names=tuple(names))
