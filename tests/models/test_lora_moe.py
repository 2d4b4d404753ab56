"""Adapters on every linear of an MoE model and on the head: against merged weights, in any layout, over NF4."""

import re
from pathlib import Path

import pytest
import torch
from families import tiny_family
from layouts import ALONE, Layout, assert_close, assert_layouts_agree
from peft_case import adapted, build, learner, logits, samples, states, take_steps, train
from tiny import VOCAB, weight_pieces
from tiny_moe import moe_folder
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import AdapterOff, Role
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
LAYOUTS = (Layout(pp=2), Layout(tp=2, dp=2, ep=2), Layout(dp=4, ep=2))  # of two layers, one without experts


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    return moe_folder(tmp_path_factory.mktemp("base"), tied=request.param)


def merged(folder: Path, lora: LoRA, adapters: dict[str, Tensor]) -> Decoder:
    """A plain model, trained in full, with the adapters added to its weights; its head is never tied."""
    config = ModelConfig(**{**vars(read_config(folder)), "tie_embeddings": False})
    plain = Decoder(config, build_mesh(), dtype=torch.float32)
    base = {name: view for name, _, view in weight_pieces(build(folder, build_mesh(), None))}
    for name, _, view in weight_pieces(plain):
        view.copy_(base[name] if name in base else base["model.embed_tokens.weight"])
        a, b = (adapters.get(adapter_name(name, letter)) for letter in "AB")
        if a is not None and b is not None:
            view += lora.scale * b @ a
    return plain


def masters(folder: Path, lora: LoRA) -> dict[str, Tensor]:
    return states(learner(adapted(folder, lora)), "master")


def gradients_of(folder: Path, lora: LoRA, adapters: dict[str, Tensor], full: dict[str, Tensor]) -> dict[str, Tensor]:
    """dA = s Bᵀ dW and dB = s dW Aᵀ, with dW of the merged weights."""
    found: dict[str, Tensor] = {}
    for weight in (weight for some in adapted_weights(read_config(folder), lora).values() for weight in some):
        (a, b), dw = (adapter_name(weight.name, letter) for letter in "AB"), full[weight.name]
        found |= {a: lora.scale * adapters[b].t() @ dw, b: lora.scale * dw @ adapters[a].t()}
    return found


def test_step_equals_that_of_merged_weights(folder):
    """Logits and gradients against the merged model's, then AdamW on A and B by torch."""
    model, before = adapted(folder, EVERY), masters(folder, EVERY)
    assert {n: tuple(t.shape) for n, t in before.items()} == adapter_shapes(model.config, EVERY)
    plain = merged(folder, EVERY, before)
    assert_close(logits(model), logits(plain))
    trained, full = states(train(model, 1)), states(train(plain, 1), "grad")
    gradients = gradients_of(folder, EVERY, before, full)
    assert_close({n.removeprefix("grad/"): t for n, t in trained.items() if n.startswith("grad/")}, gradients)
    leaves = {name: torch.nn.Parameter(tensor) for name, tensor in before.items()}
    for name, leaf in leaves.items():
        leaf.grad = gradients[name]
    torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
    torch.optim.AdamW(leaves.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0).step()
    assert_close({n.removeprefix("master/"): t for n, t in trained.items() if n.startswith("master/")}, leaves, 1e-4)


def one_step(rank: int, world: int, layout: Layout, folder: Path, lora: LoRA) -> dict[str, Tensor]:
    return states(train(adapted(folder, lora, layout), 1))


def test_normalized_head_equals_that_of_merged_weights(tmp_path):
    """Baichuan2's: the rows are normalized with their adapter; each TP rank normalizes its own."""
    folder, lora = tiny_family(tmp_path, "baichuan2-7b"), LoRA(2, 4.0, ("head",))
    before = masters(folder, lora)
    full = states(train(merged(folder, lora, before), 1), "grad")
    alone = assert_layouts_agree(one_step, [Layout(tp=2)], folder, lora)
    for name, gradient in gradients_of(folder, lora, before, full).items():
        assert_close(alone[f"grad/{name}"], gradient)


@pytest.mark.parametrize("lora", [EVERY, QUANTIZED], ids=["lora", "qlora"])
def test_layouts_and_recomputation_agree(folder, lora):
    alone = assert_layouts_agree(take_steps, LAYOUTS, folder, lora, tolerance=3e-5)
    assert_close(take_steps(0, 1, ALONE, folder, lora, recompute=True), alone)


@pytest.mark.parametrize("targets", [("head",), ("experts.up", "shared.down"), ("router", "experts.down")])
def test_layouts_agree_with_a_stage_without_adapters(tmp_path, targets):
    folder, lora = moe_folder(tmp_path, mlp_only_layers=[0], tied=True), LoRA(2, 4.0, targets)
    alone = assert_layouts_agree(take_steps, [Layout(pp=2)], folder, lora, tolerance=3e-5)
    gradients = {name for name in alone if name.startswith("grad/")}
    assert gradients == {f"grad/{name}" for name in adapter_shapes(read_config(folder), lora)}


def test_adapters_are_disabled_exactly_and_used_in_generation(folder):
    """The generator's greedy tokens and logprobs are the merged weights', packed (12 tokens) and not (4)."""
    model, base = adapted(folder, EVERY), build(folder, build_mesh(), None)
    enabled = logits(model)
    with model.adapter_off():
        assert torch.equal(logits(model), logits(base))
    batch = pack(samples(VOCAB))
    assert torch.equal(AdapterOff(model).logprobs(batch), Role(base).logprobs(batch))
    assert torch.equal(logits(model), enabled) and (enabled - logits(base)).abs().max() > 0.1
    prompts, plain = samples(VOCAB)[:3], merged(folder, EVERY, masters(folder, EVERY))
    for count in (4, 12):
        params = SamplingParams(temperature=0, max_new_tokens=count)
        got, expected = (EmbeddedGenerator(m, m.mesh).generate(prompts, [0, 1, 2], params) for m in (model, plain))
        for one, other in zip(got, expected, strict=True):
            assert one.tokens == other.tokens
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_quantized_model_equals_its_dequantized_weights(folder):
    """Logits, gradients and a step; all matrices but embedding, head and routers are in NF4."""
    model, floats = adapted(folder, QUANTIZED), adapted(folder, EVERY)
    names = {name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, NF4Weight)}
    kinds = {re.sub(r"^layers\.\d+\.", "", name) for name in names}
    experts = {f"mlp.{module}.{linear}" for module in ("experts", "shared") for linear in ("gate_up", "down")}
    assert kinds == {"attention.qkv", "attention.output", "mlp.gate_up", "mlp.down"} | experts
    exact = logits(floats)
    with torch.no_grad():
        for name in names:
            nf4 = model.get_submodule(f"{name}.nf4")
            assert isinstance(nf4, NF4Weight) and model.get_parameter(f"{name}.weight").is_meta
            floats.get_parameter(f"{name}.weight").copy_(nf4.unpacked(torch.float32))
    assert_close(logits(model), logits(floats))
    assert (logits(model) - exact).norm() > 0.01 * exact.norm()  # it is quantized
    assert_close(states(train(model, 1)), states(train(floats, 1)))
