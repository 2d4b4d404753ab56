"""Ranks without torchrun: SLURM's variables, devices by their masks, and real processes that srun would start."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scripts import ENVIRONMENT, command, metrics, options
from tiny_run import tiny_run
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "7", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "4,3"}
STEP = {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NODELIST": "gpu[07-08]-ib,x"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}
TASK = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
RANK = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (JOB | STEP | TASK, RANK | {"MASTER_ADDR": "gpu07-ib", "MASTER_PORT": str(15000 + (31 * 4711 + 2) % 15000)}),
        (JOB | TASK | {"SLURM_STEP_ID": "2"}, RANK | {"MASTER_ADDR": "gpu07"}),
        (JOB | STEP | TASK | {"MASTER_ADDR": "head", "MASTER_PORT": "1"}, {"MASTER_ADDR": "head", "MASTER_PORT": "1"}),
        (JOB | STEP | TASK | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, {"MASTER_ADDR": "10.0.0.9"}),
        (JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, {}),  # a batch script
        (JOB | STEP | TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {}),  # srun --pty
        (JOB | STEP | TASK | {"RANK": "0", "WORLD_SIZE": "2"}, {}),  # torchrun in a task of srun
        ({}, {}),
    ],
)
def test_ranks_of_a_step(launched, environ, expected):
    found = launched("common.slurm").rank_variables(environ)
    assert {name: found.get(name) for name in expected} == expected and bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID=is not set"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many"),
        ({"SLURM_PROCID": "7"}, "SLURM_PROCID=7: must be below .* 7"),
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "", "SLURM_LAUNCH_NODE_IPADDR": ""}, "SLURM_STEP_NODELIST"),
    ],
)
def test_incomplete_step_is_refused(launched, changed, named):
    with pytest.raises(ValueError, match=named):
        launched("common.slurm").rank_variables(JOB | STEP | TASK | changed)


def test_node_lists(launched):
    slurm = launched("common.slurm")
    assert [*slurm.hosts("login,gpu[01-03,7]-ib,a[1-2]b[8,09]")] == [
        *("login", "gpu01-ib", "gpu02-ib", "gpu03-ib", "gpu7-ib", "a1b8", "a1b09", "a2b8", "a2b09"),
    ]
    assert [*slurm.counts("4(x2),3")] == [4, 4, 3]


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (4, 3, 3), (2, 3, 1)])
def test_device_of_a_rank(launched, monkeypatch, visible, local_rank, index):
    """With a CUDA_VISIBLE_DEVICES a rank, each sees its own device as number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert launched("common.env").pick_device("auto") == torch.device("cuda", index)


def test_two_ranks_on_one_gpu_are_refused(launched, monkeypatch):
    """By the GPU's id, not its index: two ranks that see one GPU each may have the same one or not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check, devices = launched("common.env").check_own_device, ["a on n1", "b on n1", "a on n2", "b on n1"]
    for count in (3, 4):
        store = HashStore()
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(check, store, rank, count, devices[rank]) for rank in range(count)]
            errors = [str(future.exception() or "") for future in futures]
        assert errors[:3] == ["", "", ""]
    assert "ranks 1 and 3 have the same GPU, b on n1" in errors[3] and "CUDA_VISIBLE_DEVICES=0" in errors[3]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    rows = [{"prompt": f"say {i}", "response": "word " * (i % 5 + 1)} for i in range(16)]
    return tiny_run(tmp_path_factory.mktemp("slurm"), rows)


def step(setting: Path, number: int, **given: object) -> list[subprocess.Popen[str]]:
    """Two processes as `srun --ntasks 2` starts them on this node."""
    plain = {"data_max_tokens": 96, "update_batch_size": 4, "optimizer_lr": 1e-3, "run_show": 0, "run_save_every": 1}
    words = command("sft", "--config", setting / "config.toml", *options(**(plain | given)))
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | ENVIRONMENT
    # Job ids that no other test on this machine has.
    environ |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": str(number), "SLURM_NTASKS": "2"}
    environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            words, env=environ | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}, stdout=pipe, stderr=pipe, text=True
        )
        for rank in ("0", "1")
    ]


def test_step_of_two_tasks_trains(setting, tmp_path):
    ranks = step(setting, 0, run_output=tmp_path / "run", run_steps=2)
    printed = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    assert "dp=2" in printed[0][0] and printed[1][0] == "" and len(metrics(tmp_path / "run")) == 2


def test_step_ends_with_the_process_of_rank_0(setting, tmp_path):
    """It holds the job's store, and nothing ends the other task, as under srun without --kill-on-bad-exit."""
    ranks = step(setting, 1, run_output=tmp_path / "run", run_steps=10000)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step_1").exists():
        assert time.monotonic() < deadline and ranks[0].poll() is None, "no step"
        time.sleep(0.01)
    ranks[0].kill()
    output = ranks[1].communicate(timeout=60)[1]
    ranks[0].communicate()
    assert ranks[1].returncode == 1, output
    assert "error: rank 1, phase " in output and "rank 0, whose process holds the job's store" in output, output
