"""QLoRA: the base in NF4 against bitsandbytes and against floats, the same in every layout, and its bytes counted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import assert_close
from peft_case import build, held, peft_model, samples, save_peft, train, two_steps
from tiny import VOCAB, tiny_llama
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.nf4 import NF4Weight
from trialign.engine.parallel.shard import shard_of
from trialign.kernels.nf4 import dequantize_nf4, dequantize_scales, quantize_nf4, quantize_scales
from trialign.models.decoder import Decoder
from trialign.models.lora import TARGETS

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
ON = LoRA(4, 8.0, TARGETS, quantize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    return save_peft(peft_model(folder, ON), tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = (torch.randn(300, 320) * torch.rand(300, 1)).to(dtype)  # 1500 scales: five groups and a part of one
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax = quantize_nf4(weight)
    assert torch.equal(codes.flatten(), packed.flatten())
    scales, groups, offset = quantize_scales(absmax)
    torch.testing.assert_close(offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(groups, state.state2.absmax, rtol=1e-6, atol=1e-7)
    # Its search on a CPU misses the nearest of two values now and then, next to the middle between them; ours never.
    theirs = state.absmax.view_as(scales)
    differ = scales != theirs
    assert differ.float().mean() < 0.005
    assert ((scales.int() - theirs.int()).abs() <= 1).all()
    exact = absmax[differ]
    own, other = (dequantize_scales(s, groups, offset)[differ] for s in (scales, theirs))
    assert ((own - exact).abs() <= (other - exact).abs() + 1e-7).all()
    torch.testing.assert_close(own, other, rtol=0.02, atol=0)
    # What it makes of its codes and scales is what we make of the same.
    ours = dequantize_nf4(codes, dequantize_scales(theirs, groups, offset), torch.float32)
    dequantized = functional.dequantize_4bit(packed, state).float()
    rounded = 0 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours, dequantized, rtol=1e-5 + rounded, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (64, 256), (300, 320)])
def test_scales_are_the_nearest_of_the_dynamic_type_and_any_rectangle_unpacks_to_its_part(shape):
    torch.manual_seed(0)
    _, absmax = quantize_nf4(torch.randn(shape))
    scales, groups, offset = quantize_scales(absmax)
    assert scales.dtype == torch.uint8 and len(groups) == math.ceil(absmax.numel() / 256)
    whole = dequantize_scales(scales, groups, offset)
    group = groups.repeat_interleave(256)[: absmax.numel()].view_as(absmax)
    assert ((whole - absmax).abs() <= 0.0071 * group + 1e-6).all()  # half of the type's widest gap, 0.9 / 64
    rows, cols = slice(shape[0] // 3, shape[0]), slice(absmax.shape[1] // 2, absmax.shape[1])
    start = shape[0] // 3, absmax.shape[1] // 2
    assert torch.equal(dequantize_scales(scales[rows, cols], groups, offset, start, absmax.shape[1]), whole[rows, cols])


def in_floats(model: Decoder, folder: Path, adapter: Path) -> Decoder:
    """A model like `model`, with the numbers that its NF4 weights stand for held as floats."""
    plain = build(folder, build_mesh(), LoRA(4, 8.0, TARGETS), adapter)
    held_ = dict(model.named_modules())
    for name, module in plain.named_modules():
        if f"{name}.nf4" in held_:
            weight = held_[f"{name}.nf4"]
            assert isinstance(weight, NF4Weight) and isinstance(module.weight, Tensor)
            module.weight.data.copy_(weight.dequantized(torch.float32))
    return plain


def test_logits_and_gradients_are_those_of_the_dequantized_weights(folder, adapter):
    model = build(folder, build_mesh(), ON, adapter)
    plain, base = in_floats(model, folder, adapter), build(folder, build_mesh(), LoRA(4, 8.0, TARGETS), adapter)
    batch = pack(samples(VOCAB))
    with torch.no_grad():
        got, expected, exact = (m.logits(stage_forward(m, batch, None)) for m in (model, plain, base))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - exact).norm() > 0.01 * exact.norm()  # quantized it is
    assert_close(held(train(model, 2)), held(train(plain, 2)))


@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 2, 1)], ids=str)
def test_layouts_equal_one_process_after_two_steps(folder, adapter, layout):
    alone = two_steps(0, 1, folder, ON, adapter, (1, 1, 1))
    for got in run_ranks(two_steps, math.prod(layout), folder, ON, adapter, layout):
        assert_close(got, alone)


def rectangles(rank: int, world: int, folder: Path, tp: int, pp: int) -> list[tuple]:
    """(parameter, part, offset, numbers) of every piece of every quantized weight."""
    model = build(folder, build_mesh(tp=tp, pp=pp), ON)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, NF4Weight):
            weight = module.dequantized(torch.float32)
            for piece, numbers in zip(module.pieces, weight.split([p.shape[0] for p in module.pieces]), strict=True):
                found.append((name, piece.part, piece.offset, numbers))
    return found


def test_every_layout_multiplies_by_the_very_same_numbers(folder):
    alone = {(name, part): numbers for name, part, _, numbers in rectangles(0, 1, folder, 1, 1)}
    assert len(alone) == 4 * 7
    seen = 0
    for rank in run_ranks(rectangles, 4, folder, 2, 2):
        for name, part, offset, numbers in rank:
            place = tuple(slice(o, o + n) for o, n in zip(offset, numbers.shape, strict=True))
            assert torch.equal(numbers, alone[name, part][place]), (name, part)
            seen += numbers.numel()
    assert seen == sum(numbers.numel() for numbers in alone.values())


def test_a_base_of_4_bits_a_weight_and_nothing_in_floats_kept_for_the_backward(folder):
    model = build(folder, build_mesh(), ON)
    weights = sum(p.numel() for p in model.parameters() if p.is_meta)
    assert weights == 4 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 256)
    held_bytes = {}

    def count(tensor: Tensor) -> Tensor:
        held_bytes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    batch = pack(samples(VOCAB))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = stage_forward(model, batch, None)
    hidden.sum().backward()
    quantized = [m for m in model.modules() if isinstance(m, NF4Weight)]
    stored = sum(b.numel() * b.element_size() for m in quantized for b in m.buffers())
    groups = sum(
        4 * (math.ceil(p.global_shape[0] * p.global_shape[1] / 64 / 256) + 1) for m in quantized for p in m.pieces
    )
    assert stored == weights // 2 + weights // 64 + groups  # 4.125 bits a weight and the groups' scales
    assert not any(m.filled for m in quantized)
    # Of a weight the backward keeps its codes: a tensor of its own size in floats is not among what is saved.
    sizes = {n for m in quantized for n in (m.codes.numel() * 8, m.scales.numel() * 4)}
    codes = {m.codes.data_ptr() for m in quantized[1:]}  # the first one's input needs no gradient
    activations = len(batch.tokens) * 4 * 256 * 2
    assert codes <= held_bytes.keys()
    assert not [n for n in held_bytes.values() if n in sizes and n > activations]
    floats = [n for n, p in model.named_parameters() if not p.is_meta and not shard_of(p).adapter]
    assert all("norm" in n or n in ("embedding.weight", "head.weight") for n in floats)


def test_rows_that_hold_no_whole_blocks_are_refused(tmp_path):
    folder = tiny_llama(tmp_path, hidden_size=96, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"NF4 needs rows of a multiple of 64 weights: \[96, 96\] leaves rows of 96"):
        build(folder, build_mesh(), ON)
