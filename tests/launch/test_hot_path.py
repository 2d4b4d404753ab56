"""One step of launch/ppo.py under torch's profiler: it runs trialign's ops and none of their references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_run import prompts, tiny_run
from trialign.kernels.dispatch import PROBLEM

# Every op of a PPO step except the matrix products.
EXPECTED = {
    "rollout": {"rms_norm", "add_rms_norm", "rope_", "swiglu", "attention", "write_kv", "paged_attention", "sample"},
    "score": {"rms_norm", "add_rms_norm", "rope_", "swiglu", "attention", "logprob_update_"},
    "update": {
        *("rms_norm", "rms_norm_backward", "add_rms_norm", "rope_", "swiglu", "swiglu_backward"),
        *("attention", "attention_backward", "logprob_update_", "logprob_backward_"),
        *("policy_loss", "value_loss", "adamw"),
    },
    "advantage": {"kl_estimate", "gae"},
}  # fmt: skip

# Runs the script's main, profiles each phase of `train`, and records calls of references.
PROFILED = """
import contextlib, importlib, json, pkgutil, sys
import torch
import trialign.kernels
from torch.profiler import ProfilerActivity, profile

used = {"references": []}

def watch(module, name):
    reference = getattr(module, name)
    def called(*args, **kwargs):
        used["references"].append(f"{module.__name__}.{name}")
        return reference(*args, **kwargs)
    setattr(module, name, called)

for found in pkgutil.iter_modules(trialign.kernels.__path__):
    module = importlib.import_module(f"trialign.kernels.{found.name}")
    for name in [name for name in vars(module) if name.endswith(("_ref", "_ref_"))]:
        watch(module, name)

sys.path.insert(0, sys.argv[1])
import ppo
from common import run
from trialign.engine.profiler import Profiler

@contextlib.contextmanager
def record(name):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    ops = {event.key for event in seen.key_averages()}
    used[name] = sorted(op.removeprefix("trialign::") for op in ops if op.startswith("trialign::"))

class Profiled(Profiler):
    @contextlib.contextmanager
    def __call__(self, name, **options):
        with super().__call__(name, **options), record(name):
            yield

with_advantages = ppo.with_advantages
ppo.with_advantages = record("advantage")(lambda *given: with_advantages(*given))
run.Profiler = Profiled
run.Run.finish = lambda *_: None  # export and plot take half of the run's time
run.start(ppo.PPOConfig, ppo.main, "ppo", sys.argv[3:])
with open(sys.argv[2], "w") as file:
    json.dump(used, file)
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A step of PPO with two minibatches, in bf16 as by default."""
    given = {"model_dtype": None, "data_max_prompt_tokens": 96, "rollout_max_new_tokens": 6, "ppo_minibatches": 2}
    given |= {"run_overwrite": True, "run_show": 0, "run_steps": 1, "run_prompts_per_step": 4}
    return tiny_run(tmp_path_factory.mktemp("hot_path"), prompts(4), "length", **given)


def ops_of_a_step(setting: Path, **environment: str) -> dict[str, set[str]]:
    """The trialign ops of each phase, and the references called in the whole run."""
    found = setting / "used.json"
    words = [ROOT / "launch", found, "--config", setting / "config.toml", "--run.output", setting / "run"]
    subprocess.run([sys.executable, "-c", PROFILED, *words], env=os.environ | environment, timeout=300, check=True)
    return {name: set(ops) for name, ops in json.loads(found.read_text()).items()}


@pytest.mark.skipif(PROBLEM is not None, reason=f"trialign._C {PROBLEM}")
def test_ppo_step_runs_kernels_and_no_references(setting):
    used = ops_of_a_step(setting)
    for phase, expected in EXPECTED.items():
        assert not expected - used[phase], f"{phase}: missing; it ran {sorted(used[phase])}"
    assert not used["references"]


def test_reference_mode_runs_only_references(setting):
    """So an absent reference in the test above means that no reference ran."""
    used = ops_of_a_step(setting, TRIALIGN_KERNELS="reference")
    assert not any(used[phase] for phase in EXPECTED)
    names = {name.rpartition(".")[2] for name in used["references"]}
    losses = {"clipped_policy_loss_ref", "clipped_value_loss_ref"}
    assert losses | {"gae_ref", "rms_norm_ref", "sample_ref", "adamw_ref_"} <= names
