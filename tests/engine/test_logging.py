"""Metrics on disk."""

import importlib.util
import json
from pathlib import Path

import pytest
from trialign.engine.logging import MetricLog, read_metrics

METRICS = {"reward": 0.5, "kl": 1.25, "tokens_per_s": 1234.0}


def test_each_step_is_on_disk_at_once(tmp_path):
    log = MetricLog(tmp_path)
    for step in range(3):
        log(step, METRICS)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step + 1
        assert {**METRICS, "step": step}.items() <= json.loads(lines[-1]).items()


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(5):
            log(step, {"reward": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # the kill came in the middle of a line
    with MetricLog(tmp_path, done=2) as log:
        log(3, {"reward": 30})
    steps = [(metrics["step"], metrics["reward"]) for metrics in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_a_fresh_run_does_not_keep_the_steps_of_another(tmp_path):
    for _ in range(2):
        with MetricLog(tmp_path) as log:
            log(0, METRICS)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_nothing(tmp_path):
    with MetricLog(tmp_path / "run", backends=("tensorboard",), enabled=False) as log:
        log(0, METRICS)
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path, backends=("tensorboard",)) as log:
        for step in range(3):
            log(step, {"reward": step / 2})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="run.log=wandb: not installed"):
        MetricLog(tmp_path / "run", backends=("wandb",))
    assert not (tmp_path / "run").exists()


def test_wandb_offline_gets_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricLog(tmp_path, backends=("wandb",), config={"a": 1}) as log:
        log(0, METRICS)
    assert list(Path(tmp_path).glob("wandb/offline-run-*"))
