"""No loss and no gradient depends on micro-batches, packing or the order of samples: a property of every one."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preferences import DPO, KTO, answer, pairs, steps
from tiny import VOCAB, tiny_llama
from trialign.algorithms.batch import Batch, micro_batches
from trialign.algorithms.build import build_decoder, build_learner
from trialign.algorithms.config import OptimizerConfig, UpdateConfig
from trialign.algorithms.dialogue import pack_samples
from trialign.algorithms.dpo import answer_sums, dpo_step, with_reference
from trialign.algorithms.kto import kto_step, pack_labelled
from trialign.algorithms.pair_config import DPOLoss
from trialign.algorithms.policy_loss import cispo_loss, log_ratio, ppo_loss, sequence_log_ratio
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_step, process_step
from trialign.algorithms.roles import Learner, target_logprobs
from trialign.algorithms.segments import Segments, token_weights
from trialign.algorithms.sft import sft_step
from trialign.algorithms.shares import plan
from trialign.engine.mesh import build_mesh
from trialign.models.config import ModelConfig

AGGREGATIONS = ("token-mean", "token-sum", "sample-mean", "sample-sum", "constant", "sum-of-sample-means")
POLICY = [f"{loss}, {how}" for loss in ("ppo", "gspo", "cispo") for how in AGGREGATIONS]
KINDS = ["sft", "reward", "process", "dpo", "ipo", "kto", *POLICY]


@pytest.fixture(scope="module")
def learners(tmp_path_factory) -> dict[str, Learner]:
    """A language model and a reward model that stay as they are: lr is 0."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for kind in ("lm", "score"):
        folder = tiny_llama(root / kind, score=kind == "score", num_hidden_layers=1)
        shape = ModelConfig.from_hf(folder)
        model = build_decoder(str(folder), shape, build_mesh(), "float32", head=kind, trained=True)
        made[kind] = build_learner(model, OptimizerConfig(lr=0.0, max_grad_norm=0.0), 1)
    return made


def policy_step(learner: Learner, batch: Batch, shares: list[list[int]], kind: str) -> dict[str, float]:
    """A step of a policy-gradient loss, its weights from the whole batch, as PPO's and GRPO's are."""
    loss, _, how = kind.partition(", ")
    whole = Segments.of_lengths(torch.tensor(batch.lengths), batch.mask)
    batch = batch.with_(returns=token_weights(whole, how, constant=20.0))  # pyright: ignore[reportArgumentType]
    total = 0.0

    def read(part: Batch, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal total
        assert part.advantages is not None and part.logprobs is not None and part.returns is not None
        logp = part.spread(target_logprobs(learner.model, part, hidden, 1.0)[0])
        d = log_ratio(logp, part.logprobs)
        if loss == "gspo":
            d = sequence_log_ratio(d, Segments.of_lengths(torch.tensor(part.lengths), part.mask))
        if loss == "cispo":
            losses = cispo_loss(logp, d, part.advantages, 0.8, 1.3)
        else:
            losses, _, _ = ppo_loss(d, part.advantages, 0.2, 0.28)
        value = (part.returns * losses).sum()
        total += value.item()
        return value

    metrics = learner.step([(batch.select(share), read) for share in shares])
    return {"loss": total, **metrics}


def run(learners: dict[str, Learner], kind: str, seed: int, count: int, order: list[int], update: UpdateConfig):
    """Loss and gradients of a batch whose rows come in this order."""
    learner, mesh = learners["score" if kind in ("reward", "process") else "lm"], build_mesh()
    drawn, chance = [pairs(seed, count)[i] for i in order], random.Random(seed)
    ratios = [chance.uniform(-40, -5) for _ in range(2 * count)]  # a reference's log-probabilities
    if kind == "sft":
        batch = pack_samples([pair.chosen for pair in drawn])
        metrics = sft_step(learner, batch, plan(batch, update, mesh))
    elif kind == "reward":
        batch = pack_pairs(drawn)
        metrics = pair_step(learner, batch, plan(batch, update, mesh, 2), 0.1)
    elif kind == "process":
        batch = pack_steps([steps(seed, count)[i] for i in order])
        metrics = process_step(learner, batch, plan(batch, update, mesh))
    elif kind in ("dpo", "ipo"):
        sums = torch.tensor([ratios[2 * i + side] for i in order for side in (0, 1)])
        loss = DPO if kind == "dpo" else DPOLoss(kind="ipo", average="mean")
        batch = with_reference(pack_pairs(drawn), sums)
        metrics = dpo_step(learner, batch, plan(batch, update, mesh, 2), loss)
    elif kind == "kto":
        batch = pack_labelled([pair.chosen for pair in drawn], [i % 3 == 0 for i in order])
        batch = with_reference(batch, torch.tensor([ratios[i] for i in order]))
        metrics = kto_step(learner, batch, plan(batch, update, mesh), KTO, 0.7)
    else:
        batch = pack_samples([pair.chosen for pair in drawn])
        generator = [torch.Generator().manual_seed(1000 * seed + i) for i in order]
        numbers = [torch.randn(2, n, generator=g) for n, g in zip(batch.lengths, generator, strict=True)]
        advantages, noise = torch.cat(numbers, 1)
        old = torch.full_like(noise, -4.6) + 0.3 * noise  # about what a random model gives a token
        batch = batch.with_(logprobs=old * batch.mask, advantages=advantages * batch.mask)
        metrics = policy_step(learner, batch, plan(batch, update, mesh), kind)
    return metrics["loss"], torch.cat([bucket.grads.clone() for bucket in learner.optimizer.buckets])


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_batch_s_own(learners, kind):
    @settings(max_examples=6, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        count, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 999))
        order = data.draw(st.permutations(range(count)))
        size = data.draw(st.integers(1, count))
        tokens = data.draw(st.sampled_from((0, 40, 100)))  # a pair has 36 at most
        whole = UpdateConfig(batch_size=count, micro_batch_size=count)
        loss, gradient = run(learners, kind, seed, count, list(range(count)), whole)
        cut = replace(whole, micro_batch_size=size, micro_batch_tokens=tokens)
        got, theirs = run(learners, kind, seed, count, order, cut)
        assert got == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert kind in POLICY or gradient.abs().max() > 1e-4  # a clipped policy may learn nothing from a short batch
        limit = 1e-5 * gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(theirs, gradient, rtol=0, atol=limit)

    check()


def test_a_sample_s_log_probability_is_its_own_beside_any_others(learners):
    """Packed with others, padded by none: attention stays within a sample."""
    chance = random.Random(0)
    samples = [answer([chance.randrange(3, VOCAB) for _ in range(4)], chance) for _ in range(5)]
    batch = pack_samples(samples)
    learner = learners["lm"]
    one_by_one = learner.logprobs(batch, [[i] for i in range(5)])
    packed = learner.logprobs(batch, micro_batches(range(5), batch.lengths, 5))
    torch.testing.assert_close(packed, one_by_one, rtol=1e-5, atol=1e-6)
    sums = answer_sums(batch, packed[batch.response])
    for i, sample in enumerate(samples):
        alone = pack_samples([sample])
        torch.testing.assert_close(learner.logprobs(alone, [[0]]).sum(), sums[i], rtol=1e-5, atol=1e-5)
