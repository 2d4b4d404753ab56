"""Memory by holder, and the report of a failed allocation; tests/launch/test_out_of_memory.py lets scripts fail."""

import errno
import gc

import pytest
import torch
from torch import nn
from trialign.algorithms.config.memory import OPTIONS, memory_options
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.engine.config import flatten
from trialign.engine.memory import (
    HOLDERS,
    MemoryHolders,
    allocating,
    is_allocation_failure,
    requested_bytes,
    usage_of,
)
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.shard import replicated

CPU = torch.device("cpu")
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free."
)


def too_much() -> Exception:
    """The error of torch's CPU allocator."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    return caught.value


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), 5 * 2**29),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 20 * 2**20),
        (too_much(), 2**48),
        (MemoryError(), None),
        (RuntimeError("std::bad_alloc"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
)
def test_allocation_failures_and_what_they_asked_for(error, size):
    assert is_allocation_failure(error) and requested_bytes(error) == size


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "disk full")])
def test_other_errors_are_no_allocation_failures(error):
    assert not is_allocation_failure(error)


def network(dtype: torch.dtype) -> nn.Linear:
    model = nn.Linear(64, 100, bias=False).to(dtype)
    model.weight.shard = replicated(100, 64)  # pyright: ignore[reportAttributeAccessIssue]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_by_holder(dtype):
    """fp32 weights are their own masters: counted once, as parameters."""
    memory, model = MemoryHolders(CPU), network(dtype)
    memory.add(model, lambda model: {"parameters": list(model.parameters())})
    frozen = network(dtype)
    memory.add(frozen, lambda model: {"parameters": list(model.parameters())})
    optimizer = ShardedAdamW(model, build_mesh(), ema_decay=0.5)
    optimizer.data.keeps_grads = False
    memory.add(optimizer, ShardedAdamW.memory)
    count, size = 6400, dtype.itemsize
    states = 3 if dtype == torch.float32 else 4  # two moments, the average, and the master
    expected = {"parameters": 2 * size * count, "gradients": 0, "optimizer": states * 4 * count, "cache": 0}
    assert memory.held() == expected
    model(torch.ones(1, 64, dtype=dtype)).sum().backward()
    assert memory.held() == expected | {"gradients": 4 * count}
    optimizer.step(0.1)
    assert memory.held() == expected
    del optimizer, model
    gc.collect()
    assert memory.held() == {"parameters": size * count, "gradients": 0, "optimizer": 0, "cache": 0}


def test_report_of_a_failure():
    """In an inner block, whose phase it names; options of what asked come first, then those of the largest holder."""
    memory, big = MemoryHolders(CPU), torch.ones(2**22)
    memory.add(big, lambda big: {"optimizer": [big]})
    memory.options = lambda phase, holder: {"cache": f"cache.size=3 of {phase}", "optimizer": "dp=1"}.get(holder, "")
    with (
        pytest.raises(RuntimeError) as caught,
        memory.explained(lambda error: "outer"),
        memory.explained(lambda error: "rollout"),
        allocating("cache"),
    ):
        torch.empty(2**46)
    (note,) = caught.value.__notes__
    first, second, *advice = note.splitlines()
    assert first.startswith(f"out of memory in phase rollout: asked for {2**18:.2f} GiB of cache; cpu has ")
    assert "optimizer 16.0 MiB, cache 0.0 MiB" in second
    assert advice == ["cache would be lowered by cache.size=3 of rollout", "optimizer would be lowered by dp=1"]


def test_other_errors_get_no_report():
    with pytest.raises(ValueError, match="x") as caught, MemoryHolders(CPU).explained(lambda error: "update"):
        raise ValueError("x")
    assert not hasattr(caught.value, "__notes__")


def test_use_of_the_cpu_grows_with_the_process():
    before = usage_of(CPU)
    block = torch.ones(2**24)
    after = usage_of(CPU)
    assert before.used + block.nbytes * 0.9 < after.used < after.total and 0 < after.free < after.total


@pytest.mark.parametrize("script", ["ppo", "grpo", "sft", "dpo", "rejection"])
def test_options_that_lower_memory_exist(script):
    values = flatten(SCRIPTS[script]())
    for phase in ("rollout", "score", "update", "loading"):
        for holder in (*HOLDERS, "activations"):
            found = memory_options(values, phase, holder)
            assert found or (holder == "cache" and "rollout.max_running" not in values)
    assert "micro_batch_size=" in memory_options(values, "update", "activations")
    every = {name for cls in SCRIPTS.values() for name in flatten(cls())}
    assert {name for names in OPTIONS.values() for name in names} <= every
