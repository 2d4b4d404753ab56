"""Profiler of a step's phases."""

import time

import pytest
import torch
from harness import run_ranks
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import Profiler, matmul_peak


def test_phases_add_up_within_a_step():
    mesh = build_mesh()
    profiler = Profiler(mesh, peak=500.0)
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
    with profiler("sync"):
        pass
    metrics = profiler.take()
    seconds = {name: metrics[f"seconds/{name}"] for name in ("rollout", "score", "update", "sync", "step")}
    assert 0.1 <= seconds["rollout"] < 1
    assert seconds["step"] == pytest.approx(sum(seconds.values()) - seconds["step"])
    assert metrics["mfu/rollout"] == pytest.approx(50.0 / seconds["rollout"] / 500)
    assert metrics["mfu/step"] == pytest.approx(50.0 / seconds["step"] / 500)
    for name, tokens in (("rollout", 40), ("score", 70), ("update", 200)):
        assert metrics[f"tokens_per_s/{name}"] == pytest.approx(tokens / seconds[name])
    assert metrics["tokens_per_s"] == pytest.approx(50 / seconds["step"]), "of the trained batch, once"
    assert "mfu/sync" not in metrics and "tokens_per_s/sync" not in metrics and metrics["memory_gb/sync"] > 0.05
    assert profiler.take() == {}


def reports(rank: int, world: int) -> tuple[float, float]:
    mesh = build_mesh(tp=2)
    profiler = Profiler(mesh, peak=500.0)
    with profiler("update"):
        profiler.add(mesh, tokens=10 + mesh.dp.rank, flops=100.0)
    metrics = profiler.take()
    seconds = metrics["seconds/update"]
    return metrics["tokens_per_s/update"] * seconds, metrics["mfu/update"] * seconds


def test_work_is_summed_over_dp_ranks():
    assert run_ranks(reports, 4) == [pytest.approx((21, 200 / (4 * 500)))] * 4


def test_matmul_peak_is_near_a_measured_product():
    peak = matmul_peak(torch.float32, torch.device("cpu"), seconds=0.05)
    a = torch.ones(1024, 1024)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    assert 0.2 < peak / max(rates) < 5  # loose: others may share the cores
