"""Mixture-of-experts layers: against transformers' blocks, and in every layout against one process."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import assert_close
from tiny import VOCAB, assemble
from tiny_moe import MIXTRAL, SHARED, fill, moe_config, moe_decoder
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.micro_batch import update_micro_batches
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role, target_logprobs
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.models.config import MoEConfig, check_layout
from trialign.models.moe import MoE


def transformers_block(family: str) -> tuple[Any, MoEConfig]:
    """A random block of the library, and our config of the same."""
    from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes: Any = {"hidden_size": 32, "num_experts_per_tok": 3}
    qwen: Any = sizes | {"num_experts": 6, "moe_intermediate_size": 20}
    ours = MoEConfig(experts=6, top_k=3, ffn_size=20)
    if family == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(num_local_experts=6, intermediate_size=20, **sizes))
    elif family == "qwen3_moe":
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(norm_topk_prob=True, **qwen))
    else:
        block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(norm_topk_prob=False, shared_expert_intermediate_size=12, **qwen))
        ours = dataclasses.replace(ours, normalize=False, shared_ffn_size=12)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return block, ours


def theirs_of(tensors: dict[str, Tensor], name: str, part: str) -> Tensor:
    """The block's tensor that a part of our parameter is."""
    if name.startswith("experts."):
        expert, _, half = part.partition(".")
        whole = tensors["experts.gate_up_proj" if half else "experts.down_proj"][int(expert)]
        return whole.chunk(2)[half == "up"] if half else whole
    names = {"router": "gate", "shared_gate": "shared_expert_gate", "shared.down": "shared_expert.down_proj"}
    module = name.removesuffix(".weight")
    return tensors[names.get(module, f"shared_expert.{part}_proj") + ".weight"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_layer_is_transformers(family):
    block, moe = transformers_block(family)
    ours = MoE(moe_config(moe), 0, build_mesh(), torch.float32)
    weights = dict(block.named_parameters())
    for name, parameter in ours.named_parameters():
        parts = [piece.part for piece in parameter.shard.pieces]  # pyright: ignore[reportAttributeAccessIssue]
        parameter.data.copy_(torch.cat([theirs_of(weights, name, part).data for part in parts]))
    x, upstream = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1)).unbind(0)
    leaf, their_leaf = x.clone().requires_grad_(), x[None].clone().requires_grad_()
    out, expected = ours(leaf), block(their_leaf)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(leaf.grad, their_leaf.grad[0], rtol=1e-5, atol=1e-5)  # pyright: ignore
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    for name, parameter in ours.named_parameters():
        parts = [piece.part for piece in parameter.shard.pieces]  # pyright: ignore[reportAttributeAccessIssue]
        wanted = torch.cat([theirs_of(grads, name, part) for part in parts])
        largest = wanted.abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-5 * largest, msg=name)


def skewed(layer: MoE, case: str) -> None:
    """Routers that send every token to the same experts, or never to one of them."""
    if case == "one expert":
        layer.router.weight.data.zero_()  # equal logits: the first experts win
    elif case == "empty expert":
        layer.router.weight.data[2] = layer.router.weight.data[1] * 0.5
        layer.router.weight.data[1] *= -1


def layer_alone(x: Tensor, upstream: Tensor, case: str, moe: MoEConfig = SHARED) -> dict[str, Tensor]:
    layer = MoE(moe_config(moe), 0, build_mesh(), torch.float32)
    fill(layer)
    skewed(layer, case)
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    out.backward(upstream)
    return {"out": out.detach(), "dx": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}}  # pyright: ignore


def layer_on_ranks(rank: int, world: int, sizes: dict[str, Any], rows: Sequence[int], case: str):
    """Data rank r takes rows[r] of the tokens; gradients are left as this rank has them, before any reduction."""
    mesh = build_mesh(**sizes)
    x, upstream = torch.randn(2, sum(rows), 32, generator=torch.Generator().manual_seed(1)).unbind(0)
    layer = MoE(moe_config(SHARED), 0, mesh, torch.float32)
    fill(layer)
    skewed(layer, case)
    leaf = x.split(list(rows))[mesh.dp.rank].clone().requires_grad_()
    out = layer(leaf)
    out.backward(upstream.split(list(rows))[mesh.dp.rank])
    grads = {n: (p.shard.pieces, p.grad) for n, p in layer.named_parameters()}  # pyright: ignore
    return mesh.dp.rank, mesh.tp.rank, mesh.edp.rank, out.detach(), leaf.grad, grads


