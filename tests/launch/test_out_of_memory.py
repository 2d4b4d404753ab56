"""Allocations that fail in a phase of launch/ppo.py: the process has no more address space (RLIMIT_AS)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from samples import write_jsonl
from scripts import ENVIRONMENT
from tiny import tiny_chat_model
from tiny_run import REWARDS, prompts, write_config

# Runs the script's main; from the start of a phase on the process may grow by so many MiB.
LIMITED = """
import contextlib, resource, sys
sys.path.insert(0, sys.argv[1])
import ppo
from common import run
from trialign.engine.profiler import Profiler

def limit(phase):
    if phase == sys.argv[2]:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        size += int(sys.argv[3]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))

class Limited(Profiler):
    @contextlib.contextmanager
    def __call__(self, name, **options):
        with super().__call__(name, **options):
            limit(name)
            yield

run.Profiler = Limited
build = ppo.build_ppo_roles
def build_ppo_roles(*given):
    limit("loading")
    return build(*given)
ppo.build_ppo_roles = build_ppo_roles
run.start(ppo.PPOConfig, ppo.main, "ppo", sys.argv[4:])
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """Two layers of 5 million parameters each; 8 prompts of some hundred tokens."""
    folder = tmp_path_factory.mktemp("out_of_memory")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    tiny_chat_model(folder / "model", **shape)
    write_jsonl(folder / "rows.jsonl", [{**row, "prompt": row["prompt"] * 40} for row in prompts(8)])
    (folder / "rewards.py").write_text(REWARDS)
    given = {"model_path": f"{folder}/model", "model_dtype": "float32", "data_sources": [f"{folder}/rows.jsonl"]}
    given |= {"reward_functions": [f"{folder}/rewards.py:length"], "data_max_prompt_tokens": 1000, "run_log": ()}
    given |= {"run_steps": 1, "run_show": 0, "run_prompts_per_step": 8, "run_overwrite": True}
    write_config(folder / "config.toml", **given)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit address space")
@pytest.mark.parametrize(
    ("phase", "spare", "options", "asking", "advice"),
    [
        ("loading", 16, {}, "parameters", "parallel.tp=1, parallel.pp=1, lora.quantize=False"),
        ("rollout", 40, {"rollout.max_new_tokens": 3000}, "cache", "rollout.cache_gib=0.0, rollout.cache_fraction=0.5"),
        ("score", 8, {"rollout.max_new_tokens": 2}, "activations", "ppo.micro_batch_size=8, parallel.recompute=auto"),
        ("update", 8, {"rollout.max_new_tokens": 2}, "activations", "ppo.micro_batch_size=8, parallel.recompute=auto"),
    ],
    ids=["loading", "rollout", "score", "update"],
)
def test_report_names_phase_request_holders_and_options(setting, phase, spare, options, asking, advice):
    words = ["--config", setting / "config.toml", "--run.output", setting / phase]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", LIMITED, ROOT / "launch", phase, spare, *words]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    print(done.stdout[-2000:], done.stderr[-6000:])
    assert done.returncode == 1
    report = re.search(
        rf"out of memory in phase {phase}: asked for (.+) of {asking}; cpu has (.+) free of", done.stderr
    )
    assert report is not None
    assert report[1].endswith(("MiB", "GiB")) and advice in done.stderr
