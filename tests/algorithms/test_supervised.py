"""SFT, reward models, DPO and its kin, KTO: against transformers and the papers' formulas, and in layouts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import ALONE, TWO_RANKS, Layout, assert_layouts_agree
from preferences import KTO, labeled, odd_batches, pairs, steps, two_steps
from tiny import VOCAB, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.preference import DPOLoss
from trialign.algorithms.data.dialogues import pack_samples
from trialign.algorithms.data.preferences import mismatched
from trialign.algorithms.dpo import dpo_eval, dpo_step, reference_sums, with_reference
from trialign.algorithms.kto import kto_eval, kto_step, pack_labeled, reference_point
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_quality, pair_step, process_step
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role
from trialign.algorithms.sft import sft_step
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import head_of, read_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "lm": tiny_llama(root / "lm"),
        "reference": tiny_llama(root / "reference", seed=1),
        "score": tiny_llama(root / "score", score=True),
    }


@pytest.fixture(scope="module")
def alone(folders):
    return two_steps(0, 1, ALONE, folders)


@pytest.mark.parametrize("layout", [*TWO_RANKS, Layout(tp=2, pp=2)], ids=str)
def test_layouts_equal_one_process(folders, alone, layout):
    """Two steps: loss, gradients, weights; and eval metrics of seven rows, which divide by no layout."""
    assert_layouts_agree(two_steps, [layout], folders, expected=alone)


def test_kto_on_batches_that_dp_does_not_divide(folders, tmp_path):
    """Uneven micro-batches, one row a rank among them, also where DP ranks share experts."""
    assert_layouts_agree(odd_batches, (Layout(dp=2), Layout(dp=3)), folders, (7, 5, 3))
    experts = {name: tiny_mixtral(tmp_path / name, vocab_size=VOCAB) for name in ("lm", "reference")}
    assert_layouts_agree(odd_batches, [Layout(dp=2, ep=2)], experts, (7,), 1)


def learner_of(folder) -> Learner:
    kind = "score" if head_of(read_config(folder)) == "score" else "lm"
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", head=kind, trained=True)
    return build_learner(model, OptimizerConfig(lr=0.0, max_grad_norm=0.0), 1)


def role_of(folder) -> Role:
    return Role(build_decoder(str(folder), read_config(folder), build_mesh(), "float32"))


def transformers_model(folder) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    head = AutoModelForSequenceClassification if head_of(read_config(folder)) == "score" else AutoModelForCausalLM
    return head.from_pretrained(folder, dtype=torch.float32)


def response_sum(model, sample) -> Tensor:
    """log π of a sample's targets, by transformers."""
    tokens = torch.tensor(sample.tokens.tolist())
    logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
    return chosen[torch.tensor(list(sample.mask))[1:].bool()].sum()


def grad_norm(model) -> float:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_first_loss_is_log_2_where_policy_equals_reference(folders):
    learner, rows = learner_of(folders["lm"]), pairs(0)
    batch = with_reference(pack_pairs(rows), reference_sums(learner, rows, 8))
    metrics = dpo_step(learner, batch, DPOLoss(label_smoothing=0.1))
    # The reference was computed in the same micro-batches: not one bit differs.
    assert metrics["loss"] == torch.tensor(2.0).log().item() and (metrics["margin"], metrics["accuracy"]) == (0.0, 0.5)


