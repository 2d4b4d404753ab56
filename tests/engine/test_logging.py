"""Metrics on disk, and what phases cost."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from trialign.engine.logging import MetricLog, read_metrics
from trialign.engine.profiler import Profiler, forward_flops, matmul_peak
from trialign.models.config import ModelConfig

CPU = torch.device("cpu")
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
    with pytest.raises(ValueError, match="run.log asks for wandb, which is not installed: pip install wandb"):
        MetricLog(tmp_path / "run", backends=("wandb",))
    assert not (tmp_path / "run").exists()


def test_wandb_offline_gets_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricLog(tmp_path, backends=("wandb",), config={"a": 1}) as log:
        log(0, METRICS)
    assert list(Path(tmp_path).glob("wandb/offline-run-*"))


def test_phases_add_up_and_start_anew():
    phases = Profiler(CPU, world=2, peak=500.0)
    for tokens in (10, 30):
        with phases("rollout") as phase:
            time.sleep(0.05)
            phase.tokens, phase.flops = tokens, 25.0
    with phases("sync"):
        pass
    metrics = phases.take()
    seconds = metrics["seconds/rollout"]
    assert 0.1 <= seconds < 1
    assert metrics["tokens_per_s/rollout"] == pytest.approx(40 / seconds)
    assert metrics["mfu/rollout"] == pytest.approx(50.0 / seconds / 1000)  # two ranks of 500 FLOP/s
    assert metrics["seconds/step"] == pytest.approx(seconds + metrics["seconds/sync"])
    assert "mfu/sync" not in metrics and "tokens_per_s/sync" not in metrics
    assert metrics["memory_gb/sync"] > 0.05
    assert phases.take() == {}


def test_the_peak_is_about_what_a_matrix_product_reaches():
    peak = matmul_peak(torch.float32, CPU, seconds=0.05)
    a = torch.ones(1024, 1024)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    assert 0.2 < peak / max(rates) < 5  # loose: others may share the cores


def test_flops_equal_torch_s_own_count():
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "head_dim": 16,
    }
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "eager"
    values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    shape = ModelConfig.from_hf_dict(values)
    n = 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LlamaForCausalLM(config)(torch.arange(n)[None])
    square = 3 * 4.0 * 64 * n * n  # eager attention computes the masked half too
    causal = 3 * 4.0 * 64 * (n * (n + 1) // 2)
    counted = counter.get_total_flops() - square + causal
    assert forward_flops(shape, [n], head_rows=n) == counted
    assert forward_flops(shape, [n, n]) == 2 * (counted - 2 * 48 * 128 * n)


def test_flops_of_a_mixture_are_those_of_the_experts_a_token_takes():
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    experts: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False}
    ffn: dict[str, Any] = {
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    }
    config = Qwen2MoeConfig(**sizes, **experts, **ffn, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = config._experts_implementation = "eager"
    shape = ModelConfig.from_hf_dict({**config.to_dict(), "architectures": ["Qwen2MoeForCausalLM"]})
    n, width = 9, shape.num_heads * shape.head_dim
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Qwen2MoeForCausalLM(config)(torch.arange(n)[None])
    masked = 3 * 4.0 * width * (n * n - n * (n + 1) // 2)
    assert forward_flops(shape, [n], head_rows=n) == counter.get_total_flops() - masked
