"""The threads of the decode ops (csrc/pool.h): every piece once, from several callers and after a fork."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from trialign.kernels.dispatch import has_op

pytestmark = pytest.mark.skipif(not has_op("linear_rows"), reason="trialign._C is not built")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def product(seed=0):
    """A job of many pieces, and its result on one thread."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, 576, generator=generator).bfloat16() for n in (3, 2000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = torch.ops.trialign.linear_rows(x, weight)
    torch.set_num_threads(threads)
    return lambda: torch.ops.trialign.linear_rows(x, weight), expected


def test_every_piece_is_run_once_a_job():
    job, expected = product()
    assert all(torch.equal(job(), expected) for _ in range(300))


def test_callers_on_several_threads():
    job, expected = product()
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: job(), range(200)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_child_of_a_fork_has_threads_of_its_own():
    job, expected = product()
    assert torch.equal(job(), expected)
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(job(), expected) for _ in range(20)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
