"""benchmarks/gpu_check.py on a CPU with a tiny model: every section runs; one that fails does not stop the next."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from samples import write_jsonl
from scripts import ENVIRONMENT
from tiny import tiny_chat_model
from tiny_run import REWARDS, prompts, write_config


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_check")
    tiny_chat_model(folder / "model", max_position_embeddings=1024)
    write_jsonl(folder / "rows.jsonl", prompts(8))
    (folder / "rewards.py").write_text(REWARDS)
    given = {"data_sources": [f"{folder}/rows.jsonl"], "reward_functions": [f"{folder}/rewards.py:length"]}
    given |= {"rollout_max_new_tokens": 6, "data_max_prompt_tokens": 64, "run_steps": 5, "run_log": ()}
    write_config(folder / "config.toml", **given)
    return folder


@pytest.fixture
def gpu_check(monkeypatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_check")


def sections_of(report: str) -> list[dict[str, Any]]:
    """The JSON at the end of a report."""
    return json.loads(report.partition("```json\n")[2].partition("\n```")[0])


def test_every_section_runs_and_is_reported(setting, tmp_path):
    given = {"model": setting / "model", "device": "cpu", "config": setting / "config.toml", "output": tmp_path}
    given |= {"rows": 2, "tokens": 4, "prompts": 4, "tests": ROOT / "tests" / "kernels" / "test_swiglu.py"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *words]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0 and str(tmp_path / "report.md") in done.stdout, report
    found = {section["name"]: section for section in sections_of(report)}
    assert all(not section["problems"] and f"| {name} | ok |" in report for name, section in found.items())
    numbers = {name: section["numbers"] for name, section in found.items()}
    assert numbers["environment"]["implementations"]["attention"] in ("trialign._C", "torch reference")
    step, micro = numbers["decode step and micro-batch"]["decode_step"][0], numbers["decode step and micro-batch"]
    assert step["rows"] == 2 and step["operators"] > 20 < micro["micro_batch"]["operators"]
    assert numbers["generation: 2"]["tokens_per_s"] > 0 < numbers["generation: 2"]["hf_tokens_per_s"]
    assert numbers["PPO iteration"]["samples_per_s"] > 0
    same = numbers["PPO compared with the CPU"]["responses sampled as on the CPU, by step"]
    assert len(same) == 3 and same[0] >= 0.75
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_failing_sections_are_reported_and_the_next_run(gpu_check, tmp_path, monkeypatch, capsys):
    """A section that does not end, an exit code, output that is no JSON, and a section that is well."""

    def section(name: str, code: str, share: float = 0.5) -> object:
        return gpu_check.Section(name, [sys.executable, "-c", code], share, gpu_check.last_json)

    codes = {"fails": "print('why'); raise SystemExit(3)", "words": "print('none')"}
    codes |= {"works": "print('{\"tokens_per_s\": 7.5}')"}
    hangs = section("hangs", "import time; print('so far', flush=True); time.sleep(600)", 0.04)
    several = [hangs, *(section(name, code) for name, code in codes.items())]
    monkeypatch.setattr(gpu_check, "sections", lambda check: several)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(gpu_check.Check("model", "cpu", output=tmp_path / "out", minutes=1))
    assert ended.value.code
    report = (tmp_path / "out" / "report.md").read_text()
    found = {section["name"]: section for section in sections_of(report)}
    assert found["fails"]["problems"] == ["exit code 3"] and found["fails"]["output"] == "why"
    assert "cannot be read" in found["words"]["problems"][0]
    assert not found["works"]["problems"] and found["works"]["numbers"] == {"tokens_per_s": 7.5}
    assert found["hangs"]["problems"][0].startswith("not finished after") and "so far" in found["hangs"]["output"]
    assert "| fails | exit code 3 |" in report and "| works | ok |" in report and "| tokens_per_s | 7.5 |" in report


def test_metrics_that_differ_from_the_cpu_are_problems(gpu_check, tmp_path):
    for name, loss in (("cpu", 0.5), ("device", 0.5003)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "value_loss": loss, "seconds/step": step * loss} for step in (1, 2, 3)]
        write_jsonl(tmp_path / name / "metrics.jsonl", lines)
    (tmp_path / "device" / "sampled.json").write_text("[0.5, 0.5, 0.5]")
    problems, numbers = gpu_check.compared(tmp_path / "cpu", tmp_path / "device")
    assert len(problems) == 2 and "value_loss is 0.5003, on the CPU 0.5" in problems[0] and "50%" in problems[1]
    assert numbers["step 2: value_loss"] == {"cpu": 0.5, "device": 0.5003}
