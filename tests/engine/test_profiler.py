"""Profiler of a step's phases."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import DATA_SHEETS, Profiler, data_sheet_peak, matmul_peak


def test_phases_add_up_within_a_step():
    mesh = build_mesh()
    profiler = Profiler(mesh, peak=500.0)
    profiler.data_sheet = 1000.0
    profiler.add(mesh, tokens=1000)  # outside of a phase: not counted
    for tokens in (10, 30):
        with profiler("rollout"):
            time.sleep(0.05)
            profiler.add(mesh, tokens=tokens, flops=20.0)
            profiler.add(mesh, flops=5.0)
    with profiler("score", tokens=70):
        pass
    with profiler("update", tokens=50, epochs=4):
        pass
    metrics = profiler.take()
    seconds = {name: metrics[f"seconds/{name}"] for name in ("rollout", "score", "update", "step")}
    assert 0.1 <= seconds["rollout"] < 1
    assert seconds["step"] == pytest.approx(sum(seconds.values()) - seconds["step"])
    assert metrics["mfu/rollout"] == pytest.approx(50.0 / seconds["rollout"] / 500)
    assert metrics["mfu/step"] == pytest.approx(50.0 / seconds["step"] / 500)
    assert metrics["mfu_data_sheet/step"] == pytest.approx(50.0 / seconds["step"] / 1000)
    for name, tokens in (("rollout", 40), ("score", 70), ("update", 200)):
        assert metrics[f"tokens_per_s/{name}"] == pytest.approx(tokens / seconds[name])
    assert metrics["tokens_per_s"] == pytest.approx(50 / seconds["step"]), "of the trained batch, once"
    assert "mfu/score" not in metrics and metrics["memory_gb/score"] > 0.05
    assert profiler.take() == {}


def test_matmul_peak_is_the_fastest_product(monkeypatch):
    """Products of 4, 2 and 3 seconds by a given clock, after a first one that does not count; FLOPs as torch counts.
    The factors are random, and not drawn from torch's own generator."""
    factors: list[torch.Tensor] = []
    mm = torch.mm
    monkeypatch.setattr("trialign.engine.profiler.torch.mm", lambda a, b: factors.extend((a, b)) or mm(a, b))
    state = torch.get_rng_state()
    clock = iter([0.0, 0.5, 1.0, 1.0, 5.0, 5.0, 5.0, 7.0, 7.0, 7.0, 10.0, 11.0])
    monkeypatch.setattr("trialign.engine.profiler.time", SimpleNamespace(perf_counter=clock.__next__))
    with FlopCounterMode(display=False) as counter:
        peak = matmul_peak(torch.float32, torch.device("cpu"), seconds=10.0)
    assert peak == counter.get_total_flops() / 4 / 2.0 and next(clock, None) is None
    assert all(len(factor[0].unique()) > 1000 for factor in factors) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_data_sheet_is_that_of_the_gpu(name, gpu):
    assert data_sheet_peak(torch.bfloat16, name) == (gpu and DATA_SHEETS[gpu] * 1e12)
    assert data_sheet_peak(torch.float32, name) is None
