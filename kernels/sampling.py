"""Sampling of the next token from logits: temperature, then top-k, then top-p, with counter-based random numbers.

    z = logits / temperature;  keep the top_k largest;  of those the fewest largest whose probability reaches top_p
    u ~ Philox4x32-10(key, counter) in [0, 1)
    token = first kept i, in vocabulary order, with sum_{j <= i} e^{z_j} > u * sum_j e^{z_j}
    logprob = z_token - log sum_{kept} e^z        (temperature 0: token = argmax logits, logprob of the whole softmax)
The draw depends on (key, counter, logits) alone, so a sequence gets the same tokens in any batch. Equal logits rank by
index.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

# The kernels' types are those of Triton's language.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch

from .backends.triton_runtime import Spec, jit, tl
from .dispatch import choose, register

_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF
_END = tl.constexpr(0x7FFFFFFF) if tl else None  # above every key and every index


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
    # u * total may round up to total: then the last token with any weight is drawn.
    last = vocab - 1 - (weights > 0).flip(1).int().argmax(1)
    tokens = torch.where(greedy, logits.argmax(1), torch.minimum(drawn, last))
    logprobs = z.gather(1, tokens[:, None])[:, 0] - total[:, 0].log().float()
    return torch.where(total[:, 0].isfinite(), tokens, -1), logprobs


@jit
def _scaled(logits_ptr, i, v, peak, temperature):
    """z = (logit - max) / temperature of lanes i; -inf past the vocabulary."""
    logits = tl.load(logits_ptr + i, mask=i < v, other=float("-inf")).to(tl.float32)
    return (logits - peak) / temperature


@jit
def _key(z):
    """The bit pattern of -z, z <= 0: a non-negative integer, smaller for larger z."""
    return (0.0 - z).to(tl.int32, bitcast=True)


@jit
def _kept(own, i, v, key, index):
    """True for lanes i of keys `own` that are candidates: keys below `key`, and those equal to it up to `index`."""
    return ((own < key) | ((own == key) & (i <= index))) & (i < v)


@jit
def _totals(
    logits_ptr, v, peak, temperature, key, index, low, high, ends, by_index, count, BLOCK: tl.constexpr
):  # fmt: skip
    """One pass: how many candidates (count), or what mass e^z, lie up to each place of `ends`, in fp64.

    A candidate stands at its key, or by_index at its index if it is of exactly `key`, at -1 if ahead of those. Every
    mass is summed in the same order, so it never falls when the set grows. Also returns the first and the last place
    in [low, high] where a candidate stands.
    """
    totals = tl.zeros(ends.shape, tl.float64)
    first, last = tl.full([BLOCK], _END, tl.int32), tl.full([BLOCK], -1, tl.int32)
    for start in range(0, v, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = _scaled(logits_ptr, i, v, peak, temperature)
        own = _key(z)
        place = tl.where(by_index, tl.where(own == key, i, -1), own)
        place = tl.where(_kept(own, i, v, key, index), place, _END)
        weights = tl.where(count, 1.0, tl.exp(z))
        totals += tl.sum(tl.where(place[None, :] <= ends[:, None], weights[None, :], 0.0), 1).to(tl.float64)
        inside = (place >= low) & (place <= high)
        first = tl.minimum(first, tl.where(inside, place, _END))
        last = tl.maximum(last, tl.where(inside, place, -1))
    return totals, tl.min(first, 0), tl.max(last, 0)


@jit
def _cut(
    logits_ptr, v, peak, temperature, top_k, top_p, by_count, by_mass, BLOCK: tl.constexpr, WAYS: tl.constexpr
):  # fmt: skip
    """(key, index) of the last token kept by top-k (by_count), then by top-p (by_mass), and the mass of those kept.

    Four searches in a row, one pass over the logits a step: of the fewest candidates that reach the goal first the
    last key, then the last index among those of that key; by their number (stages 0 and 1), then by their mass (2 and
    3), whose first pass computes the mass of which the goal is a fraction. Each pass narrows [low, high] to one of its
    WAYS equal parts and to the candidates in it. A count ends a search where it equals the goal: up to any such place
    the candidates are the same.
    """
    key, index = 0x7F800000, _END  # the key of -inf
    low, high, stage = 0, key, tl.where(by_count, 0, 2)
    goal = tl.where(by_count, top_k, 0).to(tl.float64)  # 0: not known yet
    total = goal
    while stage < 4:
        by_index, count = (stage & 1) == 1, stage < 2
        step = (high - low + WAYS) // WAYS
        ends = tl.minimum(low - 1 + step * (1 + tl.arange(0, WAYS)), high)
        totals, first, last = _totals(
            logits_ptr, v, peak, temperature, key, index, low, high, ends, by_index, count, BLOCK
        )  # fmt: skip
        if goal == 0:
            # The best candidate weighs 1 and always stays; the nucleus is sought among the top-k candidates.
            total = tl.max(totals, 0)
            goal = tl.maximum(total * top_p.to(tl.float64), 1.0)
        if by_mass | count:
            short = tl.sum((totals < goal).to(tl.int32), 0)  # parts whose end does not reach the goal
            total = tl.min(tl.where(totals < goal, float("inf"), totals), 0)
            low += short * step
            high = tl.minimum(high, tl.minimum(low + step - 1, last))
            low = tl.maximum(low, first)
            if ((low >= high) | (count & (total <= goal))) & (by_index == 0):
                index = tl.where(high < key, _END, index)
                key = high
                low, high, stage = 0, tl.minimum(index, v - 1), stage + 1
                by_index = (stage & 1) == 1
            if ((low >= high) | (count & (total <= goal))) & by_index:
                index = high
                low, high, stage = 0, key, stage + 1
                goal = tl.where(count, 0.0, goal)
        else:
            stage = 4
    return key, index, total


@jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, keys_ptr, counters_ptr, tokens_ptr, logprobs_ptr, v, stride,
    BLOCK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    peak = float("-inf")
    bad = 0
    for start in range(0, v, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + i, mask=i < v, other=float("-inf")).to(tl.float32)
        bad += tl.sum(((x != x) | (x == float("inf"))).to(tl.int32), 0)
        peak = tl.maximum(peak, tl.max(x, 0))
    if (bad > 0) | (peak == float("-inf")):
        tl.store(tokens_ptr + row, -1)
        tl.store(logprobs_ptr + row, float("nan"))
        return
    by_count, by_mass = (top_k > 0) & (top_k < v) & (greedy == 0), (top_p < 1) & (greedy == 0)
    cut_key, cut_index, mass = _cut(
        logits_ptr, v, peak, temperature, top_k, top_p, by_count, by_mass, BLOCK, WAYS
    )  # fmt: skip
    key, counter = tl.load(keys_ptr + row), tl.load(counters_ptr + row)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = c0 * 0
    word0, word1, _, _ = tl.philox(key.to(tl.uint64, bitcast=True), c0, c1, zero, zero)
    bits = ((word0 >> 5).to(tl.int64) << 26) + (word1 >> 6).to(tl.int64)
    target = bits.to(tl.float64) * 1.1102230246251565e-16 * mass  # 2^-53
    before = mass * 0.0
    token, last, settled = -1, 0, 0
    for start in range(0, v, BLOCK):
        if settled == 0:
            i = start + tl.arange(0, BLOCK)
            z = _scaled(logits_ptr, i, v, peak, temperature)
            weights = tl.where(_kept(_key(z), i, v, cut_key, cut_index), tl.exp(z), 0.0)
            if greedy:
                chosen = (z == 0.0) & (i < v)
            else:
                chosen = (before + tl.cumsum(weights, 0).to(tl.float64) > target) & (weights > 0)
            first = tl.min(tl.where(chosen, i, v), 0)
            token = tl.where(first < v, first, token)
            settled = (first < v).to(tl.int32)
            last = tl.maximum(last, tl.max(tl.where(weights > 0, i, 0), 0))
            before += tl.sum(weights, 0).to(tl.float64)
    token = tl.where(token < 0, last, token)  # rounding brought the target to the total
    z = (tl.load(logits_ptr + token).to(tl.float32) - peak) / temperature
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, z - tl.log(mass.to(tl.float32)))


def sample_triton(logits, temperature, top_k, top_p, keys, counters):
    """torch.ops.trialign.sample on a GPU: the same distribution and random words as the reference."""
    tokens, logprobs = torch.empty_like(keys), torch.empty_like(temperature)
    if len(logits):
        _sample_kernel[(len(logits),)](
            logits, temperature, top_k, top_p, keys, counters, tokens, logprobs, logits.shape[1], logits.stride(0),
            **_CONFIG,
        )  # fmt: skip
    return tokens, logprobs


_CONFIG = {"BLOCK": 4096, "WAYS": 8, "num_warps": 16, "num_stages": 1}
SPECS = {
    "sample": Spec(
        _sample_kernel,
        {"logits_ptr": "*bf16", "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32"}
        | dict.fromkeys(("keys_ptr", "counters_ptr", "tokens_ptr"), "*i64")
        | {"logprobs_ptr": "*fp32", "v": "i32", "stride": "i64"},
        (_CONFIG,),
        unaligned=("v",),
    )
}


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    keys: torch.Tensor,
    counters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row.

    logits [b, v] fp32 or bf16; temperature [b] fp32, at least 0 (0 = greedy); top_k [b] int32 (0 = off); top_p [b] fp32
    (1 = off); keys and counters [b] int64. Returns tokens [b] int64 and logprobs [b] fp32 of the distribution drawn
    from (after temperature and renormalization; for greedy rows the log-softmax of the raw logits).
    The token of a row that holds NaN or +inf, or nothing but -inf, is -1: nothing here waits for the device, so whoever
    reads the tokens must check it. Raises ValueError when a setting is not one a row.
    """
    settings = (temperature, top_k, top_p, keys, counters)
    if any(setting.shape != logits.shape[:1] for setting in settings):
        shapes = ", ".join(str(list(setting.shape)) for setting in settings)
        raise ValueError(f"logits {list(logits.shape)} with settings {shapes}: must be one a row")
    draw = torch.ops.trialign.sample if choose("sample", logits) != "reference" else sample_ref
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return draw(logits, *(setting.contiguous() for setting in settings))


register(
    "sample",
    lambda logits, temperature, top_k, top_p, keys, counters: (torch.empty_like(keys), torch.empty_like(temperature)),
    triton=sample_triton,
)
