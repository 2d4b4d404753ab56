"""Pipeline runner: an optimizer step under other schedules and chunks of layers equals that of one process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import run_ranks
from layouts import assert_close
from peft_case import build, samples
from schedules import gpipe, interleaved, split_backward
from tiny import assemble, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import shapes, stage_forward, target_logprobs
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.lora import LoRA
from trialign.engine.pipeline.runner import run_schedule
from trialign.engine.pipeline.schedule import Action, one_f_one_b
from trialign.engine.pipeline.stage import Chunk, stage_of
from trialign.models.families.registry import read_config
from trialign.models.lora import trained_name
from trialign.models.moe import Routing


class Case(NamedTuple):
    """Settings of an optimizer step: `layout` of build_mesh, `sizes` and `chunks` of stage_of."""

    schedule: Callable[[int, int, int], list[Action]] = one_f_one_b
    layout: dict[str, Any] = {}
    sizes: tuple[int, ...] = ()
    chunks: int = 1
    recompute: bool = False
    lora: LoRA | None = None


def one_step(rank: int, world: int, folder: Path, case: Case) -> tuple[dict[str, Tensor], float]:
    """Whole states after a step over four micro-batches a DP rank, and the gradient norm."""
    mesh = build_mesh(**case.layout)
    stage = stage_of(mesh, read_config(folder).num_layers, case.sizes, case.chunks)
    model = build(folder, mesh, case.lora, recompute=case.recompute, stage=stage)
    optimizer = ShardedAdamW(model, mesh, tied=model.tied_parameter(), eps=1e-3, max_grad_norm=0.5)
    rows = samples(model.config.vocab_size)
    parts = [pack(rows[i::4][mesh.dp.rank :: mesh.dp.size]) for i in range(4)]
    total = sum(len(row) - 1 for row in rows)
    routings = [Routing(part.cu_seqlens, 1e-3) if model.config.moe else None for part in parts]

    def forward(chunk: Chunk, i: int, x: Tensor | None) -> Tensor:
        hidden = stage_forward(model, parts[i], x, routings[i], chunk)
        return -target_logprobs(model, parts[i], hidden, 1.0)[0].sum() / total if chunk.has_head else hidden

    last = optimizer.data.expect_last_backward
    run_schedule(case.schedule, stage, mesh, shapes(model, parts), model.dtype, forward, last)
    norm = optimizer.step(1e-2)
    names = partial(trained_name, config=model.config, head=model.kind)
    return assemble(optimizer.entries("actor", names), mesh.world), norm


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pipeline"), tied=request.param, num_hidden_layers=5)


def assert_steps_agree(folder: Path, case: Case, world: int) -> None:
    expected = one_step(0, 1, folder, Case(lora=case.lora))
    for got in run_ranks(one_step, world, folder, case) if world > 1 else [one_step(0, 1, folder, case)]:
        assert_close(got, expected)


PP = {"pp": 2}
CASES = {
    "sizes": (Case(one_f_one_b, {"pp": 3}, (1, 3, 1)), 3),
    "gpipe": (Case(gpipe, PP), 2),
    "interleaved-tp-dp": (Case(interleaved, {"pp": 2, "dp": 2}, (1, 1, 1, 2), 2), 4),
    "chunks-of-one-rank": (Case(partial(interleaved, chunks=3), {}, chunks=3), 1),
    "split-tp-recompute": (Case(split_backward, {"pp": 2, "tp": 2}, recompute=True), 4),
    "part-of-the-ranks": (Case(one_f_one_b, {"pp": 2, "ranks": (0, 2)}), 3),
    "adapters": (Case(split_backward, PP, lora=LoRA(4, 8.0, ("all",))), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_step_equals_one_process(name, folder):
    assert_steps_agree(folder, *CASES[name])


@pytest.mark.parametrize("schedule", [one_f_one_b, split_backward], ids=["1f1b", "split"])
def test_router_losses_of_uneven_stages(schedule, tmp_path):
    """Gradients of router losses start within the pipeline, in both parts of a backward."""
    folder = tiny_mixtral(tmp_path, num_hidden_layers=3)
    assert_steps_agree(folder, Case(schedule, {"pp": 2, "ep": 2}), 4)
