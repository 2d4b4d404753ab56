"""SFT's optimizer step against transformers and in layouts."""

import random
from array import array
from pathlib import Path

import pytest
import torch
from layouts import ALONE, TWO_RANKS, Layout, assert_layouts_agree, whole_states
from tiny import VOCAB, tiny_llama
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import Sample, pack_samples
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.sft import eval_loss, sft_step
from trialign.models.families.registry import read_config


def rows(seed: int) -> list[Sample]:
    """Eight rows of 4 to 23 tokens with random targets; the first has a single target."""
    chance, samples = random.Random(seed), []
    for i in range(8):
        tokens = [chance.randrange(3, VOCAB) for _ in range(chance.randrange(4, 24))]
        mask = bytes([0, *(i > 0 and chance.random() < 0.5 for _ in tokens[1:-1]), 1])
        samples.append(Sample(array("i", tokens), mask, "", f"rows:{i}"))
    return samples


def two_steps(rank: int, world: int, layout: Layout, folder: Path):
    """Metrics of two steps, eval loss of five rows; whole gradients, moments and weights."""
    model = build_decoder(str(folder), read_config(folder), layout.mesh(), "float32", trained=True)
    # A large eps: Adam's first step turns the rounding of gradients that are all but 0 into whole steps otherwise.
    settings = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=0.5, weight_decay=0.1, warmup_ratio=0.0)
    learner = build_learner(model, settings, 4, ema_decay=0.9, sizes=UpdateConfig(batch_size=8, micro_batch_size=3))
    metrics = {}
    for step in range(2):
        metrics |= {f"{name}/{step}": v for name, v in sft_step(learner, pack_samples(rows(step))).items()}
    metrics["eval_loss"] = eval_loss(learner, pack_samples(rows(9)[:5]))  # 5 rows do not divide by dp
    return metrics, whole_states(actor=learner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(folder):
    return two_steps(0, 1, ALONE, folder)


def test_loss_and_gradient_equal_transformers(folder, alone):
    """One sample at a time, without packing."""
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
