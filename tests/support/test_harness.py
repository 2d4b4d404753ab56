"""Failures that `run_ranks` must report: ranks that raise, die or hang; and state that no call may leave."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed, RanksTimeout, run_ranks


def fail_on_rank_1(rank: int, world: int, fault: str) -> None:
    if rank == 1 and fault == "raises":
        raise ValueError("bad rank 1")
    if rank == 1 and fault == "dies":
        os._exit(17)
    if rank == 1:
        time.sleep(600)
    if fault != "hangs":
        dist.barrier()


def process_state(rank: int, world: int) -> tuple:
    """The state a call starts with; changes it afterwards."""
    value = torch.ones(1)
    dist.all_reduce(value)
    state = os.environ.get("TRIALIGN_TEST_STATE"), torch.get_default_dtype(), torch.is_grad_enabled()
    found = (value.item(), os.getcwd(), *state, torch.initial_seed(), torch.get_num_threads())
    os.environ["TRIALIGN_TEST_STATE"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(random.getrandbits(32))
    return found


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("raises", RanksFailed, r"rank 1 of 2(.|\n)*bad rank 1"),
        ("dies", RanksFailed, r"rank 1 of 2: died, exit code 17"),
        ("hangs", RanksTimeout, r"ranks \[1\] did not end in 3 s(.|\n)*fail_on_rank_1"),
    ],
)
def test_failure_is_reported_and_calls_share_no_state(monkeypatch, tmp_path, fault, error, text):
    with pytest.raises(error, match=text):
        run_ranks(fail_on_rank_1, 2, fault, timeout=3 if fault == "hangs" else 60)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_ranks(process_state, 2) == [(2.0, str(tmp_path), None, torch.float32, True, 0, 1)] * 2