@pytest.mark.parametrize(
    "loss",
    [
        DPOLoss(beta=0.3, label_smoothing=0.2, nll_coef=0.5, nll_average_log_probs=False),
        DPOLoss(beta=0.3, nll_coef=0.5, reference_free=True),
        DPOLoss(kind="robust", beta=0.3, label_smoothing=0.2),
        DPOLoss(kind="ipo", beta=0.3, average_log_probs=True),
        DPOLoss(kind="ipo", beta=0.3),
    ],
    ids=["cdpo, nll summed", "reference-free, nll", "robust", "ipo", "ipo, sum"],
)
def test_dpo_losses_and_gradients_equal_autograd_of_transformers(folders, loss):
    policy, reference, rows = transformers_model(folders["lm"]), transformers_model(folders["reference"]), pairs(0)
    terms, nats, gaps = [], 0.0, []
    for pair in rows:
        chosen, rejected = (response_sum(policy, side) for side in pair[:2])
        mean, ratios = chosen / pair.chosen.targets, [chosen, rejected]
        if not loss.reference_free:
            ratios = [own - response_sum(reference, side).item() for own, side in zip(ratios, pair[:2], strict=True)]
        if loss.average_log_probs:
            ratios = [own / side.targets for own, side in zip(ratios, pair[:2], strict=True)]
        h = ratios[0] - ratios[1]
        e, sign = loss.label_smoothing, -1 if loss.kind == "robust" else 1
        own = -((1 - e) * F.logsigmoid(0.3 * h) + sign * e * F.logsigmoid(-0.3 * h)) / (0.6 if sign < 0 else 1)
        own = (h - 1 / 0.6) ** 2 if loss.kind == "ipo" else own
        terms.append(own - loss.nll_coef * (mean if loss.nll_average_log_probs else chosen))
        nats, gaps = nats - mean.item() / 8, [*gaps, h.item()]
    total = torch.stack(terms).mean()
    total.backward()
    learner, role, batch = learner_of(folders["lm"]), role_of(folders["reference"]), pack_pairs(rows)
    batch = batch if loss.reference_free else with_reference(batch, reference_sums(role, rows, 8))
    metrics, unseen = dpo_step(learner, batch, loss), dpo_eval(learner, batch, loss)
    expected = [total.item(), sum(h > 0 for h in gaps) / 8, 0.3 * sum(gaps) / 8]
    assert [metrics[key] for key in ("loss", "accuracy", "margin")] == pytest.approx(expected, rel=1e-5)
    assert [unseen[f"eval_{key}"] for key in ("loss", "accuracy", "margin")] == pytest.approx(expected, rel=1e-5)
    assert [metrics["grad_norm"], metrics["nll"]] == pytest.approx([grad_norm(policy), nats], rel=1e-5)


def test_sft_loss_and_gradient_equal_transformers(folders):
    """One sample at a time, without packing."""
    model, samples = transformers_model(folders["lm"]), labeled(0)[0]
    total = -torch.stack([response_sum(model, sample) for sample in samples]).sum()
    total = total / sum(sample.targets for sample in samples)
    total.backward()
    metrics = sft_step(learner_of(folders["lm"]), pack_samples(samples))
    expected = [total.item(), grad_norm(model)]
    assert [metrics["loss"], metrics["grad_norm"]] == pytest.approx(expected, rel=1e-5)


def test_reward_model_scores_and_gradient_equal_transformers(folders):
    model, rows = transformers_model(folders["score"]), pairs(0)
    sides = [side for pair in rows for side in pair[:2]]
    expected = torch.stack([model(input_ids=torch.tensor(s.tokens.tolist())[None]).logits[0, 0] for s in sides])
    h = expected[::2] - expected[1::2] - torch.tensor([pair.margin for pair in rows])
    total = (-F.logsigmoid(h) + 0.05 * (expected[::2] + expected[1::2]).square()).mean()
    total.backward()
    learner, batch = learner_of(folders["score"]), pack_pairs(rows)
    torch.testing.assert_close(learner.scores(batch), expected.detach(), rtol=1e-5, atol=1e-6)
    metrics = pair_step(learner, batch, 0.05)
    assert metrics["accuracy"] == (expected[::2] > expected[1::2]).float().mean().item()
    numbers = [total.item(), grad_norm(model), expected[::2].mean().item()]
    assert [metrics[key] for key in ("loss", "grad_norm", "chosen")] == pytest.approx(numbers, rel=1e-5)


def test_process_reward_model_equals_cross_entropy_at_step_ends(folders):
    model, losses, right = transformers_model(folders["score"]), [], []
    for row in steps(0):
        tokens, ends = row.sample.tokens.tolist(), [i for i, end in enumerate(row.sample.mask) if end]
        for end, label in zip(ends, row.labels, strict=True):
            logit = model(input_ids=torch.tensor(tokens[: end + 1])[None]).logits[0, 0].item()
            losses.append(-math.log(sigmoid(logit if label else -logit)))
            right.append((logit > 0) == label)
    metrics = process_step(learner_of(folders["score"]), pack_steps(steps(0)))
    assert len(losses) > 8 and 0 < sum(right) < len(right)
    expected = [sum(losses) / len(losses), sum(right) / len(right)]
    assert [metrics["loss"], metrics["accuracy"]] == pytest.approx(expected, rel=1e-5)


