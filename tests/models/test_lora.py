"""LoRA against peft: logits, gradients and the start; and any layout against one process."""

import math
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from layouts import assert_close
from peft_case import (
    MODULES,
    build,
    held,
    learner,
    peft_model,
    samples,
    save_peft,
    train,
    two_steps,
)
from tiny import VOCAB, tiny_llama
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import AdapterOff, Role, stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.models.config import ModelConfig
from trialign.models.families.registry import read_config
from trialign.models.lora import TARGETS, adapter_shapes, check_lora, trained_name

ALL = LoRA(4, 8.0, TARGETS)
LAYOUTS = [(1, 2, 2), (2, 1, 2), (4, 1, 1)]  # the last: more ranks than kv heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    return save_peft(peft_model(folder, ALL), tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize(
    "lora",
    [ALL, LoRA(2, 16.0, ("q", "v")), LoRA(8, 4.0, ("output", "up"), rslora=True), LoRA(3, 6.0, ("k", "gate", "down"))],
    ids=lambda lora: "-".join(lora.targets),
)
def test_logits_and_gradients_are_pefts(folder, tmp_path, lora):
    wrapped = peft_model(folder, lora)
    model = build(folder, build_mesh(), lora, save_peft(wrapped, tmp_path))
    rows = samples(VOCAB)
    with torch.no_grad():
        expected = torch.cat([wrapped(torch.tensor([row])).logits[0] for row in rows])
        got = model.logits(stage_forward(model, pack(rows), None))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    loss = torch.zeros(())
    for row in rows:
        logits = wrapped(torch.tensor([row])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    (loss / sum(len(row) - 1 for row in rows)).backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    ours = held(train(model, 1))
    assert_close({n.removeprefix("grad/"): t for n, t in ours.items() if n.startswith("grad/")}, theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout))
def test_layouts_equal_one_process_after_two_steps(folder, adapter, layout):
    alone = two_steps(0, 1, folder, ALL, adapter, (1, 1, 1))
    for got in run_ranks(two_steps, math.prod(layout), folder, ALL, adapter, layout):
        assert_close(got, alone)


def test_some_targets_in_a_layout_of_all_axes(folder, tmp_path):
    """Linears with an adapter on one of their parts only, beside linears with none."""
    lora = LoRA(2, 4.0, ("v", "up", "down"))
    adapter = save_peft(peft_model(folder, lora), tmp_path)
    alone = two_steps(0, 1, folder, lora, adapter, (1, 1, 1))
    for got in run_ranks(two_steps, 8, folder, lora, adapter, (2, 2, 2)):
        assert_close(got, alone)


def fresh(rank: int, world: int, folder: Path, tp: int, pp: int) -> dict[str, torch.Tensor]:
    return held(learner(build(folder, build_mesh(tp=tp, pp=pp), ALL)))


def test_the_start_is_pefts_and_the_same_in_every_layout(folder):
    alone = {n.removeprefix("master/"): t for n, t in fresh(0, 1, folder, 1, 1).items() if n.startswith("master/")}
    assert {n: tuple(t.shape) for n, t in alone.items()} == adapter_shapes(read_config(folder), ALL)
    for name, tensor in alone.items():
        if ".lora_B." in name:
            assert not tensor.any(), name
        else:  # Kaiming's uniform distribution with a = √5: ±1/√in, deviation 1/√(3 in)
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound and 0.8 < tensor.std() * 3**0.5 / bound < 1.2, name
    different = {tuple(tensor.flatten()[:4].tolist()) for name, tensor in alone.items() if ".lora_A." in name}
    assert len(different) == 4 * len(TARGETS)
    for got in run_ranks(fresh, 4, folder, 2, 2):
        for name, tensor in alone.items():
            assert torch.equal(got[f"master/{name}"], tensor), name


def test_adapters_off_are_the_base_bit_for_bit_and_fresh_ones_change_nothing(folder, adapter):
    mesh, batch = build_mesh(), pack(samples(VOCAB))
    base = Role(build(folder, mesh, None)).logprobs(batch)
    trained = build(folder, mesh, ALL, adapter)
    assert torch.equal(AdapterOff(trained).logprobs(batch), base)
    assert (Role(trained).logprobs(batch) - base).abs().max() > 0.01  # and on again afterwards
    assert torch.equal(Role(build(folder, mesh, ALL)).logprobs(batch), base)


def test_gradients_and_optimizer_hold_the_adapters_alone(folder):
    trained = train(build(folder, build_mesh(), ALL), 1)
    numbers = sum(math.prod(shape) for shape in adapter_shapes(trained.model.config, ALL).values())
    optimizer = trained.optimizer
    state = sum(tensor.numel() for bucket in optimizer.buckets for tensor in bucket.states.values())
    padding = 64 * len(optimizer.buckets)
    assert 3 * numbers <= state <= 3 * (numbers + padding)
    assert numbers <= sum(bucket.grads.numel() for bucket in optimizer.buckets) <= numbers + padding
    assert numbers < 0.35 * sum(p.numel() for p in trained.model.parameters() if not p.requires_grad)
    frozen = build(folder, build_mesh(), None)
    theirs = dict(frozen.named_parameters())
    for name, parameter in trained.model.named_parameters():
        assert parameter.grad is None
        if not parameter.requires_grad:
            assert torch.equal(parameter, theirs[name]), name


def test_a_critic_trains_its_adapters_and_its_whole_score_head(folder):
    critic = build(folder, build_mesh(), LoRA(2, 4.0, ("q",)), head="score")
    trained = {
        trained_name(n, "q" * ("lora" in n), critic.config, "score")
        for n, p in critic.named_parameters()
        if p.requires_grad
    }
    assert trained == {"score.weight"} | set(adapter_shapes(critic.config, LoRA(2, 4.0, ("q",))))


def test_refusals(folder):
    shape = read_config(folder)
    with pytest.raises(ValueError, match="rank=0: must be at least 1"):
        LoRA(0, 1.0, TARGETS)
    with pytest.raises(ValueError, match="alpha=nan: must be above 0"):
        LoRA(1, math.nan, TARGETS)
    with pytest.raises(ValueError, match="rows of a multiple of 64; hidden_size=32 is not"):
        check_lora(shape, LoRA(1, 1.0, TARGETS, quantize=True), tp=1)
    wide = ModelConfig(**{**vars(shape), "hidden_size": 128, "num_heads": 4, "head_dim": 32, "ffn_size": 192})
    check_lora(wide, LoRA(1, 1.0, TARGETS, quantize=True), tp=1)
    with pytest.raises(ValueError, match="multiple of 64; ffn_size=192 over tp=2 is not"):
        check_lora(wide, LoRA(1, 1.0, TARGETS, quantize=True), tp=2)
    with pytest.raises(ValueError, match="lora.targets.* no experts.up, lm_head; allowed: q, k, v, output, gate, up"):
        check_lora(shape, LoRA(1, 1.0, ("q", "experts.up", "lm_head")), tp=1)
    for targets in (("all", "q"), ("q", "q"), ()):
        with pytest.raises(ValueError, match=r"targets=\("):
            LoRA(1, 1.0, targets)
    check_lora(shape, LoRA(1, 1.0, ("all",)), tp=1)
    assert set(MODULES) == set(TARGETS)
