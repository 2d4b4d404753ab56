"""The generator under ep: ranks with prompts of their own give what one process gives, however unevenly they run."""

from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import VOCAB
from tiny_moe import moe_config, moe_decoder
from trialign.algorithms.micro_batch import contiguous_part
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import Completion, SamplingParams
from trialign.engine.mesh import build_mesh


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1 + 7 * (i % 3) for i in range(count)]
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def completions(rank: int, world: int, sizes: dict[str, Any], count: int, options: dict[str, Any]) -> list[Completion]:
    """This rank's part of the completions; some answers stop early."""
    mesh = build_mesh(**sizes)
    model = moe_decoder(moe_config(), mesh)
    params = SamplingParams(max_new_tokens=12, stop_ids=tuple(range(3, 12)), temperature=1.2, seed=5)
    mine = contiguous_part(count, mesh.dp)
    return EmbeddedGenerator(model, mesh, block_size=4, **options).generate(
        prompts(count)[mine], list(range(count))[mine], params
    )


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"ep": 2}, {}),
        ({"ep": 2}, {"max_running": 2, "prefill_tokens": 8}),
        ({"dp": 4, "ep": 2}, {}),
        ({"tp": 2, "ep": 2}, {}),
        ({"pp": 2, "ep": 2}, {}),
        ({"pp": 2, "ep": 2}, {"max_running": 2, "prefill_tokens": 8}),
    ],
    ids=str,
)
def test_completions_are_those_of_one_process(sizes, options, count):
    """With one prompt all ranks but one have none."""
    expected = completions(0, 1, {}, count, {})
    assert count == 1 or len({len(c.tokens) for c in expected}) > 2
    tp, pp, dp = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("dp", sizes.get("ep", 1))
    results = run_ranks(completions, tp * pp * dp, sizes, count, options, timeout=60)
    for stage in range(pp):
        for place in range(tp):
            by_dp = [results[(stage * dp + d) * tp + place] for d in range(dp)]
            got = [c for part in by_dp for c in part]
            assert [(c.tokens, c.finish) for c in got] == [(c.tokens, c.finish) for c in expected]
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_without_any_prompts_nobody_waits():
    assert run_ranks(completions, 2, {"ep": 2}, 0, {}) == [[], []]
