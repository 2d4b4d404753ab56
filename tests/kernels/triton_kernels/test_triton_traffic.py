"""Bytes that kernels load and store: as docs/kernels.md has them, each address once except where listed."""

from pathlib import Path

import pytest
from implementations import INTERPRET, interpreted_only

pytestmark = interpreted_only

if INTERPRET:
    import traffic

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "kernels.md").read_text()
REPEATED = {  # bytes moved over those of each address once
    "attention.dkv": 4.0,  # q and grad for each block of keys, from L2
    "attention.dq": 3.0,  # k and v for each block of queries, from L2
    "attention.forward": 3.0,
    "gae.scan": 1.3,  # values and mask of the next token, from the cache
    "grouped_matmul.matmul": 1.5,  # tiles of products, from L2; so below
    "grouped_matmul.outer": 1.5,
    "linear_logprob.accumulate": 1.4,
    "linear_logprob.gradient": 1.8,
    "linear_logprob.stats": 3.0,
    "moe.permute": 1.4,  # a token's row once for each of its experts
    "moe.unpermute_backward": 1.2,
    "nf4.backward": 1.9,
    "nf4.forward": 2.2,
    "rms_norm.forward": 1.25,  # the weight for each row, from L2
    "sampling.sample": 15.0,  # a row, from L2, in each step of the search for the cut
}


@pytest.fixture(scope="module")
def kernels():
    return traffic.all_kernels()


def test_docs_have_the_counted_traffic(kernels):
    missing = [row for row in traffic.table(kernels) if row not in PAGE]
    assert not missing, "docs/kernels.md is out of date: make kernel-report ARGS=--write"


def test_addresses_are_accessed_once_except_where_listed(kernels):
    for name, (_, moved) in kernels.items():
        assert moved.loaded + moved.stored <= REPEATED.get(name, 1.07) * moved.once, f"{name}: {moved}"
