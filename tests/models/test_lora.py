"""LoRA against peft, NF4 against bitsandbytes; and any layout against one process."""

import math
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from layouts import ALONE, Layout, assert_close, assert_layouts_agree
from peft_case import build, logits, masters, peer_logits, peft_model, samples, save_peft, states, take_steps, train
from tiny import VOCAB, tiny_llama
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.nf4 import NF4Weight
from trialign.kernels.nf4 import dequantize_nf4, dequantize_scales, quantize_nf4, quantize_scales
from trialign.models.config import ModelConfig
from trialign.models.families.registry import read_config
from trialign.models.lora import TARGETS, adapter_shapes, check_lora

ALL = LoRA(4, 8.0, TARGETS)
LAYOUTS = (Layout(pp=2, dp=2), Layout(tp=4))  # the last: more ranks than key/value heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "lora",
    [ALL, LoRA(8, 4.0, ("output", "up"), rslora=True), LoRA(3, 6.0, ("k", "gate", "down"))],
    ids=lambda lora: "-".join(lora.targets),
)
def test_logits_and_gradients_equal_peft(folder, tmp_path, lora):
    wrapped = peft_model(folder, lora)
    model, rows = build(folder, build_mesh(), lora, save_peft(wrapped, tmp_path)), samples(VOCAB)
    torch.testing.assert_close(logits(model), peer_logits(wrapped), rtol=1e-5, atol=1e-5)
    loss = torch.zeros(())
    for row in rows:
        out = wrapped(torch.tensor([row])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(out, torch.tensor(row[1:]), reduction="sum")
    (loss / sum(len(row) - 1 for row in rows)).backward()
    expected = {n.replace(".default", ""): p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert_close(states(train(model, 1), "grad"), expected)


def test_layouts_agree(folder, tmp_path):
    """All targets; and, over all axes, adapters on a part of a fused linear beside linears without."""
    adapter = save_peft(peft_model(folder, ALL), tmp_path / "all")
    assert_layouts_agree(take_steps, LAYOUTS, folder, ALL, adapter)
    some = LoRA(2, 4.0, ("v", "up", "down"))
    partial_adapter = save_peft(peft_model(folder, some), tmp_path / "some")
    assert_layouts_agree(take_steps, [Layout(2, 2, 2)], folder, some, partial_adapter)


def test_initial_adapters_equal_pefts_and_have_no_effect(folder):
    alone = masters(0, 1, ALONE, folder, ALL)
    assert {n: tuple(t.shape) for n, t in alone.items()} == adapter_shapes(read_config(folder), ALL)
    for name, tensor in alone.items():
        if ".lora_B." in name:
            assert not tensor.any(), name
        else:  # Kaiming's uniform distribution with a = √5: ±1/√in, deviation 1/√(3 in)
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound and 0.8 < tensor.std() * 3**0.5 / bound < 1.2, name
    different = {tuple(tensor.flatten()[:4].tolist()) for name, tensor in alone.items() if ".lora_A." in name}
    assert len(different) == 4 * len(TARGETS)
    models = [build(folder, build_mesh(), lora) for lora in (ALL, None)]
    assert torch.equal(*map(logits, models))
    for got in run_ranks(masters, 4, Layout(tp=2, pp=2), folder, ALL):
        assert_close(got, alone, 0)


def test_invalid_options_are_refused(folder):
    shape = read_config(folder)
    wide = ModelConfig(**{**vars(shape), "hidden_size": 128, "num_heads": 4, "head_dim": 32, "ffn_size": 192})
    quantized = LoRA(1, 1.0, TARGETS, quantize=True)
    check_lora(shape, LoRA(1, 1.0, ("all",)), tp=1)
    check_lora(wide, quantized, tp=1)
    for call, message in (
        (lambda: LoRA(0, 1.0, TARGETS), "rank=0"),
        (lambda: LoRA(1, math.nan, TARGETS), "alpha=nan"),
        (lambda: LoRA(1, 1.0, ("all", "q")), "targets="),
        (lambda: LoRA(1, 1.0, ("q", "q")), "targets="),
        (lambda: LoRA(1, 1.0, ()), "targets="),
        (lambda: check_lora(shape, quantized, tp=1), "lora.quantize: .* 64; hidden_size=32"),
        (lambda: check_lora(wide, quantized, tp=2), "lora.quantize: .* 64; ffn_size=192 over tp=2"),
        (lambda: check_lora(shape, LoRA(1, 1.0, ("q", "experts.up")), tp=1), "lora.targets: .*experts.up; allowed: q"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_equal_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = (torch.randn(300, 320) * torch.rand(300, 1)).to(dtype)  # 1500 scales: five groups and a part of one
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax = quantize_nf4(weight)
    assert torch.equal(codes.flatten(), packed.flatten())
    scales, groups, offset = quantize_scales(absmax)
    torch.testing.assert_close(offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(groups, state.state2.absmax, rtol=1e-6, atol=1e-7)
    # bitsandbytes' search on a CPU sometimes misses the nearest of two values near their middle; trialign's never.
    peer_scales = state.absmax.view_as(scales)
    differ = scales != peer_scales
    assert differ.float().mean() < 0.005 and ((scales.int() - peer_scales.int()).abs() <= 1).all()
    exact = absmax[differ]
    own, other = (dequantize_scales(s, groups, offset)[differ] for s in (scales, peer_scales))
    assert ((own - exact).abs() <= (other - exact).abs() + 1e-7).all()
    torch.testing.assert_close(own, other, rtol=0.02, atol=0)
    got = dequantize_nf4(codes, dequantize_scales(peer_scales, groups, offset), torch.float32)
    expected = functional.dequantize_4bit(packed, state).float()
    rounding = 0 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got, expected, rtol=1e-5 + rounding, atol=1e-6)


def test_nf4_base_and_backward_hold_no_floats(tmp_path):
    folder = tiny_llama(tmp_path, hidden_size=128, intermediate_size=256)
    model = build(folder, build_mesh(), LoRA(4, 8.0, TARGETS, quantize=True))
    weights = sum(p.numel() for p in model.parameters() if p.is_meta)
    assert weights == 4 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 256)
    saved = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    batch = pack(samples(VOCAB))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = stage_forward(model, batch, None)
    hidden.sum().backward()
    quantized = [m for m in model.modules() if isinstance(m, NF4Weight)]
    stored = sum(b.numel() * b.element_size() for m in quantized for b in m.buffers())
    groups = sum(4 * math.ceil(math.prod(p.global_shape) / 64 / 256) for m in quantized for p in m.pieces)
    rows = sum(8 * len(m.codes) for m in quantized)
    assert stored == weights // 2 + weights // 64 + groups + rows  # 4.125 bits a weight, the groups' scales, the rows
    sizes = {n for m in quantized for n in (m.codes.numel() * 8, m.scales.numel() * 4)}
    assert {m.codes.data_ptr() for m in quantized[1:]} <= saved.keys()  # the first one's input needs no gradient
    activations = len(batch.tokens) * 4 * 256 * 2
    assert not [n for n in saved.values() if n in sizes and n > activations]
