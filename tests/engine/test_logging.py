"""Metrics on disk and in the backends."""

import importlib.util
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trialign.engine.logging import MetricLog, read_metrics


def test_steps_are_on_disk_at_once_and_in_tensorboard(tmp_path):
    with MetricLog(tmp_path, backends=("tensorboard",)) as log:
        for step in range(3):
            log(step, {"reward": step / 2})
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == step + 1 and json.loads(lines[-1])["reward"] == step / 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_resumed_run_removes_later_steps(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(5):
            log(step, {"reward": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # a kill within a line
    with MetricLog(tmp_path, done=2) as log:
        log(3, {"reward": 30})
    steps = [(metrics["step"], metrics["reward"]) for metrics in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [(0, 0), (1, 1), (2, 2), (3, 30)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_is_refused_first(tmp_path):
    with MetricLog(tmp_path / "run", backends=("tensorboard",), enabled=False) as log:
        log(0, {"reward": 0.5})  # of another rank
    with pytest.raises(ValueError, match="run.log=wandb"):
        MetricLog(tmp_path / "run", backends=("wandb",))
    assert not (tmp_path / "run").exists()
