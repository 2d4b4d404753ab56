"""SFT's update against transformers, in every layout and for every cut of the batch."""

import json
import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import ALONE, TWO_RANKS, Layout, assert_close, assert_layouts_agree, whole_states
from tiny import VOCAB, tiny_llama
from trialign.algorithms.config.common import OptimizerConfig, ParallelConfig
from trialign.algorithms.config.sft import SFTData
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import DialogueDataset, Sample, joined, pack_samples
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.sft import eval_loss, sft_step
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import read_config
from trialign.models.hf.tokenizer import stop_ids

UPDATE = UpdateConfig(batch_size=8, micro_batch_size=4)


def rows(seed: int) -> list[Sample]:
    """Eight rows of 4 to 24 tokens with one to three stretches of targets; one has but a single target."""
    chance = random.Random(seed)
    made = []
    for i in range(8):
        tokens = [chance.randrange(3, VOCAB) for _ in range(chance.randrange(4, 24))]
        mask = [0, *(chance.random() < 0.5 for _ in tokens[1:-1]), 1]
        made.append(Sample(array("i", tokens), bytes(mask) if i else bytes(len(tokens) - 1) + b"\1", "", f"rows:{i}"))
    return made


def two_steps(
    rank: int,
    world: int,
    layout: Layout,
    folder: Path,
    update: UpdateConfig = UPDATE,
    recompute: bool = False,
    backwards: bool = False,
):
    """Two steps and a look at other rows; metrics, and gradients and weights put together from all ranks."""
    mesh = layout.mesh()
    shape = read_config(folder)
    parallel = ParallelConfig(recompute=recompute)
    model = build_decoder(str(folder), shape, mesh, "float32", trained=True, parallel=parallel)
    # A large eps: Adam's first step turns the rounding of gradients that are all but 0 into whole steps otherwise.
    settings = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=0.5, weight_decay=0.1, warmup_ratio=0.0)
    learner = build_learner(model, settings, 4, ema_decay=0.9, sizes=update)
    metrics = {}
    for step in range(2):
        samples = rows(step)[:: -1 if backwards else 1]
        batch = pack_samples(samples)
        metrics |= {f"{name}/{step}": v for name, v in sft_step(learner, batch).items()}
    metrics["held out"] = eval_loss(learner, pack_samples(rows(9)[:5]))  # 5 rows, whatever dp is
    return metrics, whole_states(actor=learner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(folder):
    return two_steps(0, 1, ALONE, folder)


def test_the_loss_is_transformers_over_all_targets_of_the_batch(folder, alone):
    """One sample after the other, without packing; gradients as autograd gives them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = rows(0)
    targets = sum(sample.targets for sample in samples)
    total = torch.tensor(0.0)
    for sample in samples:
        tokens = torch.tensor(sample.tokens.tolist())[None]
        labels = torch.where(torch.tensor(list(sample.mask)).bool(), tokens, -100)
        loss = model(input_ids=tokens, labels=labels, num_items_in_batch=targets).loss
        loss.backward()
        total += loss.detach()
    assert alone[0]["loss/0"] == pytest.approx(total.item(), rel=1e-6)
    assert alone[0]["target_tokens/0"] == targets
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert alone[0]["grad_norm/0"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", [*TWO_RANKS, Layout(pp=2, dp=2)], ids=str)
def test_layouts_equal_one_process(folder, alone, layout):
    assert_layouts_agree(two_steps, [layout], folder, expected=alone)


@pytest.mark.parametrize(
    ("changes", "recompute", "backwards"),
    [
        ({"micro_batch_size": 1}, False, False),
        ({"micro_batch_size": 3}, False, True),
        ({"micro_batch_tokens": 30}, False, False),
        ({"micro_batch_tokens": 1000}, False, True),
        ({}, True, False),
    ],
    ids=["one by one", "by threes, backwards", "small budget", "all at once, backwards", "recomputed"],
)
def test_cut_order_and_recomputation_do_not_matter(folder, alone, changes, recompute, backwards):
    assert_close(two_steps(0, 1, ALONE, folder, replace(UPDATE, **changes), recompute, backwards), alone)


def test_two_data_ranks_by_a_token_budget(folder, alone):
    assert_layouts_agree(two_steps, [Layout(dp=2)], folder, replace(UPDATE, micro_batch_tokens=30), expected=alone)


def test_smollm2_s_first_loss_is_transformers(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = [("What is 2 + 3?", "2 + 3 = 5."), ("Name a color.", "Blue is a color, and so is green.")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in text))
    shape, tokenizer = read_config(smollm2), AutoTokenizer.from_pretrained(smollm2)
    data = DialogueDataset(SFTData(sources=(str(path),)), tokenizer, stop_ids(smollm2, shape, tokenizer))
    samples = joined(data.next(2))
    batch = pack_samples(samples)
    mesh = build_mesh()
    model = build_decoder(str(smollm2), shape, mesh, "float32", trained=True)
    learner = build_learner(model, OptimizerConfig(lr=0.0), 1)
    metrics = sft_step(learner, batch)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    total = 0.0
    for sample in samples:
        tokens = torch.tensor(sample.tokens.tolist())[None]
        labels = torch.where(torch.tensor(list(sample.mask)).bool(), tokens, -100)
        with torch.no_grad():
            total += theirs(input_ids=tokens, labels=labels, num_items_in_batch=len(batch.response)).loss.item()
    assert abs(metrics["loss"] - total) < 1e-4
