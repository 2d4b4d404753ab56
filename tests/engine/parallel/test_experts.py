"""Expert parallelism below the model: rows to their experts and back, and the optimizer's buckets of experts."""

from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import assemble
from torch import Tensor, nn
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.expert import Dispatch, ExpertLinear, from_experts, to_experts
from trialign.engine.parallel.shard import replicated, sharded_parameter
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


class Net(nn.Module):
    """One matrix that all ranks hold and two for each expert."""

    def __init__(self, mesh):
        super().__init__()
        self.all = nn.Linear(1, 1, bias=False)
        self.all.weight = sharded_parameter(replicated(3, HIDDEN), dtype=torch.float32, device=mesh.device)
        self.experts = ExpertLinear(EXPERTS, HIDDEN, {"a": 4, "b": 2}, 0, mesh, torch.float32)
        generator = torch.Generator().manual_seed(0)
        wholes = {"": torch.randn(3, HIDDEN, generator=generator)}
        for e in range(EXPERTS):
            for part, out in (("a", 4), ("b", 2)):
                wholes[f"{e}.{part}"] = torch.randn(out, HIDDEN, generator=generator)
        for p in self.parameters():
            p.data.copy_(torch.cat([wholes[piece.part][_slices(piece)] for piece in p.shard.pieces]))  # pyright: ignore


def _slices(piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))


def steps(rank: int, world: int, sizes: dict[str, Any], frozen: bool = False):
    """Two optimizer steps on a sum over eight rows, split over the DP ranks; the whole states, the norms."""
    mesh = build_mesh(**sizes)
    net = Net(mesh)
    net.all.weight.requires_grad_(not frozen)
    optimizer = ShardedAdamW(net, mesh, weight_decay=0.1, max_grad_norm=0.5, eps=1e-5, ema_decay=0.5)
    norms = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, HIDDEN, generator=generator).chunk(mesh.dp.size)[mesh.dp.rank]
        experts = torch.randint(EXPERTS - 1, (8, 1), generator=generator).chunk(mesh.dp.size)[mesh.dp.rank]
        order, offsets = sort_by_expert(experts, EXPERTS)
        dispatch = Dispatch(offsets, mesh.ep)
        optimizer.data.expect_last_backward()
        out = net.experts(
            to_experts(x[order], dispatch), dispatch.offsets
        )  # [rows here, 6/tp]: the loss is a sum over it
        shared = (x @ net.all.weight.t()).square().sum()
        (out.sin().sum() + shared).backward()
        norms.append(optimizer.step(0.05))
    return assemble(optimizer.entries("net", lambda name, part: f"{name}:{part}"), mesh.world), norms


@pytest.mark.parametrize("sizes", [{"ep": 4}, {"dp": 4, "ep": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_optimizer_steps_equal_one_process(sizes):
    expected, norms = steps(0, 1, {})
    world = sizes.get("tp", 1) * sizes.get("dp", sizes.get("ep", 1))
    for got, got_norms in run_ranks(steps, world, sizes):
        assert got_norms == pytest.approx(norms, rel=1e-6)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_parameters_have_no_optimizer_states():
    for got, _ in run_ranks(steps, 2, {"ep": 2}, True):
        assert len(got) == 4 * 2 * EXPERTS and not any("all.weight" in name for name in got)
