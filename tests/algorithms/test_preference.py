"""Reward models, DPO and its kin, KTO: against transformers and plain formulas, in every layout and for every cut."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import ALONE, TWO_RANKS, Layout, assert_close, assert_layouts_agree
from preferences import KINDS, KTO, labeled, odd_batches, pairs, steps, two_steps
from tiny import VOCAB, tiny_llama
from tiny_moe import tiny_mixtral
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.preference import DPOLoss, KTOLoss
from trialign.algorithms.data.dialogues import pack_samples
from trialign.algorithms.data.preferences import mismatched
from trialign.algorithms.dpo import dpo_eval, dpo_step, reference_sums, with_reference
from trialign.algorithms.kto import kto_eval, kto_step, pack_labeled, reference_point
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_quality, pair_step, process_step
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role
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
    """Two steps: loss, gradients, weights; and the eval losses of seven rows, which divide by no layout."""
    assert_layouts_agree(two_steps, [layout], folders, expected=alone)


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"micro_batch_size": 1}, tuple(range(8))),
        ({"micro_batch_size": 2}, (5, 2, 7, 0, 1, 6, 3, 4)),
        ({"micro_batch_tokens": 40}, tuple(range(8))),
    ],
    ids=["one by one", "by twos, shuffled", "by tokens"],
)
def test_cut_and_order_do_not_matter(folders, alone, changes, order):
    assert_close(two_steps(0, 1, ALONE, folders, KINDS, changes, order), alone)


def test_two_dp_ranks_by_tokens_and_shuffled(folders, alone):
    arguments = folders, ("dpo", "kto"), {"micro_batch_tokens": 40}, (5, 2, 7, 0, 1, 6, 3, 4)
    expected = {kind: alone[kind] for kind in ("dpo", "kto")}
    assert_layouts_agree(two_steps, [Layout(dp=2)], *arguments, expected=expected)


def test_kto_on_batches_that_do_not_divide_by_the_dp_ranks(folders):
    """Uneven micro-batches, one row a rank among them: loss, z, gradients and weights are one process's."""
    assert_layouts_agree(odd_batches, (Layout(dp=2), Layout(dp=3)), folders, (7, 5, 3))


def test_kto_on_an_odd_batch_whose_dp_ranks_share_experts(tmp_path):
    """The rank with fewer micro-batches of one row keeps up with the other's."""
    folders = {name: tiny_mixtral(tmp_path / name, vocab_size=VOCAB) for name in ("lm", "reference")}
    assert_layouts_agree(odd_batches, [Layout(dp=2, ep=2)], folders, (7,), 1)


def learner_of(folder, lr: float = 0.0) -> Learner:
    kind = "score" if head_of(read_config(folder)) == "score" else "lm"
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", head=kind, trained=True)
    return build_learner(model, OptimizerConfig(lr=lr, max_grad_norm=0.0), 1)


def reference_of(folder) -> Role:
    return Role(build_decoder(str(folder), read_config(folder), build_mesh(), "float32"))


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def answer_sum(model, sample) -> torch.Tensor:
    """log π of a sample's targets, by transformers."""
    tokens = torch.tensor(sample.tokens.tolist())
    logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
    return chosen[torch.tensor(list(sample.mask))[1:].bool()].sum()


def test_the_reference_s_sums_are_transformers(folders):
    drawn, model = pairs(0), theirs(folders["reference"])
    ours = reference_sums(reference_of(folders["reference"]), drawn, 8)
    expected = [answer_sum(model, side).item() for pair in drawn for side in (pair.chosen, pair.rejected)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "robust"])
def test_the_first_loss_is_log_2_where_the_policy_is_the_reference(folders, kind):
    learner, drawn = learner_of(folders["lm"]), pairs(0)
    batch = with_reference(pack_pairs(drawn), reference_sums(learner, drawn, 8))
    loss = DPOLoss(kind=kind, label_smoothing=0.1)
    metrics = dpo_step(learner, batch, loss)
    # The very micro-batches the reference was computed in: not one bit differs.
    assert metrics["loss"] == torch.tensor(2.0).log().item() and (metrics["margin"], metrics["accuracy"]) == (0.0, 0.5)


