"""A checkpoint of a model with experts resumes in any other layout as in its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import Layout, assert_close
from tiny import VOCAB, assemble
from tiny_moe import SHARED, moe_config, moe_decoder
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import target_logprobs
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.storage import checkpoint

LAYOUTS = [Layout(), Layout(dp=4, ep=4), Layout(dp=4, ep=2), Layout(tp=2, dp=2, ep=2), Layout(pp=2, dp=2, ep=2)]


def run(rank: int, world: int, layout: Layout, root: Path, load: Path | None, save: int | None) -> tuple[Any, Any]:
    """Optionally loads, makes one step, optionally saves; the step's metrics and the whole states after it."""
    mesh = layout.mesh()
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
def saved(request, tmp_path_factory) -> tuple[Path, Any]:
    """A checkpoint after one step, and the result of the second step in the same layout."""
    root, layout = tmp_path_factory.mktemp("checkpoint"), LAYOUTS[request.param]
    run_ranks(run, layout.world, layout, root, None, 1)
    return root / "step_1", run_ranks(run, layout.world, layout, root, root / "step_1", None)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_next_step_is_the_same_in_every_layout(saved, layout, tmp_path):
    for got in run_ranks(run, layout.world, layout, tmp_path, saved[0], None):
        assert_close(got, saved[1])
