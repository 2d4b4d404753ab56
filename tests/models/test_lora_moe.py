"""Adapters on every linear of a mixture and on the head: against merged weights, in any layout, over NF4."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from harness import run_ranks
from layouts import assert_close
from peft_case import adapted, build, held, learner, masters, samples, train
from tiny import VOCAB, weight_pieces
from tiny_moe import mixture, world_of
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.nf4 import NF4Weight
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.lora import EVERY_TARGET, adapted_weights, adapter_name, adapter_shapes

EVERY = LoRA(4, 8.0, EVERY_TARGET)
QUANTIZED = LoRA(4, 8.0, EVERY_TARGET, quantize=True)
LAYOUTS = [{"pp": 2}, {"tp": 2, "ep": 2}, {"dp": 4, "ep": 2}]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    return mixture(tmp_path_factory.mktemp("base"), tied=request.param)


def merged(folder: Path, lora: LoRA, adapters: dict[str, Tensor]) -> Decoder:
    """A plain model, trained in full, with the adapters added to its weights; its head is its own, never tied."""
    config = read_config(folder)
    own = Decoder(ModelConfig(**{**vars(config), "tie_embeddings": False}), build_mesh(), dtype=torch.float32)
    theirs = {name: view for name, _, view in weight_pieces(build(folder, build_mesh(), None))}
    for name, _, view in weight_pieces(own):
        view.copy_(theirs[name] if name in theirs else theirs["model.embed_tokens.weight"])
        a, b = (adapters.get(adapter_name(name, letter)) for letter in "AB")
        if a is not None and b is not None:
            view += lora.scale * b @ a
    return own


def test_logits_gradients_and_a_step_are_those_of_the_merged_weights(folder):
    """dA = s Bᵀ dW and dB = s dW Aᵀ, with dW of the merged weights trained in full; then AdamW on A and B by torch."""
    model = adapted(folder, EVERY)
    before = {n: t.clone() for n, t in masters(learner(adapted(folder, EVERY))).items()}
    assert {n: tuple(t.shape) for n, t in before.items()} == adapter_shapes(model.config, EVERY)
    plain, batch = merged(folder, EVERY, before), pack(samples(VOCAB))
    with torch.no_grad():
        got, expected = (m.logits(stage_forward(m, batch, None)) for m in (model, plain))
    assert_close({"logits": got}, {"logits": expected})

    ours, weights = held(train(model, 1)), held(train(plain, 1))
    gradients: dict[str, Tensor] = {}
    for place in (place for found in adapted_weights(model.config, EVERY).values() for place in found):
        a, b = (adapter_name(place.name, letter) for letter in "AB")
        dw = weights[f"grad/{place.name}"]
        gradients |= {a: EVERY.scale * before[b].t() @ dw, b: EVERY.scale * dw @ before[a].t()}
    assert_close({n.removeprefix("grad/"): t for n, t in ours.items() if n.startswith("grad/")}, gradients)

    leaves = {name: torch.nn.Parameter(tensor) for name, tensor in before.items()}
    for name, leaf in leaves.items():
        leaf.grad = gradients[name]
    torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
    torch.optim.AdamW(leaves.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0).step()
    assert_close({n.removeprefix("master/"): t for n, t in ours.items() if n.startswith("master/")}, dict(leaves), 1e-4)


def test_a_normalized_head_is_that_of_the_merged_weights(tmp_path):
    """Baichuan2's: rows and their adapter are normalized together; over tp each rank takes its own rows' lengths."""
    folder, lora = tiny_family(tmp_path, "baichuan2-7b"), LoRA(2, 4.0, ("head",))
    before = {n: t.clone() for n, t in masters(learner(adapted(folder, lora))).items()}
    a, b = (adapter_name("lm_head.weight", letter) for letter in "AB")
    dw = held(train(merged(folder, lora, before), 1))["grad/lm_head.weight"]
    expected = {a: lora.scale * before[b].t() @ dw, b: lora.scale * dw @ before[a].t()}
    alone = steps_taken(0, 1, folder, lora, {}, 1)
    assert_close({name: alone[f"grad/{name}"] for name in expected}, expected)
    for got in run_ranks(steps_taken, 2, folder, lora, {"tp": 2}, 1):
        assert_close(got, alone)


def steps_taken(
    rank: int, world: int, folder: Path, lora: LoRA, sizes: dict[str, Any], steps: int = 2, recompute: bool = False
) -> dict[str, Tensor]:
    return held(train(adapted(folder, lora, sizes, recompute=recompute), steps))


@pytest.mark.parametrize("lora", [EVERY, QUANTIZED], ids=["lora", "qlora"])
def test_layouts_equal_one_process_after_two_steps(folder, lora):
    alone = steps_taken(0, 1, folder, lora, {})
    for sizes in LAYOUTS:
        for got in run_ranks(steps_taken, world_of(sizes), folder, lora, sizes):
            assert_close(got, alone, 3e-5)


@pytest.mark.parametrize("lora", [EVERY, QUANTIZED], ids=["lora", "qlora"])
def test_recomputation_does_not_matter(folder, lora):
    assert_close(steps_taken(0, 1, folder, lora, {}, recompute=True), steps_taken(0, 1, folder, lora, {}))


@pytest.mark.parametrize(
    "targets", [("head",), ("experts.up", "shared.down"), ("router", "experts.down")], ids="-".join
)
def test_some_targets_where_a_stage_may_have_nothing_to_train(tmp_path, targets):
    folder, lora = mixture(tmp_path, mlp_only_layers=[0], tied=True), LoRA(2, 4.0, targets)
    alone = steps_taken(0, 1, folder, lora, {})
    assert {n.removeprefix("grad/") for n in alone if n.startswith("grad/")} == set(
        adapter_shapes(read_config(folder), lora)
    )
    for got in run_ranks(steps_taken, 2, folder, lora, {"pp": 2}):
        assert_close(got, alone, 3e-5)


def test_adapters_off_are_the_base_bit_for_bit_and_the_optimizer_holds_the_adapters_alone(folder):
    model, base, batch = adapted(folder, EVERY), build(folder, build_mesh(), None), pack(samples(VOCAB))
    with torch.no_grad():
        expected = base.logits(stage_forward(base, batch, None))
        on = model.logits(stage_forward(model, batch, None))
        with model.adapter_off():
            assert torch.equal(model.logits(stage_forward(model, batch, None)), expected)
        assert torch.equal(model.logits(stage_forward(model, batch, None)), on)
    assert (on - expected).abs().max() > 0.1
    trained = train(model, 1)
    names = {name for bucket in trained.optimizer.buckets for name, _ in bucket.named}
    assert names == {name for name, _ in model.named_parameters() if name.endswith(("lora_a", "lora_b"))}
    theirs = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert name in names or torch.equal(parameter, theirs[name]), name


def test_the_generator_samples_with_the_adapters(folder):
    """The same greedy tokens and logprobs as from the merged weights, by packed copies of them and without."""
    model = adapted(folder, EVERY)
    prompts, plain = samples(VOCAB)[:3], merged(folder, EVERY, masters(learner(adapted(folder, EVERY))))
    for count in (4, 12):
        params = SamplingParams(temperature=0, max_new_tokens=count)
        got, expected = (EmbeddedGenerator(m, m.mesh).generate(prompts, [0, 1, 2], params) for m in (model, plain))
        for one, other in zip(got, expected, strict=True):
            assert one.tokens == other.tokens
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_quantized_mixture_is_the_dequantized_one(folder):
    """Logits, gradients and a step; in NF4 are all matrices but the embedding, the head and the routers."""
    model, floats = adapted(folder, QUANTIZED), adapted(folder, EVERY)
    names = {name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, NF4Weight)}
    assert {re.sub(r"^layers\.\d+\.", "", name) for name in names} == {
        "attention.qkv", "attention.output", "mlp.gate_up", "mlp.down",
        "mlp.experts.gate_up", "mlp.experts.down", "mlp.shared.gate_up", "mlp.shared.down",
    }  # fmt: skip
    batch = pack(samples(VOCAB))
    with torch.no_grad():
        got, exact = (m.logits(stage_forward(m, batch, None)) for m in (model, floats))
        for name in names:
            nf4, weight = model.get_submodule(f"{name}.nf4"), floats.get_parameter(f"{name}.weight")
            assert isinstance(nf4, NF4Weight) and model.get_parameter(f"{name}.weight").is_meta
            weight.copy_(nf4.dequantized(torch.float32))
        expected = floats.logits(stage_forward(floats, batch, None))
    assert_close({"logits": got}, {"logits": expected})
    assert (got - exact).norm() > 0.01 * exact.norm()  # quantized it is
    assert_close(held(train(model, 1)), held(train(floats, 1)))
