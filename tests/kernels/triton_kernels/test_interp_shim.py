"""Checks of interpreted kernels: planted faults are caught, bf16 rounds as on a GPU, correct kernels pass."""

import os

import pytest
import torch
from implementations import FAULT, INTERPRET, interpreted_only

pytestmark = interpreted_only

if INTERPRET:
    import triton
    import triton.language as tl
    from interp_shim import Monitor

    @triton.jit
    def shifted_copy(x, y, n, shift, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i + shift, mask=i < n), mask=i < n)

    @triton.jit
    def same_address(y, BLOCK: tl.constexpr):
        tl.store(y + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK))

    @triton.jit
    def one_store(y):
        tl.store(y, tl.program_id(0))

    @triton.jit
    def reads_its_neighbor(y, BLOCK: tl.constexpr):
        i = tl.program_id(0)
        tl.store(y + i, tl.load(y + (i + 1) % BLOCK) + 1)

    @triton.jit
    def adds_atomically(y):
        tl.atomic_add(y, 1.0)

    @triton.jit
    def reads_twice(x, y, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i) + tl.load(x + i) + tl.load(x + i * 0))

    @triton.jit
    def bf16_sum(x, y, total, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        a = tl.load(x + i)
        tl.store(y + i, a + a * a)
        tl.store(total, tl.sum(a.to(tl.float32)))

    @triton.jit
    def bf16_dot(a, b, c, BLOCK: tl.constexpr):
        i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        tl.store(c + i * BLOCK + j, tl.dot(tl.load(a + i * BLOCK + j), tl.load(b + i * BLOCK + j)))


def test_triton_version_is_the_requested_one():
    assert triton.__version__ == os.environ.get("TRIALIGN_EXPECT_TRITON", triton.__version__)


def test_correct_kernel_passes():
    x, y = torch.randn(100), torch.zeros(100)
    shifted_copy[(4,)](x, y, 100, 0, 32)
    assert torch.equal(x, y)
    adds_atomically[(5,)](y := torch.zeros(1))
    assert y.item() == 5  # atomics are no race


@pytest.mark.parametrize(
    "launch, message",
    [
        (lambda: shifted_copy[(4,)](torch.randn(100), torch.zeros(100), 100, 1, 32), "load of 4 bytes out of bounds"),
        (lambda: shifted_copy[(4,)](torch.randn(100), torch.zeros(100), 100, -1, 32), "load of 4 bytes out of bounds"),
        (lambda: same_address[(1,)](torch.zeros(16, dtype=torch.int32), 16), "two lanes of program"),
        (lambda: one_store[(3,)](torch.zeros(1, dtype=torch.int32)), "stores to an address .* also stores to"),
        (lambda: reads_its_neighbor[(4,)](torch.zeros(4), 4), "another one"),
        (lambda: adds_atomically[(1, 65536)](torch.zeros(1)), "axes 1 and 2 stop at 65535"),
    ],
)
def test_planted_faults_are_caught(launch, message):
    with pytest.raises(FAULT, match=message):
        launch()


def test_traffic_of_a_launch_is_counted(monkeypatch):
    monkeypatch.setattr(Monitor, "counting", True)
    shifted_copy[(4,)](torch.randn(100), torch.zeros(100), 100, 0, 32)
    assert Monitor.traffic() == (400, 400, 800)
    reads_twice[(4,)](torch.randn(128), torch.zeros(128, dtype=torch.bfloat16), 32)
    assert Monitor.traffic() == (2 * 512 + 4 * 4, 256, 512 + 256)  # one address of all lanes is a single load


def test_bf16_arithmetic_rounds_to_nearest():
    x = torch.randn(64).bfloat16()
    y, total = torch.empty_like(x), torch.zeros(1)
    bf16_sum[(1,)](x, y, total, 64)
    exact = x.double() + x.double() ** 2
    assert ((y.double() - exact).abs() <= 2**-7 * exact.abs() + 2**-7 * (x.double() ** 2)).all()
    assert torch.allclose(total, x.float().sum(), atol=1e-5)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    c = torch.empty(16, 16)
    bf16_dot[(1,)](a, b, c, 16)
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-5)
