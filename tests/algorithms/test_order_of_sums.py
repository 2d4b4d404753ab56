"""Operators of every training loss and its gradient: none adds floats to one place in an undefined order.

tests/test_banned_calls.py finds calls in the sources; a gradient's operators (of `gather`, of indexing) show only here.
"""

from typing import get_args

import pytest
import torch
from losses import KINDS, Draw, Models, run
from test_loss_invariance import folders  # noqa: F401 (a fixture)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trialign.algorithms.advantages import Baseline, Scale, group_advantages
from trialign.algorithms.losses.aggregation import Segments
from trialign.algorithms.reward_model import pair_quality

aten = torch.ops.aten
ALONG_DIM = {aten.scatter_add, aten.scatter_reduce}  # an index for each number
OF_ROWS = {aten.index_add, aten.index_reduce}  # an index for each row
ALWAYS = {aten.put, aten.bincount, aten.histc, aten.embedding_bag, aten._embedding_bag}


def repeats(index: Tensor) -> bool:
    """Whether two rows of an index [rows, ...] are equal."""
    return len(index.unique(dim=0)) < len(index)


class UnorderedSums(TorchDispatchMode):
    """Records float operators that add several numbers to one place in no defined order.

    By their index: with different places each is a copy. Indexing's gradient (`index_put` with accumulate) has one
    order on CUDA, where it sorts, but not on the CPU, whose threads add as they come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = getattr(aten, func._overloadpacket.__name__.removesuffix("_"), None)
        self.seen.add(str(packet))
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves((args, result))):
            if self.unordered(packet, args, kwargs or {}):
                self.found.append(f"{func} of {[list(x.shape) for x in tree_leaves(args) if isinstance(x, Tensor)]}")
        return result

    def unordered(self, packet, args, kwargs) -> bool:
        if packet in ALONG_DIM:
            index = args[2].movedim(args[1], 0).reshape(args[2].shape[args[1]], -1)  # [numbers, places]
            return any(repeats(column) for column in index.unbind(1))
        if packet in OF_ROWS:
            return repeats(args[2])
        if packet in (aten.index_put, aten._unsafe_index_put, aten._index_put_impl):
            accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
            places = torch.broadcast_tensors(*(index for index in args[1] if index is not None))
            return accumulate and repeats(torch.stack([place.flatten() for place in places], 1))
        if packet is aten.cumsum:
            return args[0].is_floating_point() and args[0].dim() == 1
        return packet in ALWAYS


@pytest.fixture(scope="module")
def models(folders) -> Models:  # noqa: F811
    return Models(folders)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_add_in_one_order(models, kind):
    draw = Draw(seed=1, order=(0, 1, 2, 3, 4, 5), size=3, padding=2)
    run(models, kind, draw)  # builds the models, whose initial weights need no order
    with UnorderedSums() as sums:
        run(models, kind, draw)
    assert {"aten.mm", "aten.index"} <= sums.seen and not sums.found


def test_statistics_add_in_one_order():
    """Of the eval split's pairs, with several in a bin; the numbers are those of one sum a bin."""
    generator = torch.Generator().manual_seed(0)
    scores, margins = torch.randn(400, generator=generator), torch.zeros(200)
    group = torch.arange(50).repeat(8)
    with UnorderedSums() as sums:
        quality = pair_quality(scores, margins, 0.1)
        for baseline in get_args(Baseline):
            for scale in get_args(Scale):
                group_advantages(scores, group, baseline, scale)
    assert sums.seen and not sums.found
    chosen, rejected = scores[::2].double(), scores[1::2].double()
    confidence = (chosen - rejected).abs().sigmoid()
    bins = ((confidence - 0.5) * 20).long()
    gaps = [((chosen > rejected).double() - confidence)[bins == i].sum().abs().item() for i in range(10)]
    assert quality["eval_calibration"] == pytest.approx(sum(gaps) / 200, rel=1e-12) and min(gaps) > 0


def test_unordered_sums_are_found():
    x, i = torch.randn(6, requires_grad=True), torch.tensor([0, 0, 1])
    cases = {
        "index_add": lambda: torch.zeros(3).index_add(0, i, x[:3].detach()),
        "scatter_add": lambda: x.gather(0, i).sum().backward(),
        "index_put": lambda: x[i].sum().backward(),
        "index_select": lambda: x.index_select(0, i).sum().backward(),
        "cumsum": lambda: x.detach().cumsum(0),
        "bincount": lambda: torch.bincount(i, x[:3].detach()),
    }
    for name, case in cases.items():
        with UnorderedSums() as sums:
            case()
        assert len(sums.found) == 1 and (name == "index_select" or name in sums.found[0]), name
    for ordered in (
        lambda: x[torch.tensor([2, 0])].sum().backward(),
        lambda: x.view(3, 2).gather(1, i[:, None]).sum().backward(),
        lambda: torch.zeros(3, dtype=torch.int64).index_add(0, i, i),
    ):
        with UnorderedSums() as sums:
            ordered()
        assert not sums.found


def test_gradient_of_broadcast_repeats_with_threads():
    """Indexing's would not: above 32768 numbers the threads of a CPU add to one place as they come."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        segments = Segments.of_lengths(torch.tensor([100_000, 50_000]), torch.ones(150_000, dtype=torch.bool))
        x, upstream = torch.zeros(2, requires_grad=True), torch.randn(150_000) * torch.randn(150_000).exp()
        grads = [torch.autograd.grad(segments.broadcast(x), x, upstream)[0] for _ in range(20)]
        assert all(torch.equal(grad, grads[0]) for grad in grads)
    finally:
        torch.set_num_threads(before)
