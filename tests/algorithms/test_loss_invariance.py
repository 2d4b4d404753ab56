"""Property of every loss and gradient: independent of micro-batches, packing, padding, order and layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import TWO_RANKS
from losses import KINDS, LONGEST, Draw, Models, run
from tiny import tiny_llama
from tiny_moe import tiny_mixtral

LAYOUTS = {str(layout): layout for layout in TWO_RANKS}
# One of each kind of row, of passes before the step, and of terms across the tokens of a sample.
IN_LAYOUTS = [
    *("sft", "pretrain", "reward", "process", "kto", "router", "dpo, nll", "ipo, mean", "hinge", "ppo, ptx"),
    *("ppo, sample-mean", "grpo, k3 in the loss", "rloo, sequence-sum", "reinforce++", "gspo", "cispo"),
    *("dapo, sequence-mask", "dr_grpo"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "lm": tiny_llama(root / "lm", num_hidden_layers=2),
        "reference": tiny_llama(root / "reference", seed=1, num_hidden_layers=2),
        "score": tiny_llama(root / "score", score=True, num_hidden_layers=2),
        "moe": tiny_mixtral(root / "moe"),
    }


@pytest.fixture(scope="module")
def alone(folders) -> Models:
    return Models(folders)


def drawn(data: st.DataObject, counts: tuple[int, ...]) -> tuple[Draw, Draw]:
    """A batch in one micro-batch, and the same rows in another order, cut and padding."""
    count, seed = data.draw(st.sampled_from(counts)), data.draw(st.integers(0, 999))
    whole = Draw(seed, tuple(range(count)), count)
    return whole, replace(
        whole,
        order=tuple(data.draw(st.permutations(range(count)))),
        size=data.draw(st.integers(1, count)),
        tokens=data.draw(st.sampled_from((0, LONGEST, 100))),
        padding=data.draw(st.integers(0, 3)),
    )


def compare(kind: str, got, expected) -> None:
    assert len(got) == len(expected)
    for (losses, gradient), (whole, own) in zip(got, expected, strict=True):
        assert losses == pytest.approx(whole, rel=1e-5, abs=2e-6), kind
        largest = max(tensor.abs().max().item() for tensor in own.values())
        assert largest > 1e-4, f"{kind}: gradient is 0"
        assert gradient.keys() == own.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(gradient[name], tensor, rtol=0, atol=1e-5 * largest, msg=f"{kind}: {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_order_and_padding_change_no_loss_or_gradient(alone, kind):
    @settings(max_examples=5, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        whole, cut = drawn(data, (2, 4, 6))
        compare(kind, run(alone, kind, cut), run(alone, kind, whole))

    check()


def in_layouts(rank: int, world: int, folders: dict[str, Path], chosen: dict[str, str], draw: Draw):
    """Losses and gradients of each kind in its layout."""
    models = {name: Models(folders, LAYOUTS[name]) for name in LAYOUTS}
    return {kind: run(models[layout], kind, draw) for kind, layout in chosen.items()}


@settings(max_examples=3, deadline=None, database=None)
@given(st.data())
def test_layouts_change_no_loss_or_gradient(folders, alone, data):
    whole, cut = drawn(data, (2, 4, 6))
    chosen = {kind: data.draw(st.sampled_from(list(LAYOUTS))) for kind in IN_LAYOUTS}
    expected = {kind: run(alone, kind, whole) for kind in IN_LAYOUTS}
    for got in run_ranks(in_layouts, 2, folders, chosen, cut, timeout=120):
        for kind in IN_LAYOUTS:
            compare(f"{kind} in {chosen[kind]}", got[kind], expected[kind])
