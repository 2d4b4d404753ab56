"""Sampling: known random words, the right distribution, the right support, draws independent of the batch."""

import math

import pytest
import torch
from law import FLOOR
from trialign.kernels.dispatch import has_op
from trialign.kernels.sampling import philox, sample, sample_ref, uniform

compiled = pytest.param(
    lambda *args: torch.ops.trialign.sample(*args),
    id="cpp",
    marks=pytest.mark.skipif(not has_op("sample"), reason="trialign._C is not usable"),
)
implementations = pytest.mark.parametrize("draw", [compiled, pytest.param(sample_ref, id="reference")])


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, key=0):
    """(temperature, top_k, top_p, keys, counters) of `rows` draws; row i has counter i."""
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), key, dtype=torch.int64),
        torch.arange(rows),
    )


def test_philox_known_answers():
    """The zero vector of Random123's kat_vectors for philox4x32-10, and one more by the definition."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [hex(w) for w in philox(zero, zero)[:, 0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    key, counter = 0x123456789ABCDEF0, -2
    k = [key & 0xFFFFFFFF, key >> 32]
    c = [counter & 0xFFFFFFFF, (counter >> 32) & 0xFFFFFFFF, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    assert philox(torch.tensor([key]), torch.tensor([counter]))[:, 0].tolist() == c


def test_uniform_is_uniform():
    u = uniform(torch.full((100_000,), 7), torch.arange(100_000))
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 1e5)
    assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 4 / math.sqrt(1e5)


@implementations
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 6, 1.0), (1.0, 0, 0.8), (1.0, 9, 0.7)]
)
def test_distribution(draw, temperature, top_k, top_p):
    """Chi-square of 20,000 draws at a fixed key against the law in float64; nothing outside the support."""
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
    expected = p * rows
    seen = torch.bincount(tokens, minlength=v).double()
    kept = expected > 0
    chi2 = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom), f"chi2 {chi2:.1f} for {freedom} degrees of freedom"


@pytest.mark.skipif(not has_op("sample"), reason="trialign._C is not usable")
@pytest.mark.parametrize("v", [1, 5, 17, 1000, 49152, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_draws_what_the_reference_draws(v, dtype):
    torch.manual_seed(0)
    rows = 24
    logits = (torch.randn(rows, v) * 3).to(dtype)
    temperature = torch.rand(rows) * 1.5 + 0.2
    temperature[::8] = 0
    top_k = torch.randint(0, min(v, 60) + 1, (rows,), dtype=torch.int32)
    top_k[::3] = 0
    top_p = torch.rand(rows)
    top_p[::2] = 1
    keys = torch.randint(-(2**62), 2**62, (rows,))
    args = (logits, temperature, top_k, top_p, keys, torch.arange(rows) * 2**33)
    tokens, logprobs = torch.ops.trialign.sample(*args)
    right, right_logprobs = sample_ref(*args)
    assert torch.equal(tokens, right)
    assert torch.allclose(logprobs, right_logprobs, atol=2e-6, rtol=1e-6)


@implementations
def test_greedy(draw):
    torch.manual_seed(1)
    logits = torch.randn(5, 333)
    logits[2, [40, 200]] = 9.0  # a tie goes to the lower index
    tokens, logprobs = draw(logits, *settings(5, temperature=0.0, top_k=3, top_p=0.2))
    assert torch.equal(tokens, logits.argmax(1)) and tokens[2] == 40
    exact = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - exact).abs().max() < 8 * FLOOR[torch.float32]


@implementations
def test_equal_logits_are_cut_by_index(draw):
    logits = torch.zeros(500, 64)
    assert set(draw(logits, *settings(500, top_k=3))[0].tolist()) == {0, 1, 2}
    assert set(draw(logits, *settings(500, top_p=0.07))[0].tolist()) == {0, 1, 2, 3, 4}
    assert set(draw(logits, *settings(500, top_k=4, top_p=0.5))[0].tolist()) == {0, 1}


@implementations
def test_minus_infinity_is_never_drawn(draw):
    logits = torch.full((2000, 100), -math.inf)
    logits[:, [3, 50, 99]] = torch.tensor([1.0, 1e4, 1e4])
    for cut in ({}, {"top_k": 50}, {"top_p": 0.99}):
        tokens, logprobs = draw(logits, *settings(2000, **cut))  # pyright: ignore[reportArgumentType]
        assert set(tokens.tolist()) == {50, 99}
        assert (logprobs + math.log(2)).abs().max() < 1e-6


@implementations
def test_only_key_counter_and_logits_matter(draw):
    torch.manual_seed(2)
    logits = torch.randn(40, 257)
    args = [logits, *settings(40)]
    args[4] = torch.arange(40) * 977
    tokens, logprobs = draw(*args)
    order = torch.randperm(40)
    moved = draw(*(a[order] for a in args))
    assert torch.equal(moved[0], tokens[order]) and torch.equal(moved[1], logprobs[order])
    one = draw(*(a[7:8] for a in args))
    assert one[0][0] == tokens[7] and one[1][0] == logprobs[7]
    assert not torch.equal(draw(*args[:4], args[4] + 1, args[5])[0], tokens)
    assert not torch.equal(draw(*args[:5], args[5] + 1000)[0], tokens)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution_are_refused(bad, temperature):
    logits = torch.randn(4, 50)
    if bad == "all -inf":
        logits[2] = -math.inf
    else:
        logits[2, 33] = bad
    with pytest.raises(ValueError, match=r"row 2 of the logits \[4, 50\] holds NaN, \+inf or only -inf"):
        sample(logits, *settings(4, temperature))


def test_strided_logits_and_empty_batch():
    torch.manual_seed(0)
    wide = torch.randn(6, 80)
    assert torch.equal(sample(wide[:, :64], *settings(6))[0], sample(wide[:, :64].contiguous(), *settings(6))[0])
    turned = wide[:, :64].t().contiguous().t()
    assert torch.equal(sample(turned, *settings(6))[0], sample(wide[:, :64], *settings(6))[0])
    assert sample(wide[:0], *settings(0))[0].shape == (0,)


@pytest.mark.skipif(not has_op("sample"), reason="trialign._C is not usable")
def test_opcheck():
    torch.library.opcheck(torch.ops.trialign.sample.default, (torch.randn(3, 20), *settings(3, top_k=4)))
