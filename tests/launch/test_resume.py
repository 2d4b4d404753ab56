"""A run that is killed and resumed ends with the weights of one that was not: bit for bit, or within 1e-5 elsewhere."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from scripts import AXES, ENVIRONMENT, agree, command, digests, metrics, rewound, succeed, succeed_in_turn
from tiny import tiny_chat_model

STEPS = 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny chat model, prompts, a reward and a config with every piece of state that a run can have."""
    folder = tmp_path_factory.mktemp("run")
    tiny_chat_model(folder / "model")
    rows = [{"prompt": f"say {i} words", "goal": i % 7} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"plain text {i} " * 5}) + "\n" for i in range(40)))
    (folder / "reward.py").write_text(
        "def length(prompts, completions, goal, **fields):\n"
        "    return [-abs(len(c) - g) / 10 for c, g in zip(completions, goal)]\n"
    )
    (folder / "config.toml").write_text(f"""
[model]
path = "{folder}/model"
dtype = "float32"
[data]
sources = ["{folder}/prompts.jsonl"]
max_prompt_tokens = 96
ptx_source = "{folder}/text.jsonl"
[rollout]
max_new_tokens = 8
samples_per_prompt = 2
[reward]
functions = ["{folder}/reward.py:length"]
normalize = true
[actor]
ema_decay = 0.9
ptx_coef = 0.1
entropy_coef = 0.01
[actor.optimizer]
lr = 1e-3
eps = 1e-5
[critic.optimizer]
lr = 1e-3
eps = 1e-5
[ppo]
kl_target = 0.1
kl_horizon = 100
minibatches = 2
micro_batch_size = 2
[run]
steps = {STEPS}
prompts_per_step = 4
save_every = 1
show = 1
log = []
""")
    return folder


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    """The run that nothing interrupts."""
    succeed("ppo", "--config", f"{setting}/config.toml", "--run.output", f"{setting}/whole", "--run.keep", STEPS)
    return setting / "whole"


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_a_random_point_and_resumed_it_ends_bit_for_bit_the_same(setting, whole, seed):
    """The kill falls at a random moment after the first checkpoint, twice: mid-rollout, mid-update, mid-save."""
    folder = setting / f"killed{seed}"
    chance = random.Random(seed)
    arguments = ["--config", f"{setting}/config.toml", "--run.output", str(folder)]
    for _ in range(2):
        process = subprocess.Popen(
            command("ppo", *arguments),
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = len(list(folder.glob("checkpoints/step_*")))
        deadline = time.monotonic() + 120
        while not (now := sorted(folder.glob("checkpoints/step_*"))) or len(now) == before < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        process.wait()
        arguments = ["--resume", str(folder)]
    assert not (folder / "checkpoints" / f"step_{STEPS}").exists(), "killed too late to show anything"
    succeed("ppo", *arguments)
    assert digests(folder, STEPS) == digests(whole, STEPS)
    assert metrics(folder) == metrics(whole)


@pytest.fixture(scope="module")
def moved(setting, whole) -> None:
    """The last two steps under torchrun in other layouts than the first four's."""
    folders = {axis: rewound(whole, setting / axis, STEPS - 2) for axis in AXES}
    succeed_in_turn([("ppo", "--resume", folder, f"--parallel.{axis}", 2) for axis, folder in folders.items()])


@pytest.mark.parametrize("axis", AXES)
def test_resumed_in_another_layout_it_ends_the_same_within_rounding(setting, whole, moved, axis):
    agree(setting / axis, whole, STEPS)
