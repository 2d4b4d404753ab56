"""The head by chunks: accuracy over chunks, shards of the vocabulary, memory, extreme logits, frozen inputs."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from accuracy import check_accuracy
from implementations import DTYPES, by_mode, cpp_only, device  # noqa: F401 (a fixture)
from planted import planted
from test_logprob import LEAST, merge_of
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels import linear_logprob as L
from trialign.kernels.linear_logprob import linear_logprob, linear_logprob_ref


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of the vocabulary, in tests that stay small."""
    monkeypatch.setattr(L, "CHUNK_ELEMENTS", dict.fromkeys(L.CHUNK_ELEMENTS, 1))  # 1024 columns, the least


def draw(n, h, v, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n, h).to(dtype), (torch.randn(v, h) * 2 * h**-0.5).to(dtype), torch.randint(0, v, (n,))


def check(hidden, weight, labels, scale=1.0, module=L):
    fn, ref = (lambda x, w, f=f: f(x, w, labels, scale) for f in (module.linear_logprob, linear_logprob_ref))
    check_accuracy(fn, ref, (hidden, weight), (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, h, v",
    by_mode(
        [(1, 1, 1), (5, 64, 1024), (70, 65, 5003), (40, 33, 2049), (16, 8, 151936), (0, 8, 30)],
        [(1, 1, 1), (3, 40, 300), (66, 70, 1100), (0, 8, 30)],
    ),
)
def test_error_against_float64(small_chunks, n, h, v, dtype):
    check(*draw(n, h, v, dtype), 0.7)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_error_with_huge_logits(small_chunks, size):
    hidden, weight, labels = draw(4, 8, 2100)
    weight[:, 0], hidden[:, 0] = size, torch.tensor([1.0, -1.0, 1.0, 0.0])
    check(hidden, weight, labels)


@pytest.mark.parametrize("mask, masked", [(-torch.inf, slice(1000, 2000)), (LEAST, slice(0, 600))])
def test_masked_vocabulary_weighs_nothing(small_chunks, mask, masked):
    """Whole tiles of masked logits, and a NaN, which has to come out."""
    hidden, weight, labels = torch.ones(3, 1), torch.randn(2100, 1), torch.tensor([700, 2099, 650])
    weight[masked] = mask
    actual, expected = linear_logprob(hidden, weight, labels), linear_logprob_ref(hidden, weight, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight[2050] = torch.nan
    assert not any(part.isfinite().any() for part in linear_logprob(hidden, weight, labels))


@pytest.mark.parametrize("v, last", [(49153, [(49152, 49153)]), (49152, []), (40, [(0, 40)])])
def test_gpu_chunks_end_at_whole_tiles(v, last):
    with FakeTensorMode():
        chunks, _ = L._chunks(torch.empty(8192, 4, device="cuda"), torch.empty(v, 4, device="cuda"))
    tiled = v // 64 * 64
    assert chunks == [(a, min(a + 8192, tiled)) for a in range(0, tiled, 8192)] + last


# The last: a rank without a part of a small vocabulary.
@pytest.mark.parametrize("bounds", [[0, 1500, 3001], [0, 1030, 1031, 3001], [0, 0, 700, 1300]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_vocabulary_shards_equal_the_whole(small_chunks, bounds, dtype, wanted):
    hidden, weight, labels = draw(7, 24, bounds[-1], dtype)
    labels[:2] = torch.tensor([0, bounds[-1] - 1])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    pick = lambda outputs: [o for o, each in zip(outputs, wanted, strict=True) if each]  # noqa: E731
    whole, upstream = linear_logprob_ref(*leaves, labels, 0.8), pick(torch.randn(2, 7, dtype=dtype))
    grad_hidden, grad_weight = torch.autograd.grad(pick(whole), leaves, upstream)
    parts = [(a, weight[a:b].detach().requires_grad_()) for a, b in pairwise(bounds)]
    seen: list[torch.Tensor] = []
    for start, part in parts:
        linear_logprob(hidden, part, labels, 0.8, merge=lambda s: seen.append(s) or s, vocab_start=start)
    merged, partial = merge_of(seen), torch.zeros_like(hidden)
    for start, part in parts:
        outputs = linear_logprob(hidden, part, labels, 0.8, merge=lambda _: merged, vocab_start=start)
        torch.testing.assert_close(outputs, whole, rtol=1e-5, atol=1e-5)
        d_hidden, d_weight = torch.autograd.grad(pick(outputs), (hidden, part), upstream)
        partial += d_hidden
        torch.testing.assert_close(d_weight, grad_weight[start : start + len(part)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(partial, grad_hidden, rtol=1e-4, atol=1e-5)


PEAK = """
import torch
from trialign.kernels import linear_logprob as L

def status(key):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) * 1024

def run(fn, n, h, v):
    hidden, weight = (torch.randn(rows, h).bfloat16().requires_grad_() for rows in (n, v))
    labels = torch.randint(0, v, (n,))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    start = status("VmRSS")
    logprob, entropy = fn(hidden, weight, labels)
    (logprob.sum() + entropy.sum()).backward()
    return status("VmHWM") - start - 2 * (hidden.numel() + weight.numel())

for fn in (L.linear_logprob, L.linear_logprob_ref):
    run(fn, 8, 64, 1024)
    print(run(fn, 512, 64, 49152))
"""


@cpp_only
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_below_a_twentieth_of_whole_logits():
    """Memory above the inputs and their gradients, in a process of its own."""
    command, env = [sys.executable, "-W", "ignore", "-c", PEAK], os.environ | {"OMP_NUM_THREADS": "1"}
    fused, whole = map(int, subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split())
    assert 0 < fused < 0.05 * whole, (fused, whole)


FAULTS = {
    "a chunk replaces the sum": ("total += grad @ weight", "total.copy_(grad @ weight)"),
    "a missing chunk": ("list(pairwise(bounds))", "list(pairwise(bounds))[:-1]"),
    "every chunk's labels from the first": (
        "logits, labels, scale, vocab_start + start",
        "logits, labels, scale, vocab_start",
    ),
}


@cpp_only
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(small_chunks, name, tmp_path, monkeypatch):
    faulty = planted(L, *FAULTS[name], tmp_path, monkeypatch)
    faulty.CHUNK_ELEMENTS = L.CHUNK_ELEMENTS
    with pytest.raises(AssertionError):
        check(*draw(3, 40, 2300), module=faulty)
