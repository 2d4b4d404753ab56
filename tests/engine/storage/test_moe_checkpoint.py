"""A checkpoint of a model with experts goes on in any other ep layout as if it had been written there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import VOCAB, assemble
from tiny_moe import SHARED, moe_config, moe_decoder
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import target_logprobs
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.storage import checkpoint

LAYOUTS: list[dict[str, Any]] = [{}, {"ep": 4}, {"dp": 4, "ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2, "ep": 2}]


def world_of(sizes: dict[str, Any]) -> int:
    return sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", sizes.get("ep", 1))


def run(rank: int, world: int, sizes: dict[str, Any], root: Path, load: Path | None, save: int | None):
    """Optionally loads, makes one step, optionally saves; metrics of the step and the whole states after it."""
    mesh = build_mesh(**sizes)
    model = moe_decoder(moe_config(SHARED), mesh)
    optimizer = ShardedAdamW(model, mesh, eps=1e-5, ema_decay=0.5)

    def entries():
        return optimizer.entries("actor", lambda name, part: f"{name}:{part}")

    if load is not None:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        optimizer.restore(checkpoint.load(load, entries(), mesh)["steps"])
    generator = torch.Generator().manual_seed(7)
    batch = pack([torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 9, 3, 14)])

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(model, part, hidden, 1.0)[0].sum() / len(batch.response)

    learner = Learner(model, optimizer, lambda step: 1e-3, sizes=UpdateConfig(micro_batch_size=1))
    metrics = learner.step(batch, loss)
    if save is not None:
        checkpoint.save(root, save, entries(), {"steps": optimizer.steps}, mesh, keep=1, assets={})
    return metrics, assemble(entries(), mesh.world)


@pytest.fixture(scope="module", params=[1, 3], ids=lambda i: f"from {LAYOUTS[i]}")
def saved(request, tmp_path_factory):
    """A checkpoint after one step, and what the second step gives where it was written."""
    root, sizes = tmp_path_factory.mktemp("checkpoint"), LAYOUTS[request.param]
    run_ranks(run, world_of(sizes), sizes, root, None, 1)
    return root / "step_1", run_ranks(run, world_of(sizes), sizes, root, root / "step_1", None)[0]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_the_next_step_is_the_same_in_every_layout(saved, sizes, tmp_path):
    path, (metrics, states) = saved
    for got, theirs in run_ranks(run, world_of(sizes), sizes, tmp_path, path, None):
        assert got == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert theirs.keys() == states.keys()
        for name, tensor in states.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5 * tensor.abs().max().item(), msg=name)
