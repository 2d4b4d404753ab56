"""Cost of a step's phases."""

import time

import pytest
import torch
from harness import run_ranks
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import Profiler, matmul_peak


def test_phases_add_up_and_start_anew():
    mesh = build_mesh()
    profiler = Profiler(mesh, peak=500.0)
    profiler.add(mesh, tokens=1000)  # outside of a phase: not counted
    for tokens in (10, 30):
        with profiler("rollout"):
            time.sleep(0.05)
            profiler.add(mesh, tokens=tokens, flops=20.0)
            profiler.add(mesh, flops=5.0)
    with profiler("sync"):
        pass
    metrics = profiler.take()
    seconds = metrics["seconds/rollout"]
    assert 0.1 <= seconds < 1
    assert metrics["tokens_per_s/rollout"] == pytest.approx(40 / seconds)
    assert metrics["mfu/rollout"] == pytest.approx(50.0 / seconds / 500)
    assert metrics["seconds/step"] == pytest.approx(seconds + metrics["seconds/sync"])
    assert metrics["mfu/step"] == pytest.approx(50.0 / metrics["seconds/step"] / 500)
    assert "mfu/sync" not in metrics and "tokens_per_s/sync" not in metrics
    assert metrics["memory_gb/sync"] > 0.05
    assert profiler.take() == {}


def reports(rank: int, world: int) -> tuple[float, float]:
    mesh = build_mesh(tp=2)
    profiler = Profiler(mesh, peak=500.0)
    with profiler("update"):
        profiler.add(mesh, tokens=10 + mesh.dp.rank, flops=100.0)
    metrics = profiler.take()
    seconds = metrics["seconds/update"]
    return metrics["tokens_per_s/update"] * seconds, metrics["mfu/update"] * seconds


def test_work_is_summed_over_dp_ranks_and_counted_once_in_each():
    assert run_ranks(reports, 4) == [pytest.approx((21, 200 / (4 * 500)))] * 4


def test_the_peak_is_about_what_a_matrix_product_reaches():
    peak = matmul_peak(torch.float32, torch.device("cpu"), seconds=0.05)
    a = torch.ones(1024, 1024)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    assert 0.2 < peak / max(rates) < 5  # loose: others may share the cores


def test_step_tokens_are_those_learned_from_once():
    profiler = Profiler(build_mesh())
    with profiler("score", tokens=70):
        pass
    with profiler("update", tokens=50, epochs=4):
        pass
    metrics = profiler.take()
    assert metrics["tokens_per_s/score"] == pytest.approx(70 / metrics["seconds/score"])
    assert metrics["tokens_per_s/update"] == pytest.approx(200 / metrics["seconds/update"])
    assert metrics["tokens_per_s"] == pytest.approx(50 / metrics["seconds/step"])
