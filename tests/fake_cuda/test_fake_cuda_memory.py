"""Memory on a fake CUDA device: what outlives an update, sizes of large buffers, the report of a full device."""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=64))


def learners(folder: str) -> tuple:
    """Actor and critic of a folder, and the profiler they report to."""
    from trialign.algorithms.config.common import OptimizerConfig
    from trialign.algorithms.roles.build import build_decoder, build_learner
    from trialign.engine.mesh import build_mesh
    from trialign.engine.profiler import Profiler
    from trialign.models.families.registry import read_config

    mesh = build_mesh(device="cuda")
    profiler, shape = Profiler(mesh), read_config(folder)
    both = []
    for _ in range(2):
        model = build_decoder(folder, shape, mesh, "bfloat16", trained=True)
        assert model.recompute  # by default on CUDA
        both.append(build_learner(model, OptimizerConfig(), 10, profiler=profiler))
    return *both, profiler


def batches(count: int) -> list:
    """Batches of different lengths, as steps have them."""
    from trialign.algorithms.batch import pack

    return [pack([list(range(2, 12 + 5 * i))] * 3).to(torch.device("cuda")) for i in range(count)]


def updates(folder: str) -> tuple[list[dict[str, int]], list[Counter], int]:
    """Gradients held after every update, sizes that the gradients of each took, and the gradients of one model."""
    from fake_device import LEDGER
    from trialign.algorithms.sft import sft_step

    actor, critic, profiler = learners(folder)
    held, sizes = [], []
    for batch in batches(3):
        for learner in (critic, actor):
            with LEDGER.recording() as allocations:
                sft_step(learner, batch)
            own = [a for a in allocations if a.line.startswith("engine/parallel/data.py") and a.bytes > 0]
            freed = {a.address for a in allocations if a.bytes < 0}
            sizes.append(Counter(a.bytes for a in own if a.bytes > 10_000))
            held.append(profiler.memory.held() | {"alive": sum(a.bytes for a in own if a.address not in freed)})
    return held, sizes, sum(4 * len(bucket.weights) for bucket in actor.optimizer.buckets)


def test_gradients_end_with_their_update_and_keep_their_sizes(fake, folder):
    ((held, sizes, gradients),) = fake.call(updates, folder)
    assert all(found["gradients"] == found["alive"] == 0 < found["optimizer"] for found in held)
    assert sum(size * count for size, count in sizes[0].items()) > 0.9 * gradients
    assert all(found == sizes[0] for found in sizes)


def rollouts(folder: str) -> tuple[list[list[int]], int]:
    """Sizes of the caches of rollouts with prompts of different lengths, and what the last one has left."""
    from fake_device import LEDGER
    from trialign.engine.generation.embedded import EmbeddedGenerator
    from trialign.engine.generation.interface import SamplingParams

    actor, _, profiler = learners(folder)
    generator = EmbeddedGenerator(actor.model, actor.mesh, max_running=4, max_length=64, profiler=profiler)
    sizes = []
    for length in (3, 20):
        with LEDGER.recording() as allocations:
            generator.generate([[5] * length] * 2, [0, 1], SamplingParams(temperature=1.0, max_new_tokens=4))
        sizes.append([a.bytes for a in allocations if a.line.startswith("engine/generation/kv_cache.py")])
    return sizes, profiler.memory.held()["cache"]


def test_cache_has_one_size_and_ends_with_the_rollout(fake, folder):
    (((first, second), left),) = fake.call(rollouts, folder)
    assert max(first) == max(second) > 0 and left == 0


def too_small(folder: str) -> list[str]:
    """The notes of an error in an update, on a device that has room for a part of the gradients."""
    from fake_device import LEDGER
    from trialign.algorithms.config.memory import memory_options
    from trialign.algorithms.config.scripts import SCRIPTS
    from trialign.algorithms.sft import sft_step
    from trialign.engine.config import flatten

    actor, _, profiler = learners(folder)
    values: Any = flatten(SCRIPTS["ppo"]())
    profiler.memory.options = lambda phase, holder: memory_options(values, phase, holder)
    (batch,) = batches(1)
    sft_step(actor, batch)
    LEDGER.capacity = LEDGER.live + sum(4 * len(bucket.weights) for bucket in actor.optimizer.buckets)
    try:
        with profiler("update"):
            sft_step(actor, batch)
    except torch.OutOfMemoryError as error:
        return error.__notes__
    raise AssertionError("no error")


def test_report_at_the_capacity_of_the_device(fake, folder):
    (((note,),),) = [fake.call(too_small, folder)]
    first, held, *advice = note.splitlines()
    assert first.startswith("out of memory in phase update: asked for ") and " cuda has " in first
    asking = "gradients" if " of gradients;" in first else "activations"
    numbers = dict(part.rsplit(" ", 2)[:2] for part in held.removeprefix("held: ").split(" (")[0].split(", "))
    assert float(numbers["parameters"]) > 0 < float(numbers["optimizer"]) and float(numbers["cache"]) == 0
    assert advice[0].startswith(f"{asking} would be lowered by ") and "parallel.tp=1" in advice[0]
