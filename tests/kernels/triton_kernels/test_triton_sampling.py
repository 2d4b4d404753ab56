"""The Triton sampler draws what the reference draws, and refuses what it refuses."""

import math

import pytest
import torch
from trialign.kernels.sampling import sample_ref, sample_triton
from triton_case import DEVICE, INTERPRET, needs_triton

if INTERPRET:
    from interp_shim import Monitor

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16]


def check(logits, temperature, top_k, top_p, seed=0):
    rows = len(logits)
    args = (
        logits.to(DEVICE),
        torch.tensor(temperature, device=DEVICE),
        torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.arange(rows, device=DEVICE) * 2**40 - 5 + seed,
        torch.arange(rows, device=DEVICE) + 2**35,
    )
    tokens, logprobs = sample_triton(*args)
    right, right_logprobs = sample_ref(*args)
    assert torch.equal(tokens, right)
    known = right >= 0
    assert torch.allclose(logprobs[known], right_logprobs[known], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("v, dtype", [*((v, t) for v in (1, 37, 5000) for t in DTYPES), (37, torch.float16)])
def test_draws_what_the_reference_draws(dtype, v):
    torch.manual_seed(0)
    logits = (torch.randn(6, v) * 3).to(dtype)
    check(logits, [1.0, 0.0, 0.7, 1.3, 1.0, 0.5], [0, 0, 5, 0, 9, 3], [1.0, 1.0, 1.0, 0.8, 0.6, 1.0])


def test_the_largest_vocabulary():
    torch.manual_seed(0)
    check(torch.randn(2, 151_936) * 3, [1.0, 0.0], [0, 0], [1.0, 1.0])


def test_equals_and_infinities():
    logits = torch.zeros(5, 40)
    logits[1, 3:] = -math.inf
    logits[2] = -math.inf
    logits[3, 7] = math.nan
    logits[4, 7] = math.inf
    check(logits, [1.0] * 5, [3, 5, 0, 0, 0], [0.5, 0.9, 1.0, 1.0, 1.0])


def test_cuts_through_equals():
    """Logits of few values, some of them -inf, and all equal, cut everywhere from one candidate to all of them."""
    torch.manual_seed(1)
    v = 4097
    few = (torch.randn(v) * 2).round()
    hidden = few.masked_fill(torch.rand(v) < 0.7, -math.inf)
    hidden[v - 1] = 9.0
    top_k, top_p = [1, v + 1, v - 1, v // 2, 0, 0], [1.0, 0.9, 1.0, 0.5, 1e-6, 1 - 2**-24]
    for logits in (few, hidden, torch.full((v,), -3.25)):
        check(logits.repeat(6, 1), [1.0] * 6, top_k, top_p)


@pytest.mark.skipif(not INTERPRET, reason="the interpreter tells of loads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_passes_find_the_cut(dtype, monkeypatch):
    loaded = []
    monkeypatch.setattr(Monitor, "access", lambda builder, pointer, mask, what: loaded.append((what, mask)))
    torch.manual_seed(0)
    v = 16_384
    check((torch.randn(1, v) * 2).to(dtype), [0.7], [50], [0.9])
    assert sum(int(mask.data.sum()) for what, mask in loaded if what == "load" and mask is not None) <= 20 * v