LOSSES = {
    "dpo": (DPOLoss(beta=0.3), lambda w, lo, b: -math.log(1 / (1 + math.exp(-b * (w - lo))))),
    "ipo": (DPOLoss(kind="ipo", beta=0.3), lambda w, lo, b: (w - lo - 1 / (2 * b)) ** 2),
    "cdpo": (
        DPOLoss(beta=0.3, label_smoothing=0.2),
        lambda w, lo, b: 0.8 * math.log(1 + math.exp(-b * (w - lo))) + 0.2 * math.log(1 + math.exp(b * (w - lo))),
    ),
    "robust": (
        DPOLoss(kind="robust", beta=0.3, label_smoothing=0.2),
        lambda w, lo, b: (
            (0.8 * math.log(1 + math.exp(-b * (w - lo))) - 0.2 * math.log(1 + math.exp(b * (w - lo)))) / 0.6
        ),
    ),
}


@pytest.mark.parametrize("average", [False, True], ids=["summed", "per token"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_papers_formulas_over_transformers_logprobs(folders, name, average):
    from dataclasses import replace

    loss, formula = LOSSES[name]
    loss, drawn = replace(loss, average_log_probs=average), pairs(0)
    policy, reference = theirs(folders["lm"]), theirs(folders["reference"])
    ratios = []
    with torch.no_grad():
        for pair in drawn:
            ratio = [answer_sum(policy, side) - answer_sum(reference, side) for side in pair[:2]]
            tokens = [side.targets if average else 1 for side in pair[:2]]
            ratios.append([(r / n).item() for r, n in zip(ratio, tokens, strict=True)])
    learner, role = learner_of(folders["lm"]), reference_of(folders["reference"])
    batch = with_reference(pack_pairs(drawn), reference_sums(role, drawn, 8))
    metrics = dpo_step(learner, batch, loss)
    assert metrics["loss"] == pytest.approx(sum(formula(w, lo, 0.3) for w, lo in ratios) / 8, rel=1e-5)
    assert metrics["accuracy"] == sum(w > lo for w, lo in ratios) / 8
    assert metrics["margin"] == pytest.approx(0.3 * sum(w - lo for w, lo in ratios) / 8, rel=1e-5)
    unseen = dpo_eval(learner, batch, loss)
    assert unseen["eval_accuracy"] == metrics["accuracy"]
    assert unseen["eval_loss"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_dpo_s_gradient_with_nll_and_without_a_reference_is_autograd_s(folders, average):
    loss = DPOLoss(beta=0.3, nll_coef=0.5, reference_free=True, nll_average_log_probs=average)
    drawn, policy = pairs(0), theirs(folders["lm"])
    terms = []
    for pair in drawn:
        chosen, rejected = answer_sum(policy, pair.chosen), answer_sum(policy, pair.rejected)
        nll = chosen / pair.chosen.targets if average else chosen
        terms.append(-F.logsigmoid(0.3 * (chosen - rejected)) - 0.5 * nll)
    total = torch.stack(terms).mean()
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm().item()
    learner, batch = learner_of(folders["lm"]), pack_pairs(drawn)
    metrics = dpo_step(learner, batch, loss)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["nll"] == pytest.approx(
        -sum(answer_sum(policy, p.chosen).item() / p.chosen.targets for p in drawn) / 8, rel=1e-5
    )
    assert dpo_eval(learner, batch, loss)["eval_loss"] == pytest.approx(total.item(), rel=1e-5)


def test_scores_and_the_loss_of_a_reward_model_are_transformers(folders):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folders["score"], dtype=torch.float32)
    drawn = pairs(0)
    sides = [side for pair in drawn for side in pair[:2]]
    expected = torch.stack([model(input_ids=torch.tensor(s.tokens.tolist())[None]).logits[0, 0] for s in sides])
    margins = torch.tensor([pair.margin for pair in drawn])
    h = expected[::2] - expected[1::2] - margins
    total = (-F.logsigmoid(h) + 0.05 * (expected[::2] + expected[1::2]).square()).mean()
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    learner, batch = learner_of(folders["score"]), pack_pairs(drawn)
    scores = learner.scores(batch)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-5, atol=1e-6)
    metrics = pair_step(learner, batch, 0.05)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["accuracy"] == (expected[::2] > expected[1::2]).float().mean().item()
    assert metrics["chosen"] == pytest.approx(expected[::2].mean().item(), rel=1e-5)


def test_a_process_reward_model_is_binary_cross_entropy_at_the_ends_of_steps(folders):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folders["score"], dtype=torch.float32)
    losses, right = [], []
    for row in steps(0):
        tokens, ends = row.sample.tokens.tolist(), [i for i, end in enumerate(row.sample.mask) if end]
        for end, label in zip(ends, row.labels, strict=True):
            logit = model(input_ids=torch.tensor(tokens[: end + 1])[None]).logits[0, 0].item()
            losses.append(math.log(1 + math.exp(-logit if label else logit)))
            right.append((logit > 0) == label)
    learner, batch = learner_of(folders["score"]), pack_steps(steps(0))
    metrics = process_step(learner, batch)
    assert len(losses) > 8 and 0 < sum(right) < len(right)
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))


