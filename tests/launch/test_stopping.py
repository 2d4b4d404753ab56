"""Kills, requests to stop, hanging and failing ranks: checkpoints, reports, files (docs/runs.md)."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from samples import write_jsonl
from scripts import AXES, ENVIRONMENT, ROOT, agree, command, digests, metrics, rewound, start, succeed_in_turn
from tiny_run import prompts, tiny_run

STEPS = 6
EVERY = ("--run.save_every", 1, "--run.keep", STEPS)  # a checkpoint a step


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    server = Forked()
    yield server
    server.close()


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny PPO run with every kind of checkpoint state."""
    folder = tmp_path_factory.mktemp("stopping")
    write_jsonl(folder / "text.jsonl", [{"text": f"plain text {i} " * 5} for i in range(40)])
    given = {
        **{"data_max_prompt_tokens": 96, "rollout_max_new_tokens": 8, "rollout_samples_per_prompt": 2},
        **{"reward_normalize": True, "reward_time_limit": 2.5, "data_ptx_source": str(folder / "text.jsonl")},
        **{"actor_ema_decay": 0.9, "actor_ptx_coef": 0.1, "actor_entropy_coef": 0.01},
        **{f"{role}_optimizer.{name}": v for role in ("actor", "critic") for name, v in (("lr", 1e-3), ("eps", 1e-5))},
        **{"ppo_kl_target": 0.1, "ppo_kl_horizon": 100, "ppo_minibatches": 2, "ppo_micro_batch_size": 2},
        **{"run_steps": STEPS, "run_prompts_per_step": 4, "run_save_every": 0, "run_show": 1},
    }
    return tiny_run(folder, prompts(20), "goal", **given)


@pytest.fixture(scope="module")
def whole(forked, setting) -> Path:
    """The uninterrupted run."""
    assert forked.run("ppo", *begin(setting, setting / "whole", *EVERY)).codes == [0]
    return setting / "whole"


