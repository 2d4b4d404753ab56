"""Failures that `run_ranks` must report: ranks that raise, die, hang, or return what cannot be pickled."""

import ctypes
import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed, RanksTimeout, run_ranks


def total(rank: int, world: int, scale: float) -> torch.Tensor:
    value = torch.tensor([rank * scale])
    dist.all_reduce(value)
    return value


def fail_on_rank_1(rank: int, world: int, how: str) -> Any:
    if rank == 1:
        if how == "raises":
            raise ValueError("bad rank 1")
        if how == "dies":
            os._exit(17)
        if how == "crashes":
            ctypes.string_at(0)
        if how == "hangs":
            time.sleep(600)
        return lambda: rank  # cannot be pickled
    if how in ("raises", "dies", "crashes"):
        dist.barrier()


def change_process_state(rank: int, world: int) -> None:
    os.environ["TRIALIGN_TEST_STATE"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(random.getrandbits(32))


def process_state(rank: int, world: int) -> tuple:
    state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(), torch.get_num_threads()
    return os.environ.get("TRIALIGN_TEST_STATE"), os.getcwd(), *state


def pid(rank: int, world: int) -> int:
    return os.getpid()


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("raises", RanksFailed, r"rank 1 of 2(.|\n)*bad rank 1"),
        ("dies", RanksFailed, r"rank 1 of 2: died, exit code 17"),
        ("crashes", RanksFailed, r"exit code -11(.|\n)*fail_on_rank_1"),
        ("hangs", RanksTimeout, r"ranks \[1\] did not end in 3 s(.|\n)*fail_on_rank_1"),
        ("returns a lambda", RanksFailed, "pickle"),
    ],
)
def test_failure_of_a_rank_is_reported(how: str, error: type[Exception], text: str):
    begin = time.monotonic()
    with pytest.raises(error, match=text):
        run_ranks(fail_on_rank_1, 2, how, timeout=3 if how == "hangs" else 60)
    assert time.monotonic() - begin < 30
    assert run_ranks(total, 4, 0.5) == [torch.tensor([3.0])] * 4  # with new ranks


def test_function_within_another_is_refused():
    def inner(rank: int, world: int) -> None: ...

    with pytest.raises(ValueError, match="top level"):
        run_ranks(inner, 1)


def test_calls_share_no_state(monkeypatch: pytest.MonkeyPatch, tmp_path):
    run_ranks(change_process_state, 2)
    monkeypatch.chdir(tmp_path)
    clean = (None, str(tmp_path), torch.float32, True, 0, 1)
    assert run_ranks(process_state, 2) == [clean] * 2
    monkeypatch.setenv("TRIALIGN_TEST_STATE", "from the test")
    assert run_ranks(process_state, 1) == [("from the test", *clean[1:])]


def test_fresh_ranks_are_new_processes():
    reused = run_ranks(pid, 2)
    assert run_ranks(pid, 2) == reused
    assert not set(run_ranks(pid, 2, fresh=True)) & set(reused)
