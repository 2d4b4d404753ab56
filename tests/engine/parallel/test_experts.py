"""Rows sent to the ranks of their experts and back."""

import pytest
import torch
from harness import run_ranks
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.expert import Dispatch, from_experts, to_experts
from trialign.kernels.moe import sort_by_expert

EXPERTS, HIDDEN = 4, 6


def exchange(rank: int, world: int, case: str, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Sends rows to their experts, multiplies them by 10^expert there, and sends them back; rows there, and sent."""
    mesh = build_mesh(ep=world)
    count = 0 if case == "none of rank 0" and rank == 0 else 5
    choices = torch.randint(EXPERTS, (count, 2), generator=torch.Generator().manual_seed(rank))
    order, offsets = sort_by_expert(torch.full((count, 2), 3) if case == "one expert" else choices, EXPERTS)
    rows = (torch.arange(len(order) * HIDDEN).view(-1, HIDDEN) + 1000.0 * rank).to(dtype).requires_grad_()
    dispatch = Dispatch(offsets, mesh.ep)
    scales = 10.0 ** torch.arange(EXPERTS)
    scale = scales.chunk(world)[rank].repeat_interleave(dispatch.offsets.diff())
    out = from_experts(to_experts(rows, dispatch) * scale[:, None].to(dtype), dispatch)
    out.backward(torch.ones_like(out) * (rank + 1))
    expected = scales.repeat_interleave(offsets.diff())[:, None]
    assert torch.equal(out, rows * expected.to(dtype)) and rows.grad is not None
    assert torch.equal(rows.grad, ((rank + 1) * expected).expand_as(rows).to(dtype))
    return dispatch.offsets.diff().tolist(), offsets.diff().tolist()


@pytest.mark.parametrize("case", ["random", "one expert", "none of rank 0"])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_reach_their_experts_and_return(world, case):
    results = run_ranks(exchange, world, case, torch.float32 if world == 2 else torch.bfloat16)
    arrived = [count for here, _ in results for count in here]
    assert arrived == torch.tensor([sent for _, sent in results]).sum(0).tolist()