def begin(setting: Path, folder: Path, *more: object) -> list[object]:
    """Arguments of a new run."""
    return ["--config", setting / "config.toml", "--run.output", folder, *more]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_resume_after_random_kills_is_bit_identical(setting, whole, forked):
    """Two SIGKILLs, each at a random moment of the step after a checkpoint: in rollout, update or save."""
    folder, rng = setting / "killed", random.Random(0)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    step_seconds = sorted(line["seconds/step"] for line in lines)[STEPS // 2]
    arguments = begin(setting, folder, *EVERY)
    for _ in range(2):
        done = len(checkpoints(folder))
        process = start("ppo", *arguments)
        wait_until(lambda: len(checkpoints(folder)) > done, "no step")  # noqa: B023
        kill_at = time.monotonic() + rng.uniform(0, step_seconds)
        # However fast the steps are here, the kill comes before the run's end.
        wait_until(lambda: time.monotonic() > kill_at or len(checkpoints(folder)) > done + 1, "no step")  # noqa: B023
        process.kill()
        process.wait()
        arguments = ["--resume", folder]
    assert f"step_{STEPS}" not in checkpoints(folder), "both kills must come before the last step"
    assert forked.run("ppo", *arguments).codes == [0]
    assert digests(folder, STEPS) == digests(whole, STEPS)
    assert metrics(folder) == metrics(whole)


def test_resume_in_another_layout_agrees(setting, whole):
    """The last two steps."""
    folders = {axis: rewound(whole, setting / axis, STEPS - 2) for axis in AXES}
    succeed_in_turn([("ppo", "--resume", folder, f"--parallel.{axis}", 2) for axis, folder in folders.items()])
    for folder in folders.values():
        agree(folder, whole, STEPS)


def test_resume_after_stops_in_every_phase_is_bit_identical(forked, setting, whole):
    """A step is dropped in its rollout and before its update, finished in the update and while it is saved."""
    folder = setting / "stopped"
    grace = ("--run.grace", "0")
    faults: list[tuple[dict[str, Any], list[str]]] = [
        ({"phase": "loading", "signal": "SIGINT"}, []),
        ({"phase": "rollout", "signal": "SIGUSR1"}, ["step_0"]),
        ({"phase": "rollout", "nth": 2, "signal": "SIGTERM"}, ["step_0", "step_1"]),
        ({"phase": "update", "signal": "SIGINT"}, ["step_1", "step_2"]),
        ({"phase": "score", "nth": 2, "touch": str(folder / "STOP")}, ["step_2", "step_3"]),
        ({"phase": "checkpoint", "signal": "SIGTERM"}, ["step_3", f"step_{STEPS}"]),
    ]
    arguments = begin(setting, folder)
    for fault, expected in faults:
        done = forked.run("ppo", *arguments, *grace, fault=fault)
        assert done.codes == [75] and "Traceback" not in done.output, (fault, done.output)
        assert json.loads((folder / "STOPPED").read_text())["during"]
        assert not (folder / ".lock").exists() and not (folder / "STOP").exists()
        assert checkpoints(folder) == expected, (fault, done.output)
        arguments = ["--resume", folder] if expected else arguments
    assert forked.run("ppo", "--resume", folder).codes == [0]
    assert digests(folder, STEPS) == digests(whole, STEPS) and metrics(folder) == metrics(whole)
    assert not (folder / "STOPPED").exists() and (folder / "model").exists()


def test_request_to_one_rank_stops_all_ranks(forked, setting):
    """In a rollout over two pipeline stages, whose steps in flight are finished first."""
    folder = setting / "stages"
    arguments = begin(setting, folder, "--parallel.pp", 2, "--rollout.max_new_tokens", 60, "--run.grace", 0)
    done = forked.run("ppo", *arguments, ranks=2, fault={"phase": "rollout", "nth": 2, "rank": 1, "signal": "SIGUSR1"})
    assert done.codes == [75, 75], done.output
    assert done.output.count("exit code 75") == 1 and checkpoints(folder) == ["step_1"]
    assert json.loads((folder / "STOPPED").read_text())["during"] == "rollout"


def test_second_signal_ends_run_and_reward_process(forked, setting):
    arguments = begin(setting, setting / "twice", "--reward.functions", f"{setting}/rewards.py:sleeping")
    arguments += ["--reward.time_limit", 60, "--run.show", 0]
    done = forked.run("ppo", *arguments, fault={"phase": "score", "signal": "SIGTERM", "again": 3})
    assert done.codes == [128 + signal.SIGTERM], done.output
    assert "Traceback" not in done.output
    wait_until(lambda: not running((setting / "pid").read_text()), "the reward process is still running")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_during_imports_exits_with_75(number):
    process = subprocess.Popen(command("sft"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), "torch is not imported")
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 75


def test_signal_within_a_finalizer_is_not_lost(tmp_path):
    """Python drops exceptions raised in finalizers."""
    program = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT / "launch")!r})
from common.signals import StopSignals
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
with StopSignals(pathlib.Path({str(tmp_path)!r}), True):
    try:
        Finalized()
        time.sleep(60)
    finally:
        print("left in order")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 75 and "left in order" in done.stdout, done.stderr
    assert "ignored" not in done.stderr and (tmp_path / "STOPPED").exists()


def short(setting: Path, folder: Path, *more: object) -> list[object]:
    """Arguments of a run of one step."""
    return begin(setting, folder, "--run.steps", 1, "--run.save_every", 1, "--run.show", 0, *more)


@pytest.mark.parametrize(
    ("phase", "rank", "fault"),
    [
        ("loading", 1, {"hang": True}),
        ("rollout", 1, {"signal": "SIGSTOP"}),
        ("score", 1, {"hang": True}),
        ("update", 1, {"hang": True}),
        ("checkpoint", 1, {"hang": True}),
        ("export", 0, {"hang": True}),
    ],
)
def test_hanging_rank_is_reported_with_phase_and_stack(forked, setting, tmp_path, phase, rank, fault):
    arguments = short(setting, tmp_path / "run", "--run.timeout", 3)
    done = forked.run("ppo", *arguments, ranks=2, fault={"phase": phase, "rank": rank} | fault)
    stopped = "signal" in fault
    assert done.codes == ([1, None] if stopped else [1, 1]), done.output
    assert errors(done.output) == 1 and "run.timeout" in done.output, done.output
    assert f"late: rank {rank}, phase {phase}{', without a sign of life' * stopped}" in done.output, done.output
    assert "in strike" in done.output and "forked.py" in done.output  # where it sleeps
    assert done.errors[rank] is None and f"late: rank {rank}" in str(done.errors[1 - rank])


