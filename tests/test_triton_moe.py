"""The Triton kernels of mixture of experts: the reference's sort, the products under the law, empty experts too."""

import pytest
import torch
from kernel_law import assert_law
from trialign.kernels.moe import (
    grouped_matmul_ref,
    grouped_matmul_triton,
    grouped_outer_ref,
    grouped_outer_triton,
    sort_by_expert_ref,
    sort_by_expert_triton,
)
from triton_case import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("n, k, num", [(0, 2, 3), (1, 1, 1), (150, 2, 8), (90, 3, 20)])
def test_sort_by_expert(n, k, num):
    experts = torch.randint(num, (n, k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for got, right in zip(sort_by_expert_triton(experts, num), sort_by_expert_ref(experts, num), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts, h, f", [([3, 0, 70, 1], 24, 40), ([0, 0], 16, 16), ([33], 40, 130)])
def test_grouped_products(dtype, counts, h, f):
    torch.manual_seed(0)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    x = torch.randn(sum(counts), h, device=DEVICE).to(dtype)
    grad = torch.randn(sum(counts), f, device=DEVICE).to(dtype)
    weight = torch.randn(len(counts), h, f, device=DEVICE).to(dtype)
    turned = weight.transpose(1, 2)
    wide = [t.double() for t in (x, grad, weight)]
    for got, eager, exact in (
        (
            grouped_matmul_triton(x, weight, offsets),
            *(grouped_matmul_ref(a, w, offsets) for a, w in ((x, weight), (wide[0], wide[2]))),
        ),
        (
            grouped_matmul_triton(grad, turned, offsets),
            grouped_matmul_ref(grad, turned, offsets),
            grouped_matmul_ref(wide[1], wide[2].transpose(1, 2), offsets),
        ),
        (
            grouped_outer_triton(x, grad, offsets),
            grouped_outer_ref(x, grad, offsets),
            grouped_outer_ref(wide[0], wide[1], offsets),
        ),
    ):
        assert_law(got, eager, exact)
