"""Draws the next token from logits: temperature, then top-k, then top-p, with counter-based random numbers.

    z = logits / temperature;  keep the top_k largest;  of those the fewest largest whose probability reaches top_p
    u ~ Philox4x32-10(key, counter) in [0, 1)
    token = first kept i, in vocabulary order, with sum_{j <= i} e^{z_j} > u * sum_j e^{z_j}
    logprob = z_token - log sum_{kept} e^z        (temperature 0: token = argmax logits, logprob of the whole softmax)
The draw depends on (key, counter, logits) alone, so a sequence gets the same tokens in any batch. Equal logits rank by
index.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

from .dispatch import choose, register

_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 of the counter (counter low, counter high, 0, 0) under a 64-bit key.

    keys and counters [b] int64. Returns the four 32-bit words as int64 [4, b].
    """
    k0, k1 = keys & _LOW, (keys >> 32) & _LOW
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, _M0), _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack([c0, c1, c2, c3])


def _multiply(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product; 16-bit halves keep int64 from overflowing."""
    low = x * (constant & 0xFFFF)  # < 2^48
    high = x * (constant >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Doubles in [0, 1) with 53 random bits, [b]."""
    words = philox(keys, counters)
    return ((words[0] >> 5) * 67108864 + (words[1] >> 6)).double() * 2.0**-53


def sample_ref(logits, temperature, top_k, top_p, keys, counters):
    """The definition by a full sort, in fp32 with sums in fp64. Shapes as in `sample`."""
    vocab = logits.shape[1]
    logits = logits.float()
    greedy = temperature == 0
    z = (logits - logits.amax(1, keepdim=True)) / torch.where(greedy, 1.0, temperature)[:, None]
    weights = z.exp().double()  # [b, v], 1 at the maximum
    if bool(((top_k > 0) | (top_p < 1)).any()):
        order = z.argsort(dim=1, descending=True, stable=True)
        ranked = weights.gather(1, order)
        rank = torch.arange(vocab, device=z.device)[None]
        ranked = ranked.masked_fill((top_k > 0)[:, None] & (rank >= top_k[:, None]), 0)
        before = ranked.cumsum(1) - ranked
        # The first token always stays, whatever top_p rounds to.
        beyond = (before >= top_p.double()[:, None] * ranked.sum(1, keepdim=True)) & (top_p < 1)[:, None] & (rank > 0)
        kept = torch.zeros_like(weights).scatter_(1, order, ranked.masked_fill(beyond, 0))
        weights = torch.where(greedy[:, None], weights, kept)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    drawn = (cumulative <= uniform(keys, counters)[:, None] * total).sum(1)
    # u * total may round up to total: the last token that has any weight is then meant.
    last = vocab - 1 - (weights > 0).flip(1).int().argmax(1)
    tokens = torch.where(greedy, logits.argmax(1), torch.minimum(drawn, last))
    logprobs = z.gather(1, tokens[:, None])[:, 0] - total[:, 0].log().float()
    return torch.where(total[:, 0].isfinite(), tokens, -1), logprobs


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    keys: torch.Tensor,
    counters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row.

    logits [b, v] fp32 or bf16; temperature [b] fp32 (0 = greedy); top_k [b] int32 (0 = off); top_p [b] fp32 (1 = off);
    keys and counters [b] int64. Returns tokens [b] int64 and logprobs [b] fp32 of the distribution drawn from (after
    temperature and renormalisation; for greedy rows the log-softmax of the raw logits).
    Raises ValueError when a row holds NaN or +inf, or nothing but -inf.
    """
    draw = torch.ops.trialign.sample if choose("sample", logits) == "cpp" else sample_ref
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, logprobs = draw(logits, temperature, top_k, top_p, keys, counters)
    if bool((tokens < 0).any()):
        row = int((tokens < 0).nonzero()[0])
        raise ValueError(
            f"row {row} of the logits {list(logits.shape)} holds NaN, +inf or only -inf: no token can be drawn"
        )
    return tokens, logprobs


register(
    "sample",
    lambda logits, temperature, top_k, top_p, keys, counters: (torch.empty_like(keys), torch.empty_like(temperature)),
)
