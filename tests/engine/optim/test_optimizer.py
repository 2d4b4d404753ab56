"""ShardedAdamW against torch.optim.AdamW: DP ranks, bf16 with fp32 masters, clipping, moving averages."""

import copy
import gc
import math
import weakref

import pytest
import torch
from harness import run_ranks
from layouts import assert_close
from tiny import assemble
from torch import nn
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.shard import replicated

SETTINGS = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
STEPS, ROWS = 4, 8


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    for parameter in model.parameters():
        parameter.shard = replicated(*parameter.shape)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def data(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).float().square().sum() / ROWS


def torch_steps(max_norm: float) -> tuple[nn.Module, dict[str, torch.Tensor], list[float]]:
    """The same training by torch: decay of matrices only, clipping by the global norm; model, averages, norms."""
    model = network()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, **SETTINGS)
    ema, norms = {name: p.data.clone() for name, p in model.named_parameters()}, []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, data(step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        ema = {name: 0.75 * ema[name] + 0.25 * p.data for name, p in model.named_parameters()}
    return model, ema, norms


def sharded_steps(rank: int, world: int, max_norm: float, micro: int = 1, keeps_grads: bool = True):
    """Each DP rank trains on its rows, in micro-batches; returns the whole states and the gradient norms."""
    model, mesh = network(), build_mesh(dp=world)
    optimizer = ShardedAdamW(model, mesh, max_grad_norm=max_norm, ema_decay=0.75, **SETTINGS)
    optimizer.data.keeps_grads = keeps_grads
    norms = []
    for step in range(STEPS):
        assert keeps_grads or not sum(bucket.grad_bytes for bucket in optimizer.buckets)
        rows = data(step).chunk(world)[rank].chunk(micro)
        for number, part in enumerate(rows):
            if number == len(rows) - 1:
                optimizer.data.expect_last_backward()
            loss_of(model, part).backward()
        norms.append(optimizer.step(0.05))
    wholes = assemble(optimizer.entries("net", lambda name, part: name), mesh.world)
    assert all(torch.equal(wholes[f"net/master/{name}"], p.data) for name, p in model.named_parameters())
    return wholes, norms


@pytest.mark.parametrize("max_norm", [0.01, 100.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (4, 1)])
def test_steps_equal_torch_adamw(world, micro, max_norm):
    model, ema, expected_norms = torch_steps(max_norm)
    for wholes, norms in run_ranks(sharded_steps, world, max_norm, micro):
        assert_close(norms, expected_norms)
        for name, parameter in model.named_parameters():
            assert_close(wholes[f"net/master/{name}"], parameter.data)
            assert_close(wholes[f"net/ema/{name}"], ema[name])


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 2)])
def test_gradients_freed_after_each_step_change_no_bit(world, micro):
    kept = run_ranks(sharded_steps, world, 0.01, micro)
    for got, (wholes, norms) in zip(run_ranks(sharded_steps, world, 0.01, micro, False), kept, strict=True):
        assert got[1] == norms and got[0].keys() == wholes.keys()
        assert all(torch.equal(got[0][name], whole) for name, whole in wholes.items())


def test_only_the_model_in_its_update_holds_gradients():
    """Actor and critic take turns; a skipped step frees them too. The buffers have the same sizes every time."""
    models, sizes = [network(), network()], set()
    optimizers = [ShardedAdamW(model, build_mesh(), **SETTINGS) for model in models]
    for optimizer in optimizers:
        optimizer.data.keeps_grads = False

    def held() -> list[int]:
        return [sum(bucket.grad_bytes for bucket in optimizer.buckets) for optimizer in optimizers]

    for step in range(STEPS):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            assert held() == [0, 0]
            loss = loss_of(model, data(step))
            (loss * math.inf if step == 1 else loss).backward()
            assert held()[i] > 0 == held()[1 - i]
            sizes.add(held()[i])
            if step == 1:
                with pytest.raises(FloatingPointError, match="gradient norm"):
                    optimizer.step(0.05)
                optimizer.zero_grad()
            else:
                optimizer.step(0.05)
    assert held() == [0, 0] and len(sizes) == 1


def test_norm_of_a_large_gradient_is_exact():
    """Eight million numbers: one fp32 sum of them would be wrong in the fourth digit."""
    model, mesh = nn.Linear(2048, 4096, bias=False), build_mesh()
    model.weight.shard = replicated(4096, 2048)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = ShardedAdamW(model, mesh, **SETTINGS)
    gradient = torch.rand(4096, 2048, generator=torch.Generator().manual_seed(0)) ** 9
    (model.weight * gradient).sum().backward()
    assert optimizer.step(0.0) == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_bf16_weights_follow_fp32_masters():
    """Steps far below bf16's resolution add up."""
    model, mesh = network(torch.bfloat16), build_mesh()
    start = copy.deepcopy(model.state_dict())
    optimizer = ShardedAdamW(model, mesh, **{**SETTINGS, "weight_decay": 0.0})
    for _ in range(50):
        loss_of(model, data(0).bfloat16()).backward()
        optimizer.step(1e-4)
    wholes = assemble(optimizer.entries("net", lambda name, part: name), mesh.world)
    for name, parameter in model.named_parameters():
        master = wholes[f"net/master/{name}"]
        assert torch.equal(parameter.data, master.bfloat16())
        assert (master - start[name].float()).abs().max() > 2e-3


def test_unused_parameter_keeps_no_earlier_gradient():
    model, mesh = network(), build_mesh()
    optimizer = ShardedAdamW(model, mesh, betas=(0.0, 0.9), weight_decay=0.0)
    loss_of(model, data(0)).backward()
    optimizer.step(0.05)
    last: nn.Parameter = model[2].weight  # pyright: ignore[reportAssignmentType]
    still = last.data.clone()
    model[0](data(1)).square().sum().backward()  # without the last layer
    optimizer.step(0.05)
    assert torch.equal(last.data, still)


def test_deleted_optimizer_is_freed():
    """With its states and the mesh's groups, although the parameters hold its hook."""
    model = network()
    optimizer = ShardedAdamW(model, build_mesh(), **SETTINGS)
    loss_of(model, data(0)).backward()
    optimizer.step(0.05)
    freed = weakref.ref(optimizer), weakref.ref(optimizer.buckets[0])
    del optimizer
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    loss_of(model, data(1)).backward()  # as in any torch model
    assert all(p.grad is not None for p in model.parameters())
