"""The fused head: the law over chunks, shards of the vocabulary, memory, extreme logits, frozen inputs."""

import os
import subprocess
import sys

import pytest
import torch
from law import check_law
from test_logprob import merge_of
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels import linear_logprob as L
from trialign.kernels.dispatch import has_op
from trialign.kernels.linear_logprob import linear_logprob, linear_logprob_ref


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(L, "CHUNK_ELEMENTS", dict.fromkeys(L.CHUNK_ELEMENTS, 1))  # chunks of 1024, the least


def draw(n, h, v, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype)
    weight = (torch.randn(v, h, generator=generator) * 2 * h**-0.5).to(dtype)
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n,h,v", [(1, 1, 1), (5, 64, 1024), (70, 65, 5003), (40, 33, 2049), (2, 8, 151936), (0, 8, 30)]
)
def test_law(small_chunks, n, h, v, dtype):
    hidden, weight, labels = draw(n, h, v, dtype)
    check_law(
        lambda x, w: linear_logprob(x, w, labels, 0.7),
        lambda x, w: linear_logprob_ref(x, w, labels, 0.7),
        (hidden, weight),
        (0, 1),
    )


@pytest.mark.parametrize("n,v,count", [(1, 1, 1), (1, 49152, 1), (512, 49152, 24), (1 << 22, 3000, 3), (0, 10, 1)])
def test_chunks_cover_the_vocabulary_once(n, v, count):
    chunks, work = L._chunks(torch.empty(n, 4, device="meta"), torch.empty(v, 4, device="meta"))
    assert work.numel() == n * max(b - a for a, b in chunks) <= max(L.CHUNK_ELEMENTS["cpu"], 1024 * n)
    assert chunks[0][0] == 0 and chunks[-1][1] == v and len(chunks) == count
    assert all(a[1] == b[0] for a, b in zip(chunks, chunks[1:], strict=False))


@pytest.mark.parametrize("v,last", [(49153, [(49152, 49153)]), (49152, []), (40, [(0, 40)])])
def test_on_a_gpu_what_is_past_the_last_tile_is_a_chunk_of_its_own(v, last):
    with FakeTensorMode():
        chunks, _ = L._chunks(torch.empty(8192, 4, device="cuda"), torch.empty(v, 4, device="cuda"))
    tiled = v // 64 * 64
    assert chunks == [(a, min(a + 8192, tiled)) for a in range(0, tiled, 8192)] + last


# The last one: a rank that has no part of a small vocabulary.
@pytest.mark.parametrize("cuts", [[0, 1500], [0, 1030, 1031], [0, 0, 1500]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vocabulary_shards_make_the_whole(small_chunks, cuts, dtype):
    hidden, weight, labels = draw(11, 24, 3001, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    upstream = list(torch.randn(2, 11, dtype=dtype))
    whole = linear_logprob(hidden, weight, labels, 0.8)
    grad_hidden, grad_weight = torch.autograd.grad(whole, (hidden, weight), upstream)
    parts = [weight[a:b].detach().requires_grad_() for a, b in zip(cuts, [*cuts[1:], 3001], strict=True)]
    met: list[torch.Tensor] = []
    for part, start in zip(parts, cuts, strict=True):
        linear_logprob(hidden, part, labels, 0.8, merge=lambda s: met.append(s) or s, vocab_start=start)
    merged, partial = merge_of(met), torch.zeros_like(hidden)
    for part, start, cut in zip(parts, cuts, grad_weight.split([len(p) for p in parts]), strict=True):
        outputs = linear_logprob(hidden, part, labels, 0.8, merge=lambda _: merged, vocab_start=start)
        torch.testing.assert_close(outputs, whole, rtol=1e-5, atol=1e-5)
        d_hidden, d_weight = torch.autograd.grad(outputs, (hidden, part), upstream)
        partial += d_hidden
        torch.testing.assert_close(d_weight, cut, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(partial, grad_hidden, rtol=1e-4, atol=1e-5)


def test_equals_logprob_of_the_logits(small_chunks):
    hidden, weight, labels = draw(40, 32, 4000)
    torch.testing.assert_close(
        linear_logprob(hidden, weight, labels), linear_logprob_ref(hidden, weight, labels), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(small_chunks, frozen):
    hidden, weight, labels = draw(4, 8, 1500)
    leaf = (weight if frozen == "hidden" else hidden).requires_grad_()
    logp, entropy = linear_logprob(hidden, weight, labels)
    (logp + entropy).sum().backward()
    truth = linear_logprob_ref(hidden, weight, labels)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(truth[0].sum() + truth[1].sum(), leaf)[0])
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_gradcheck(small_chunks):
    hidden, weight, labels = draw(3, 4, 11, torch.float64)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob(x, w, labels, 1.4), inputs)


def test_extreme_logits(small_chunks):
    hidden, weight, labels = draw(4, 8, 2100)
    weight[:, 0], hidden[:, 0] = 1e4, torch.tensor([1.0, -1.0, 1.0, 0.0])
    check_law(
        lambda x, w: linear_logprob(x, w, labels),
        lambda x, w: linear_logprob_ref(x, w, labels),
        (hidden, weight),
        (0, 1),
    )
    one, padded = torch.ones(2, 1), torch.randn(2100, 1)
    padded[1000:2000] = -torch.inf
    labels = torch.tensor([0, 2099])
    torch.testing.assert_close(linear_logprob(one, padded, labels), linear_logprob_ref(one, padded, labels))
    padded[2050] = torch.nan
    assert not any(part.isfinite().any() for part in linear_logprob(one, padded, labels))


PEAK = """
import torch
from trialign.kernels import linear_logprob as L
from trialign.kernels.dispatch import has_op

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not has_op("logprob_update_"), reason="trialign._C is not built")
def test_the_peak_is_below_a_twentieth_of_the_whole_logits_way():
    """Memory above the inputs and the gradients that are asked for, in a process that does nothing else."""
    command, env = [sys.executable, "-W", "ignore", "-c", PEAK], os.environ | {"OMP_NUM_THREADS": "1"}
    ours, eager = map(int, subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split())
    assert 0 < ours < 0.05 * eager, (ours, eager)


def test_scale_is_checked():
    with pytest.raises(ValueError, match="positive, got -1"):
        linear_logprob(*draw(1, 2, 3), scale=-1.0)


def test_fake_and_meta_runs():
    with FakeTensorMode():
        hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
        logp, entropy = linear_logprob(hidden, weight, torch.zeros(4, dtype=torch.long))
        (logp.sum() + entropy.sum()).backward()
        assert weight.grad is not None and weight.grad.shape == (5000, 8)
        # On CUDA the Triton kernels' own fakes: no GPU is asked for.
        hidden, weight = torch.empty(4, 8, device="cuda"), torch.empty(5000, 8, device="cuda")
        stats = L.linear_logprob_stats(hidden, weight, torch.zeros(4, dtype=torch.long, device="cuda"), 1.0, 0)
        assert stats.shape == (4, 4) and stats.device.type == "cuda"
    meta = torch.empty(20_000, 64, device="meta"), torch.empty(151_936, 64, device="meta")
    assert linear_logprob(*meta, torch.zeros(20_000, dtype=torch.long, device="meta"))[0].shape == (20_000,)
