"""Rows sent to the ranks of their experts and back."""

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.expert import Dispatch, from_experts, to_experts
from trialign.kernels.moe import sort_by_expert

EXPERTS, HIDDEN = 4, 6


def choices(case: str, rows: int, rank: int) -> Tensor:
    """[rows, 2] experts each row goes to."""
    if case == "none here":
        rows = rows if rank else 0
    if case == "one expert":
        return torch.full((rows, 2), 3)
    return torch.randint(EXPERTS, (rows, 2), generator=torch.Generator().manual_seed(rank))


def travel(rank: int, world: int, case: str, dtype: torch.dtype):
    """Sends rows to their experts, multiplies them by 10^expert there, and sends them back."""
    mesh = build_mesh(ep=world)
    order, offsets = sort_by_expert(choices(case, 5, rank), EXPERTS)
    rows = (torch.arange(len(order) * HIDDEN).view(-1, HIDDEN) + 1000.0 * rank).to(dtype).requires_grad_()
    dispatch = Dispatch(offsets, mesh.ep)
    here = to_experts(rows, dispatch)
    local = EXPERTS // world
    scale = 10.0 ** torch.arange(rank * local, (rank + 1) * local).repeat_interleave(dispatch.offsets.diff())
    out = from_experts(here * scale[:, None].to(dtype), dispatch)
    out.backward(torch.ones_like(out) * (rank + 1))
    counts = offsets.diff()
    expected = 10.0 ** torch.arange(EXPERTS).repeat_interleave(counts)[:, None]
    assert torch.equal(out, rows * expected.to(dtype))
    assert rows.grad is not None
    assert torch.equal(rows.grad, ((rank + 1) * expected).expand_as(rows).to(dtype))
    return dispatch.offsets.diff().tolist(), counts.tolist()


@pytest.mark.parametrize("case", ["random", "one expert", "none here"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_reach_their_experts_and_return(world, case):
    results = run_ranks(travel, world, case, torch.float32 if world == 2 else torch.bfloat16)
    arrived = [count for here, _ in results for count in here]
    assert arrived == torch.tensor([sent for _, sent in results]).sum(0).tolist()