def test_accuracy_and_calibration_by_hand():
    """Four pairs: three right ones at σ 0.55, 0.95, 0.95, a wrong one at 0.95; ten bins from a half to one."""
    gaps = [math.log(p / (1 - p)) for p in (0.552, 0.952, 0.952, 0.952)]
    scores = torch.tensor([g for gap, sign in zip(gaps, (1, 1, 1, -1), strict=True) for g in (sign * gap, 0.0)])
    quality = pair_quality(scores, torch.zeros(4), 0.0)
    assert quality["eval_accuracy"] == 0.75
    expected = (abs(1 - 0.552) + abs(2 - 3 * 0.952)) / 4
    assert quality["eval_calibration"] == pytest.approx(expected, rel=1e-5)
    losses = [-math.log(p) for p in (0.552, 0.952, 0.952, 1 - 0.952)]
    assert quality["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("count", [7, 8], ids=["odd", "even"])
def test_kto_is_the_paper_s_formula_with_the_mean_kl_of_mismatched_answers(folders, count):
    samples, labels = labeled(0, count)
    others = [mismatched(samples[i], samples[(i + 1) % count], 64) for i in range(count)]
    policy, reference = theirs(folders["lm"]), theirs(folders["reference"])
    with torch.no_grad():
        # The other way round: of these two random models the one is above 0, the other below.
        z = {
            name: sum((answer_sum(a, s) - answer_sum(b, s)).item() for s in others) / count
            for name, a, b in (("lm", policy, reference), ("reference", reference, policy))
        }
        ratios = [(answer_sum(policy, s) - answer_sum(reference, s)).item() for s in samples]
    assert min(z.values()) < 0 < max(z.values())
    learner, role = learner_of(folders["lm"]), reference_of(folders["reference"])
    for name, ours, other in (("lm", learner, role), ("reference", role, learner)):
        point = reference_point(ours, others, reference_sums(other, others, 8, pack_samples), 8)
        assert point == pytest.approx(max(0.0, z[name]), rel=1e-5)
    point = max(0.0, z["lm"])
    losses = [
        (1.2 if label else 1.0) * (1 - 1 / (1 + math.exp(-0.2 * (r - point if label else point - r))))
        for r, label in zip(ratios, labels, strict=True)
    ]
    batch = with_reference(pack_labeled(samples, labels), reference_sums(role, samples, 8, pack_samples))
    metrics = kto_step(learner, batch, KTO, point)
    assert metrics["loss"] == pytest.approx(sum(losses) / count, rel=1e-5) and metrics["kl"] == point
    good = [0.2 * r for r, label in zip(ratios, labels, strict=True) if label]
    bad = [0.2 * r for r, label in zip(ratios, labels, strict=True) if not label]
    assert metrics["margin"] == pytest.approx(sum(good) / len(good) - sum(bad) / len(bad), rel=1e-4)
    unseen = kto_eval(learner, batch, KTO)
    assert unseen["eval_accuracy"] == sum(g > b for g in good for b in bad) / len(good) / len(bad)


def test_a_batch_of_one_kind_has_no_margin(folders):
    samples, _ = labeled(0)
    learner = learner_of(folders["lm"])
    batch = with_reference(pack_labeled(samples, [True] * 8), torch.zeros(8))
    metrics = kto_step(learner, batch, KTOLoss(), 0.0)
    assert "chosen" in metrics and "rejected" not in metrics and "margin" not in metrics
    assert kto_eval(learner, batch, KTOLoss()) == {}


def test_what_is_not_sane_is_refused_by_the_knob():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"beta": 0.0}, "beta=0.0: must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: must be 0 or more and below 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1: ipo has none"),
        ({"kind": "exo"}, "label_smoothing=0: exo needs a number above 0"),
        ({"nll_coef": math.nan}, "nll_coef=nan: must be 0 (off) or more"),
    )
    for values, message in cases:
        with pytest.raises(ValueError) as error:
            DPOLoss(**values)
        assert message in str(error.value)
