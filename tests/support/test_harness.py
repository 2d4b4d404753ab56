"""The harness must be able to fail: what it reports for a rank that raises, dies, hangs or gives what cannot travel."""

import ctypes
import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed, RanksTimeout, run_ranks


def total(rank: int, world: int, scale: float) -> torch.Tensor:
    value = torch.tensor([rank * scale])
    dist.all_reduce(value)
    return value


def raises_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"no {bad} here")
    dist.barrier()


def dies_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        os._exit(17)
    dist.barrier()


def reads_address_zero(rank: int, world: int) -> None:
    ctypes.string_at(0)


def receives_from_nobody(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(600)


def gives_a_lambda(rank: int, world: int):
    return lambda: rank


def leaves_a_mess(rank: int, world: int) -> None:
    os.environ["TRIALIGN_TEST_MESS"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(random.getrandbits(32))


def looks_around(rank: int, world: int) -> tuple:
    state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(), torch.get_num_threads()
    return os.environ.get("TRIALIGN_TEST_MESS"), os.getcwd(), *state


def pid(rank: int, world: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_back_by_rank(world: int):
    results = run_ranks(total, world, 0.5)
    assert results == [torch.tensor([0.5 * sum(range(world))])] * world


def test_a_raise_shows_its_traceback_and_its_rank():
    with pytest.raises(RanksFailed, match=r"rank 1 of 3(.|\n)*no 1 here"):
        run_ranks(raises_on, 3, 1)
    assert run_ranks(total, 2, 1.0) == [torch.tensor([1.0])] * 2  # the next call gets ranks that work


def test_a_dead_rank_is_reported_at_once():
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 of 2: died, exit code 17"):
        run_ranks(dies_on, 2, 1)
    assert time.monotonic() - begin < 30


def test_a_crash_shows_its_line():
    with pytest.raises(RanksFailed, match=r"exit code -11(.|\n)*reads_address_zero"):
        run_ranks(reads_address_zero, 1)


def test_a_hang_names_the_rank_and_its_line():
    with pytest.raises(RanksTimeout, match=r"ranks \[1\] did not end in 3 s(.|\n)*receives_from_nobody"):
        run_ranks(receives_from_nobody, 2, timeout=3)


def test_a_result_that_cannot_travel_is_a_failure():
    with pytest.raises(RanksFailed, match="pickle"):
        run_ranks(gives_a_lambda, 1)


def test_a_function_inside_another_is_refused():
    def inner(rank: int, world: int) -> None: ...

    with pytest.raises(ValueError, match="top level"):
        run_ranks(inner, 1)


def test_calls_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path):
    run_ranks(leaves_a_mess, 2)
    monkeypatch.chdir(tmp_path)
    clean = (None, str(tmp_path), torch.float32, True, 0, 1)
    assert run_ranks(looks_around, 2) == [clean] * 2
    monkeypatch.setenv("TRIALIGN_TEST_MESS", "from the test")
    assert run_ranks(looks_around, 1) == [("from the test", *clean[1:])]


def test_fresh_ranks_are_new_processes():
    kept = run_ranks(pid, 2)
    assert run_ranks(pid, 2) == kept
    assert not set(run_ranks(pid, 2, fresh=True)) & set(kept)
