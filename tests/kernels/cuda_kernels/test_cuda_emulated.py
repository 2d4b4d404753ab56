"""CUDA C++ kernels built as C++ for the CPU (emu/cuda_emu.h): their error against float64."""

import ctypes

import pytest
import torch
from accuracy import assert_all_accurate, run
from emu_build import COMPILER, compile_all, link
from trialign.kernels import adamw as A
from trialign.kernels import gae as G
from trialign.kernels import logprob as P
from trialign.kernels import moe as M
from trialign.kernels import rms_norm as N

pytestmark = pytest.mark.skipif(not COMPILER, reason="no g++")
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = 1e-5


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    return ctypes.CDLL(str(link(compile_all(folder, []), folder / "emulated.so", [])))


PASSED = {int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}


def call(function, *arguments):
    """Tensors as pointers, None as null, int and float as the kernel's int64_t and float (the first int: the dtype)."""
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else PASSED[type(a)](a) for a in arguments]
    assert function(*values, ctypes.c_void_p(None)) == 0


def check(actual, fn, inputs, upstream):
    """`actual`: outputs, then the gradients of all inputs."""
    places = range(len(inputs))
    eager, exact = (run(fn, [x.to(t) for x in inputs], places, upstream)[0] for t in (inputs[0].dtype, torch.float64))
    assert_all_accurate(actual, eager, exact)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("n,h", [(1, 1), (3, 70), (17, 576)])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(kernels, n, h, add, dtype):
    torch.manual_seed(h)
    x, residual, g, through = (torch.randn(n, h).to(dtype) for _ in range(4))
    weight = torch.randn(h).to(dtype)
    y, total, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(n)
    plus = (residual, total) if add else (None, None)
    call(kernels.launch_rms_norm, NUMBERS[dtype], x, plus[0], weight, y, plus[1], rstd, n, h, EPS)
    normed = total if add else x
    kernels.rms_norm_blocks.restype = ctypes.c_int64
    grad_x, partial = torch.empty_like(x), torch.full((kernels.rms_norm_blocks(ctypes.c_int64(n)), h), torch.nan)
    through = through if add else None
    call(kernels.launch_rms_norm_backward, NUMBERS[dtype], g, normed, weight, rstd, through, grad_x, partial, n, h)
    grad_weight = partial.sum(0).to(dtype)
    if add:
        fn = lambda x, r, w: N.add_rms_norm_ref(x, r, w, EPS)  # noqa: E731
        check((y, total, grad_x, grad_x, grad_weight), fn, (x, residual, weight), [g, through])
    else:
        check((y, grad_x, grad_weight), lambda x, w: N.rms_norm_ref(x, w, EPS), (x, weight), [g])


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("n,v,shift", [(1, 1, 0.0), (3, 1000, 0.0), (2, 4099, 0.0), (2, 3000, 1e4)])
def test_logprob(kernels, n, v, shift, dtype):
    torch.manual_seed(v)
    logits, labels, scale = (torch.randn(n, v) * 3 + shift).to(dtype), torch.randint(0, v, (n,)), 1.0 if shift else 0.7
    g, ge = torch.randn(n), torch.randn(n)
    stats = torch.zeros(4, n)
    stats[0] = -torch.inf
    half = v // 2  # two pieces of the vocabulary, the second at an address that is not a multiple of 16
    for start, end in ((0, half), (half, v)):
        if end > start:
            piece = (logits[:, start:], labels, n, end - start, v, start, scale)
            call(kernels.launch_logprob_update, NUMBERS[dtype], stats, *piece)
    out = torch.empty_like(logits)
    call(kernels.launch_logprob_backward, NUMBERS[dtype], logits, out, labels, stats, g, ge, n, v, v, 0, scale)
    check((*P.finish(stats), out), lambda x: P.logprob_ref(x, labels, scale), (logits,), [g, ge])
    only = torch.empty_like(logits)
    call(kernels.launch_logprob_backward, NUMBERS[dtype], logits, only, labels, stats, None, ge, n, v, v, 0, scale)
    torch.testing.assert_close(only, P.gradient_ref(logits, labels, stats, None, ge, scale, 0), rtol=2e-2, atol=1e-4)
    call(kernels.launch_logprob_backward, NUMBERS[dtype], logits, logits, labels, stats, g, ge, n, v, v, 0, scale)
    assert torch.equal(out, logits)