@pytest.mark.parametrize("case", ["spread", "one expert", "empty expert"])
@pytest.mark.parametrize("sizes", [{"ep": 4}, {"tp": 2, "ep": 2}, {"dp": 4, "ep": 2}], ids=str)
def test_a_layer_on_ranks_is_the_layer_alone(sizes, case):
    """Ranks have unequal numbers of tokens, the last none."""
    dp = sizes.get("dp", sizes.get("ep", 1))
    rows = {1: [30], 2: [30, 0], 4: [13, 1, 16, 0]}[dp]
    x, upstream = torch.randn(2, sum(rows), 32, generator=torch.Generator().manual_seed(1)).unbind(0)
    alone = layer_alone(x, upstream, case)
    sums: dict[tuple[str, str], Tensor] = {}
    for dp_rank, tp_rank, _, out, dx, grads in run_ranks(layer_on_ranks, dp * sizes.get("tp", 1), sizes, rows, case):
        torch.testing.assert_close(out, alone["out"].split(rows)[dp_rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, alone["dx"].split(rows)[dp_rank], rtol=1e-5, atol=1e-5)
        for name, (pieces, grad) in grads.items():
            begin = 0
            for piece in pieces:
                whole = sums.setdefault((name, piece.part), torch.zeros(piece.global_shape))
                part = grad[begin : begin + piece.shape[0]]
                begin += piece.shape[0]
                if piece.shape != piece.global_shape or tp_rank == 0:  # whole ones are alike over tp
                    whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))] += part
    by_name: dict[str, list[Tensor]] = {}
    for (name, _), whole in sorted(sums.items(), key=lambda item: _order(*item[0])):
        by_name.setdefault(name, []).append(whole)
    for name, parts in by_name.items():
        wanted = alone[name]
        largest = wanted.abs().max().item()
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-5 * largest, msg=name)


def _order(name: str, part: str) -> tuple[str, int, str]:
    expert, _, half = part.partition(".")
    return name, int(expert) if expert.isdigit() else 0, half or part


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = [5, 19, 3, 14, 15, 2, 9]
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def one_step(rank: int, world: int, sizes: dict[str, Any], moe: MoEConfig, recompute: bool = False, samples: int = 1):
    """One optimizer step of language modeling: metrics, whole gradients, weights and moments, logprobs after it."""
    mesh = build_mesh(**sizes)
    model = moe_decoder(moe_config(moe), mesh, recompute=recompute)
    optimizer = ShardedAdamW(model, mesh, eps=1e-5, max_grad_norm=0.5)
    cuts = UpdateConfig(micro_batch_size=samples)
    learner = Learner(model, optimizer, lambda step: 1e-3, sizes=cuts)
    batch = pack(documents())

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, _ = target_logprobs(model, part, hidden, 1.0)
        return -logprobs.sum() / len(batch.response)

    metrics = learner.step(batch, loss)
    for bucket in optimizer.buckets:
        bucket.states["grad"] = bucket.grads[bucket.local]
    states = assemble(optimizer.entries("net", lambda name, part: f"{name}:{part}"), mesh.world)
    count = len(update_micro_batches(batch, range(len(batch)), cuts, mesh.dp))
    return metrics, states, Role(model, sizes=cuts).logprobs(batch), count


LAYOUTS = [{"ep": 4}, {"dp": 4, "ep": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "pp": 2, "ep": 2}]


@pytest.fixture(scope="module", params=["mixtral", "shared"])
def moe(request):
    return {"mixtral": MIXTRAL, "shared": SHARED}[request.param]


@pytest.fixture(scope="module")
def alone(moe):
    return one_step(0, 1, {}, moe, samples=8)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_layouts_equal_one_process(moe, alone, sizes):
    """Seven documents, each alone in its micro-batch: the ranks have unequally many."""
    world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", sizes.get("ep", 1))
    results = run_ranks(one_step, world, sizes, moe, timeout=120)
    if sizes.get("ep", 1) > 1:
        assert len({count for *_, count in results}) > 1
    for got in results:
        assert_close(got[:3], alone[:3])


@pytest.mark.parametrize("sizes", [{}, {"pp": 2, "ep": 2}], ids=str)
def test_recomputation_and_micro_batches_do_not_matter(moe, alone, sizes):
    world = sizes.get("pp", 1) * sizes.get("ep", 1)
    for got in run_ranks(one_step, world, sizes, moe, True, timeout=120):
        assert_close(got[:3], alone[:3])


def test_a_number_of_experts_that_ep_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"moe\.experts=4 does not divide by ep=3; allowed ep: 1, 2, 4"):
        check_layout(moe_config(), tp=1, pp=1, ep=3)
