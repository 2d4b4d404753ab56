"""Sampling: known random words, the right distribution and support, draws independent of the batch."""

import math

import pytest
import torch
from accuracy import FLOOR
from implementations import DTYPES, INTERPRET, by_mode, device, interpreted_only  # noqa: F401 (a fixture)
from trialign.kernels.sampling import philox, sample, sample_ref

implementations = pytest.mark.parametrize("draw", [sample, sample_ref][: by_mode(2, 1)])


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, key=0):
    """(temperature, top_k, top_p, keys, counters) of `rows` draws; row i has counter i."""
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), key, dtype=torch.int64),
        torch.arange(rows),
    )


def test_philox_equals_known_words():
    """The zero vector of Random123's kat_vectors for philox4x32-10, and one more by the definition."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero)[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    key, counter = 0x123456789ABCDEF0, -2
    k = [key & 0xFFFFFFFF, key >> 32]
    c = [counter & 0xFFFFFFFF, (counter >> 32) & 0xFFFFFFFF, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    assert philox(torch.tensor([key]), torch.tensor([counter]))[:, 0].tolist() == c


@pytest.mark.skipif(INTERPRET, reason="20,000 draws take long in the interpreter")
@implementations
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 6, 1.0), (1.0, 0, 0.8), (1.0, 9, 0.7)]
)
def test_distribution_passes_a_chi_square_test(draw, temperature, top_k, top_p):
    """20,000 draws at a fixed key against the distribution in float64; nothing outside the support."""
    torch.manual_seed(3)
    rows, v = 20_000, 12
    logits = torch.randn(v) * 1.5
    p = (logits.double() / temperature).softmax(0)
    order = p.argsort(descending=True)
    ranked = p[order]
    if top_k:
        ranked[top_k:] = 0
        ranked /= ranked.sum()
    if top_p < 1:
        ranked[(ranked.cumsum(0) - ranked) >= top_p] = 0
        ranked /= ranked.sum()
    p = torch.zeros_like(p).scatter(0, order, ranked)
    tokens, logprobs = draw(logits.repeat(rows, 1), *settings(rows, temperature, top_k, top_p, key=99))
    assert (p[tokens] > 0).all()
    assert (logprobs.double() - p[tokens].log()).abs().max() < 2e-6
    expected, seen = p * rows, torch.bincount(tokens, minlength=v).double()
    kept = expected > 0
    chi2 = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom), f"chi2 {chi2:.1f} for {freedom} degrees of freedom"


def check(logits, temperature, top_k, top_p, seed=0):
    rows = len(logits)
    keys, counters = torch.arange(rows) * 2**40 - 5 + seed, torch.arange(rows) * 2**33
    args = logits, torch.tensor(temperature), torch.tensor(top_k).int(), torch.tensor(top_p), keys, counters
    tokens, logprobs = sample(*args)
    expected, expected_logprobs = sample_ref(*args)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 37, 5000, *by_mode([5, 49152], [])])
def test_draws_equal_the_reference(v, dtype):
    rows = by_mode(4, 1)
    logits = (torch.randn(6 * rows, v) * 3).to(dtype)
    for seed in range(by_mode(3, 1)):
        temperature, top_k, top_p = [1.0, 0.0, 0.7, 1.3, 1.0, 0.5], [0, 0, 5, 0, 9, 3], [1.0, 1.0, 1.0, 0.8, 0.6, 1.0]
        check(logits, temperature * rows, top_k * rows, top_p * rows, seed)


def test_draws_from_a_large_vocabulary_equal_the_reference():
    check(torch.randn(2, 151_936) * 3, [1.0, 0.0], [0, 0], [1.0, 1.0])


def test_cuts_through_equal_logits_equal_the_reference():
    """Logits of few values, some of them -inf, and all equal, cut everywhere from one candidate to all of them."""
    v = 4097
    few = (torch.randn(v) * 2).round()
    hidden = few.masked_fill(torch.rand(v) < 0.7, -math.inf)
    hidden[v - 1] = 9.0
    top_k, top_p = [1, v + 1, v - 1, v // 2, 0, 0], [1.0, 0.9, 1.0, 0.5, 1e-6, 1 - 2**-24]
    for logits in (few, hidden, torch.full((v,), -3.25)):
        check(logits.repeat(6, 1), [1.0] * 6, top_k, top_p)


@implementations
def test_greedy_takes_the_largest_logit(draw):
    logits = torch.randn(5, 333)
    logits[2, [40, 200]] = 9.0  # a tie goes to the lower index
    tokens, logprobs = draw(logits, *settings(5, temperature=0.0, top_k=3, top_p=0.2))
    assert torch.equal(tokens, logits.argmax(1)) and tokens[2] == 40
    exact = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - exact).abs().max() < 8 * FLOOR[torch.float32]


@implementations
@pytest.mark.parametrize(
    "cut, tokens", [({"top_k": 3}, range(3)), ({"top_p": 0.07}, range(5)), ({"top_k": 4, "top_p": 0.5}, range(2))]
)
def test_equal_logits_are_cut_by_index(draw, cut, tokens):
    assert set(draw(torch.zeros(by_mode(500, 30), 64), *settings(by_mode(500, 30), **cut))[0].tolist()) == {*tokens}


@implementations
def test_draws_depend_on_key_counter_and_logits_only(draw):
    args = [torch.randn(40, 257), *settings(40)]
    args[4] = torch.arange(40) * 977
    tokens, logprobs = draw(*args)
    order = torch.randperm(40)
    for rows in (order, order[7:8]):
        moved = draw(*(a[rows] for a in args))
        assert torch.equal(moved[0], tokens[rows]) and torch.equal(moved[1], logprobs[rows])
    assert not torch.equal(draw(*args[:4], args[4] + 1, args[5])[0], tokens)
    assert draw(*(a[:0] for a in args))[0].shape == (0,)
    assert not torch.equal(draw(*args[:5], args[5] + 1000)[0], tokens)


@implementations
@pytest.mark.parametrize("corrupt", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution_get_no_token(draw, corrupt, temperature):
    logits = torch.randn(4, 50)
    logits[2, slice(None) if corrupt == -math.inf else 33] = corrupt
    tokens, _ = draw(logits, *settings(4, temperature))
    assert tokens[2] == -1 and (tokens[[0, 1, 3]] >= 0).all()