def test_logprob_extremes(kernels):
    logits = torch.randn(5, 900)
    logits[0, 100:700] = -torch.inf
    logits[1] = torch.nan
    logits[2, 5] = torch.nan
    logits[3] = -torch.inf
    logits[4, :700] = torch.finfo().min
    stats = torch.zeros(4, 5)
    stats[0] = -torch.inf
    labels = torch.full((5,), 899)
    call(kernels.launch_logprob_update, 0, stats, logits, labels, 5, 900, 900, 0, 1.0)
    logp, entropy = P.finish(stats)
    assert logp.isfinite().tolist() == entropy.isfinite().tolist() == [True, False, False, False, True]
    for row in (0, 4):
        torch.testing.assert_close(stats[:, row], P.stats_ref(logits, labels, 1.0, 0)[:, row])
    assert stats[1, 3] == 0  # a shard of padding adds nothing


@pytest.mark.parametrize("lengths", [[5, 0, 1, 40, 32], [64, 33, 100]])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_gae(kernels, lengths, kept):
    torch.manual_seed(0)
    cu_seqlens, total = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    rewards, values, mask = torch.randn(total), torch.randn(total), torch.rand(total) < kept
    values[~mask] = torch.nan
    actual = torch.empty(total), torch.empty(total)
    call(kernels.launch_gae, rewards, values, mask, cu_seqlens, *actual, len(lengths), 0.99, 0.95)
    eager = G.gae_ref(rewards, values, mask, cu_seqlens, 0.99, 0.95)
    exact = G.gae_ref(rewards.double(), values.double(), mask, cu_seqlens, 0.99, 0.95)
    assert_all_accurate(actual, eager, exact)


@pytest.mark.parametrize("n, k, num", [(0, 2, 3), (1, 1, 1), (700, 3, 20), (1500, 2, 300)])
def test_sort_by_expert(kernels, n, k, num):
    experts = torch.randint(num, (n, k), generator=torch.Generator().manual_seed(0))
    experts[:, 0] = experts[:, 0].clamp(max=max(0, num - 2))
    kernels.sort_by_expert_room.restype = ctypes.c_int64
    room = torch.full((kernels.sort_by_expert_room(ctypes.c_int64(n * k), num),), -1, dtype=torch.int32)
    order, offsets = torch.full((n * k,), -1), torch.full((num + 1,), -1)
    call(kernels.launch_sort_by_expert, experts, room, order, offsets, n * k, num)
    for got, expected in zip((order, offsets), M.sort_by_expert_ref(experts, num), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("n, offset", [(1, 0), (1027, 0), (1027, 1)])  # at 1 no buffer starts at a multiple of 16
@pytest.mark.parametrize("out", [None, *NUMBERS])
def test_adamw(kernels, n, offset, out):
    torch.manual_seed(0)
    buffers = [torch.randn(n + offset)[offset:] for _ in range(2)] + [torch.rand(n + offset)[offset:], torch.randn(n)]
    eager, exact = ([t.to(dtype, copy=True) for t in buffers] for dtype in (torch.float32, torch.float64))
    lr, beta1, beta2, eps, decay, step, scale = 3e-3, 0.9, 0.95, 1e-8, 0.1, 7, 0.37
    for copies in (eager, exact):
        A.adamw_ref_(*copies, None, lr, beta1, beta2, eps, decay, step, scale)
    param = None if out is None else torch.empty(n, dtype=out)
    numbers = (beta1, beta2, 1 - lr * decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, scale)
    call(kernels.launch_adamw, NUMBERS[out or torch.float32], *buffers, param, n, *numbers)
    assert_all_accurate(buffers, eager, exact)
    if param is not None:
        assert torch.equal(param, buffers[0].to(param.dtype))
