"""Bytes that kernels load and store: as docs/kernels.md has them, each address once except where listed."""

from pathlib import Path

from implementations import INTERPRET, interpreted_only

pytestmark = interpreted_only

if INTERPRET:
    import launches
    import roofline
    import traffic

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "kernels.md").read_text()
LIMITS = {  # bytes moved over those of each address once: reads again come from L2 or the cache
    15.0: ["sampling.sample"],  # a row in each step of the search for the cut
    3.0: ["flash_attention.forward", "flash_attention.backward"],  # blocks of keys for each of queries; the reverse
    1.5: ["grouped_matmul.matmul", "grouped_matmul.outer", "nf4.gemv"],  # a row of x for each 32 outputs
    1.4: ["gae.scan", "moe.permute", "moe.unpermute_backward", "rms_norm.forward"],  # the next token, a row, the weight
}


def test_traffic_is_as_documented_and_within_its_limit():
    kernels = traffic.all_kernels()
    assert [*kernels] == [name for name, _ in sorted(launches.specs())]
    missing = [row for row in [*traffic.table(kernels), *roofline.table(kernels)] if row not in PAGE]
    assert not missing, "docs/kernels.md is out of date: make kernel-report ARGS=--write"
    limits = {name: limit for limit, names in LIMITS.items() for name in names}
    for name, (_, moved) in kernels.items():
        assert moved.loaded + moved.stored <= limits.get(name, 1.07) * moved.once, f"{name}: {moved}"