def test_accuracy_and_calibration_by_hand():
    """Four pairs: three right at σ 0.55, 0.95, 0.95, a wrong one at 0.95; ten bins from a half to one."""
    gaps = [math.log(p / (1 - p)) for p in (0.552, 0.952, 0.952, 0.952)]
    scores = torch.tensor([g for gap, sign in zip(gaps, (1, 1, 1, -1), strict=True) for g in (sign * gap, 0.0)])
    quality = pair_quality(scores, torch.zeros(4), 0.0)
    assert quality["eval_accuracy"] == 0.75
    expected = (abs(1 - 0.552) + abs(2 - 3 * 0.952)) / 4
    assert quality["eval_calibration"] == pytest.approx(expected, rel=1e-5)
    losses = [-math.log(p) for p in (0.552, 0.952, 0.952, 1 - 0.952)]
    assert quality["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize(("count", "label"), [(7, None), (8, None), (7, True), (7, False)])
def test_kto_and_its_gradient_equal_the_papers_formula(folders, count, label):
    """Of both labels or one; z is the mean log-ratio of mismatched responses, above 0 one way round of two models."""
    samples, labels = labeled(0, count)
    labels = labels if label is None else [label] * count
    others = [mismatched(samples[i], samples[(i + 1) % count], 64) for i in range(count)]
    policy, reference = transformers_model(folders["lm"]), transformers_model(folders["reference"])
    with torch.no_grad():
        z = sum((response_sum(policy, s) - response_sum(reference, s)).item() for s in others) / count
        sums = [response_sum(reference, s) for s in samples]
    learner, role = learner_of(folders["lm"]), role_of(folders["reference"])
    for one, other, expected in ((learner, role, z), (role, learner, -z)):
        point = reference_point(one, others, reference_sums(other, others, 8, pack_samples), 8)
        assert point == pytest.approx(max(0.0, expected), rel=1e-5)
    rows = [(response_sum(policy, s) - own, wanted) for s, own, wanted in zip(samples, sums, labels, strict=True)]
    point = max(0.0, z)
    losses = [1.2 * (-0.2 * (r - point)).sigmoid() if wanted else (0.2 * (r - point)).sigmoid() for r, wanted in rows]
    total = torch.stack(losses).mean()
    total.backward()
    batch = with_reference(pack_labeled(samples, labels), reference_sums(role, samples, 8, pack_samples))
    metrics = kto_step(learner, batch, KTO, point)
    assert [metrics["loss"], metrics["grad_norm"]] == pytest.approx([total.item(), grad_norm(policy)], rel=1e-5)
    good, bad = ([0.2 * r.item() for r, wanted in rows if wanted == kind] for kind in (True, False))
    measured = kto_eval(learner, batch, KTO)
    assert metrics["kl"] == point and all(map(math.isfinite, metrics.values()))
    if label is not None:  # a mean of one label's rewards, and nothing to compare it with
        name, own = ("chosen", good) if label else ("rejected", bad)
        assert metrics[name] == pytest.approx(sum(own) / count, rel=1e-4) and measured == {}
        assert not metrics.keys() & ({"chosen", "rejected", "margin"} - {name})
        return
    assert metrics["margin"] == pytest.approx(sum(good) / len(good) - sum(bad) / len(bad), rel=1e-4)
    assert measured["eval_accuracy"] == sum(g > b for g in good for b in bad) / len(good) / len(bad)


def test_invalid_loss_options_are_refused():
    for options in (
        {"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": 0.1, "kind": "ipo"}, {"nll_coef": math.nan},
        {"label_smoothing": 0.0, "kind": "exo"},
    ):  # fmt: skip
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name}={value}.*{options.get('kind', '')}"):
            replace(DPOLoss(), **options)
