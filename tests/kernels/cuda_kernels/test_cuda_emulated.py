"""CUDA C++ kernels built as C++ for the CPU (emu/cuda_emu.h): their error against float64."""

import ctypes

import pytest
import torch
from accuracy import assert_all_accurate, run
from emu_build import COMPILER, compile_all, link
from trialign.kernels import logprob as P
from trialign.kernels import moe as M

pytestmark = pytest.mark.skipif(not COMPILER, reason="no g++")
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