def errors(output: str) -> int:
    """How many reports there are; a stack may quote a line of the sources with the word."""
    return len(re.findall("^error:", output, re.MULTILINE))


@pytest.mark.parametrize(
    ("phase", "rank", "error"),
    [
        ("rollout", 1, "SystemExit"),
        ("score", 0, "KeyboardInterrupt"),
        ("update", 1, "OutOfMemoryError"),
        ("checkpoint", 0, "MemoryError"),
        ("export", 0, "AssertionError"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_failing_rank_ends_the_job(forked, setting, tmp_path, phase, rank, error, killed):
    """Any exception, without a text too, and SIGKILL. In the update nothing but the ranks ends them."""
    fault = {"phase": phase, "rank": rank} | ({"signal": "SIGKILL"} if killed else {"raise": error})
    alone = phase == "update"
    done = forked.run("ppo", *short(setting, tmp_path / "run"), ranks=2, fault=fault, launcher=not alone)
    assert done.codes[rank] == (-signal.SIGKILL if killed else 1) and done.codes[1 - rank] == 1, done.output
    assert not (tmp_path / "run" / "STOPPED").exists() and "exit code 75" not in done.output
    if killed:
        assert errors(done.output) == alone, done.output
        assert not alone or f"late: rank {rank}, phase {phase}" in done.output, done.output
    else:
        assert errors(done.output) == 1, done.output
        assert f"error: rank {rank}, phase {phase}: {error}" in done.output, done.output
        assert error in str(done.errors[rank]) and done.errors[1 - rank] is None


def test_hanging_reward_ends_the_job(forked, setting, tmp_path):
    arguments = short(setting, tmp_path / "run", "--reward.functions", f"{setting}/rewards.py:sleeping")
    done = forked.run("ppo", *arguments, "--reward.time_limit", 1, ranks=2, launcher=False)
    assert done.codes == [1, 1] and errors(done.output) == 1, done.output
    assert "reward.time_limit=1" in done.output and "rewards.py:sleeping" in done.output, done.output


def test_failure_is_reported_once(forked, setting, tmp_path):
    """A failure of the main rank alone, which ends the other rank too, and one of every rank."""
    (tmp_path / "wandb.py").write_text("raise ImportError('not here')\n")
    alone = forked.run("ppo", *begin(setting, tmp_path / "alone", "--run.log", "wandb"), ranks=2)
    assert "wandb" in str(alone.errors[0]) and "Traceback" not in alone.output, alone.output
    rates = ("--actor.optimizer.lr", 1e30, "--critic.optimizer.lr", 1e30)
    every = forked.run("ppo", *begin(setting, tmp_path / "every", *rates), ranks=2)
    for done in (alone, every):
        assert 0 not in done.codes and errors(done.output) == 1, done.output
        assert sum(error is not None for error in done.errors) == 1


def test_scorer_time_limit_must_be_below_run_timeout(forked, setting, tmp_path):
    arguments = begin(setting, tmp_path / "run", "--reward.functions", "--reward.servers", "http://localhost:1/score")
    done = forked.run("ppo", *arguments, "--reward.server_max_attempts", 5, "--run.timeout", 10)
    assert done.codes == [1] and "reward.server_max_attempts = 2.5 x 5" in done.output and "=10" in done.output


def test_ranks_stop_with_the_torchrun_agent(setting):
    """The agent is killed, or gets SIGTERM."""
    folder = setting / "launched"
    arguments = begin(setting, folder, "--run.steps", 1000)
    for number, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 1)):
        words = command("ppo", *arguments, ranks=2)
        with open(setting / "output", "w") as output:
            agent = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stdout=output, stderr=output)
            wait_until(lambda: (folder / "metrics.jsonl").exists() and metrics(folder), "no step")
            before = len(metrics(folder))
            wait_until(lambda: len(metrics(folder)) > before, "no step")  # noqa: B023
            ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            assert len(ranks) == 2
            agent.send_signal(number)
            assert agent.wait(60) == expected
            wait_until(lambda: not any(map(running, ranks)), "ranks are still running")  # noqa: B023
        text = (setting / "output").read_text()
        assert "exit code 75" in text, text
        assert checkpoints(folder)[-1] == f"step_{len(metrics(folder))}" and (folder / "STOPPED").exists(), text
        arguments = ["--resume", folder]


def wait_until(holds: Any, otherwise: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)


def running(pid: str) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
