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
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..engine.mesh import Axis

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    cu_seqlens: Tensor = field(init=False)  # [samples + 1] int32: sample i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]]
    positions: Tensor = field(init=False)  # [total] int64: place within the sample
    response: Tensor = field(init=False)  # [targets] int64: where mask holds

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        assert self.lengths and min(self.lengths) > 0, "a batch without samples, or a sample without tokens"
        assert len(self.names) in (0, len(self.lengths)), "as many names as samples"
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

    def rows(self, samples: Sequence[int]) -> Tensor:
        """Where the tokens of these samples are: [their total] int64."""
        ends = list(accumulate(self.lengths))
        return torch.cat([torch.arange(ends[i] - self.lengths[i], ends[i]) for i in samples]).to(self.tokens.device)

    def select(self, samples: Sequence[int]) -> Batch:
        """The samples with these indices, packed again in the order given."""
        rows = self.rows(samples)
        return Batch(
            lengths=tuple(self.lengths[i] for i in samples),
            names=tuple(self.names[i] for i in samples if self.names),
            **{name: value[rows] for name, value in self.per_token().items()},
        )

    def name(self, sample: int) -> str:
        """What a message calls a sample."""
        return self.names[sample] if self.names else f"sample {sample + 1} of {len(self)}"

    def spread(self, targets: Tensor) -> Tensor:
        """`targets` [targets], one number for each response token, in their places among all: [total], 0 elsewhere."""
        return targets.new_zeros(self.tokens.shape).index_copy(0, self.response, targets)

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


def deal(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deals sample indices to `parts` ranks: equally many each, or one more where they do not divide, and about equally
    many tokens (longest first, to the rank with the fewest so far). Depends on the lengths alone, so every rank gets
    the same answer.

    Raises:
        ValueError: there are fewer samples than parts.
    """
    least, more = divmod(len(lengths), parts)
    if not least:
        raise ValueError(f"{len(lengths)} samples are fewer than {parts} data-parallel ranks")
    hands: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = least + (more > sum(len(hand) > least for hand in hands))
        open_ranks = [rank for rank in range(parts) if len(hands[rank]) < room]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], rank))
        hands[rank].append(sample)
        tokens[rank] += lengths[sample]
    return [sorted(hand) for hand in hands]


def micro_batches(samples: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int = 0) -> list[list[int]]:
    """Cuts `samples` into micro-batches of `size` samples, or, if `max_tokens` is given, of at most so many tokens.

    Samples are taken longest first, so that those of one micro-batch are about equally long.

    Args:
        samples: indices into `lengths`.

    Raises:
        ValueError: a sample alone has more tokens than `max_tokens`.
    """
    ordered = sorted(samples, key=lambda i: (-lengths[i], i))
    if not max_tokens:
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]
    cuts: list[list[int]] = []
    room = 0
    for sample in ordered:
        if lengths[sample] > max_tokens:
            raise ValueError(f"a sample of {lengths[sample]} tokens does not fit micro-batches of {max_tokens} tokens")
        if lengths[sample] > room:
            cuts.append([])
            room = max_tokens
        cuts[-1].append(sample)
        room -= lengths[sample]
    return cuts


def deal_micro_batches(
    samples: Sequence[int], lengths: Sequence[int], dp: Axis, size: int, max_tokens: int = 0
) -> list[list[int]]:
    """This DP rank's share of `samples` in micro-batches, as many as every other DP rank has, or one fewer where it
    has a sample less and each alone.

    Under ep the n-th micro-batches of some ranks run together and go through the same experts: they must be the same
    ones in every pass, for an old logprob to be the new one to the last bit.

    Args, raises: as in `deal` and `micro_batches`.
    """
    hands = deal([lengths[i] for i in samples], dp.size)
    cuts = [micro_batches([samples[i] for i in hand], lengths, size, max_tokens) for hand in hands]
    mine = cuts[dp.rank]
    while len(mine) < min(max(map(len, cuts)), len(hands[dp.rank])):
        place = max(range(len(mine)), key=lambda i: len(mine[i]))
        half = len(mine[place]) // 2
        mine[place : place + 1] = [mine[place][:half], mine[place][half:]]
    return mine
