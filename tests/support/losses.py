"""All training losses by name: optimizer steps on random rows in a given order, cut and padding."""

import functools
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from layouts import ALONE, Layout, whole_states
from preferences import pairs, response, steps
from presets import ALGORITHMS, grpo_options
from torch import Tensor
from trialign.algorithms import grpo, ppo
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.common import OptimizerConfig, RolloutConfig
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.ppo import ActorConfig, CriticConfig, PPOConfig, PPOOptions
from trialign.algorithms.config.preference import DPOLoss, KTOLoss
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import Sample, pack_samples
from trialign.algorithms.data.documents import Passage, pack_rows
from trialign.algorithms.data.preferences import Pair, mismatched
from trialign.algorithms.dpo import dpo_step, reference_sums, with_reference
from trialign.algorithms.kto import kto_step, pack_labeled, reference_point
from trialign.algorithms.micro_batch import Passes, draw_minibatches
from trialign.algorithms.policy_step import without_unscored
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_step, process_step
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Learner, Roles
from trialign.algorithms.roles.role import Role
from trialign.algorithms.sft import sft_step
from trialign.models.families.registry import read_config

LONGEST = 42  # tokens of a pair: two responses of 17 and their padding
DOCUMENTS = [list(range(5, 25)), list(range(40, 70))]


@dataclass(frozen=True)
class Draw:
    """A batch of random rows and its cut; the content of a row depends on its number alone."""

    seed: int
    order: tuple[int, ...]  # numbers of the rows
    size: int  # rows of a micro-batch
    tokens: int = 0  # or its token limit
    padding: int = 0  # most tokens after a sample, outside the mask

    @property
    def count(self) -> int:
        return len(self.order)

    @property
    def update(self) -> UpdateConfig:
        return UpdateConfig(batch_size=self.count, micro_batch_size=self.size, micro_batch_tokens=self.tokens)

    def padded(self, sample: Sample, row: int) -> Sample:
        count = row % (self.padding + 1)
        return sample._replace(tokens=sample.tokens + array("i", [7] * count), mask=sample.mask + bytes(count))

    @cached_property
    def pairs(self) -> list[Pair]:
        own = pairs(self.seed, self.count)
        return [own[i] for i in self.order]  # a pair's responses end with their last target

    @property
    def responses(self) -> list[Sample]:
        return [self.padded(pair.chosen, i) for pair, i in zip(self.pairs, self.order, strict=True)]

    @property
    def scores(self) -> Tensor:
        """[rows], one a response; NaN for the last row of some batches."""
        scores = torch.randn(self.count, generator=torch.Generator().manual_seed(self.seed))
        if self.count > 3 and self.seed % 2:
            scores[-1] = torch.nan
        return scores[list(self.order)]

    def noise(self, batch: Batch, scale: float, number: int) -> Tensor:
        """[total] at the targets of the batch; 0 in the first row, whose ratios are 1 and inside every clip."""
        parts = []
        for row, sample in zip(self.order, self.responses, strict=True):
            generator = torch.Generator().manual_seed(9000 * number + 10 * self.seed + row)
            parts.append(torch.randn(sum(sample.mask), generator=generator) * (scale if row else 0))
        whole = pack_samples(self.responses)
        return whole.scatter(torch.cat(parts)) * batch.mask


class Models:
    """Learners with a learning rate of 0, and a reference."""

    def __init__(self, folders: dict[str, Path], layout: Layout = ALONE):
        self.folders = folders
        self.mesh = layout.mesh()
        self.expert_mesh = layout._replace(ep=layout.dp).mesh()

    def _learner(self, name: str) -> Learner:
        mesh = self.expert_mesh if name == "moe" else self.mesh
        shape, head = read_config(self.folders[name]), "score" if name == "score" else "lm"
        model = build_decoder(str(self.folders[name]), shape, mesh, "float32", head=head, trained=True)
        return build_learner(model, OptimizerConfig(lr=0.0, max_grad_norm=0.0), 1)

    lm = cached_property(lambda self: self._learner("lm"))
    score = cached_property(lambda self: self._learner("score"))
    moe = cached_property(lambda self: self._learner("moe"))

    @cached_property
    def reference(self) -> Role:
        folder = self.folders["reference"]
        return Role(build_decoder(str(folder), read_config(folder), self.mesh, "float32"))


Step = tuple[Learner, dict[str, float]]
Kind = Callable[[Models, Draw], Iterator[Step]]


def sft(models: Models, draw: Draw) -> Iterator[Step]:
    yield models.lm, sft_step(models.lm, pack_samples(draw.responses))


def router(models: Models, draw: Draw) -> Iterator[Step]:
    """Without padding, whose tokens would count in the router losses."""
    yield models.moe, sft_step(models.moe, pack_samples(replace(draw, padding=0).responses))


def pretrain(models: Models, draw: Draw) -> Iterator[Step]:
    """Three documents a row, combined by the order."""
    chance = random.Random(draw.seed)
    texts = [
        [response([3], chance).tokens for _ in range(3)] + [array("i", [7])] * (row % (draw.padding + 1))
        for row in range(draw.count)
    ]
    pieces = [Passage(text, "") for place in range(3) for row in draw.order for text in texts[row][place : place + 1]]
    rows = [pieces[i : i + 3] for i in range(0, len(pieces), 3)]
    rows[0] = rows[0] + [Passage(text, "") for row in draw.order for text in texts[row][3:]]
    yield models.lm, sft_step(models.lm, pack_rows(rows))


def reward(models: Models, draw: Draw) -> Iterator[Step]:
    """Without padding: the score is read at a response's last token."""
    batch = pack_pairs(replace(draw, padding=0).pairs)
    yield models.score, pair_step(models.score, batch, 0.1)


def process(models: Models, draw: Draw) -> Iterator[Step]:
    own = steps(draw.seed, draw.count)
    batch = pack_steps([own[i]._replace(sample=draw.padded(own[i].sample, i)) for i in draw.order])
    yield models.score, process_step(models.score, batch)


def dpo(models: Models, draw: Draw, loss: DPOLoss) -> Iterator[Step]:
    batch = pack_pairs(draw.pairs)
    if not loss.reference_free:
        batch = with_reference(batch, reference_sums(models.reference, draw.pairs, draw.count))
    yield models.lm, dpo_step(models.lm, batch, loss)


def kto(models: Models, draw: Draw) -> Iterator[Step]:
    """With a reference point above 0, of each prompt with the next row's response."""
    plain, others = [pair.chosen for pair in pairs(draw.seed, draw.count)], []
    for i in draw.order:
        others.append(draw.padded(mismatched(plain[i], plain[(i + 1) % draw.count], LONGEST), i))
    z = reference_point(
        models.lm, others, reference_sums(models.reference, others, draw.count, pack_samples) - 4, draw.count
    )
    batch = pack_labeled(draw.responses, [i % 3 == 0 for i in draw.order])
    batch = with_reference(batch, reference_sums(models.reference, draw.responses, draw.count, pack_samples))
    assert z > 0
    yield models.lm, kto_step(models.lm, batch, KTOLoss(beta=0.2, desirable_weight=1.2), z)


def sampled(actor: Learner, draw: Draw, passes: Passes) -> Batch:
    """One minibatch of responses with a sampler's logprobs near the actor's; unscored ones have no targets."""
    batch = without_unscored(pack_samples(draw.responses), draw.scores)
    batch = batch.with_(minibatches=draw_minibatches(len(batch), passes, seed=draw.seed))
    return batch.with_(rollout_logprobs=actor.logprobs(batch) + draw.noise(batch, 0.2, 1))


def ppo_updates(models: Models, draw: Draw, config: PPOConfig) -> Iterator[Step]:
    """An update on policy, then steps of critic and actor off policy, where clips decide."""
    roles = Roles(models.lm, models.score, models.reference)
    ptx = DOCUMENTS if config.actor.ptx_coef else ()
    batch = ppo.with_forward_passes(sampled(models.lm, draw, config.ppo), roles, config)
    batch, _ = ppo.with_rewards(batch, draw.scores, config, kl_coef=0.1)
    yield models.lm, ppo.update(roles, batch, config, documents=ptx)
    yield models.score, {}
    batch = batch.with_(values=models.score.values(batch) + draw.noise(batch, 0.5, 2))
    warmup = replace(config, critic=replace(config.critic, warmup_steps=1))
    yield models.score, ppo.update(roles, batch, warmup)
    old = models.lm.logprobs(batch) + draw.noise(batch, 0.4, 3)
    batch, _ = ppo.with_gae(batch.with_(logprobs=old), config)
    yield models.lm, ppo.actor_step(models.lm, batch, batch.minibatches[0][0], config, ptx, first=False)


def grpo_updates(models: Models, draw: Draw, options: GRPOOptions, role: str = "lm") -> Iterator[Step]:
    """An update on policy, then a step off policy, where clips decide. Rows 2i and 2i + 1 are a group."""
    config = GRPOConfig(grpo=options, rollout=RolloutConfig(max_new_tokens=16, samples_per_prompt=2))
    actor = getattr(models, role)
    group = torch.tensor([row // 2 for row in draw.order])
    batch = sampled(actor, draw, options)
    roles = Roles(actor, reference=models.reference if config.needs_reference else None)
    batch = grpo.with_forward_passes(batch, roles, config)
    batch, _ = grpo.with_advantages(batch.with_(group=group), config)
    yield actor, grpo.update(roles, batch, config)
    far = 3e-4 if options.ratio_level == "sequence" else 0.3
    old = actor.logprobs(batch) + draw.noise(batch, far, 3)
    yield actor, grpo.actor_step(actor, batch.with_(logprobs=old), batch.minibatches[0][0], config, first=False)


def routed(models: Models, draw: Draw) -> Iterator[Step]:
    yield from grpo_updates(models, replace(draw, padding=0), grpo_options("dapo"), "moe")


PAIR_LOSSES = {
    "dpo": DPOLoss(beta=0.2),
    "dpo, nll": DPOLoss(beta=0.2, nll_coef=0.3),
    "dpo, nll summed": DPOLoss(beta=0.2, nll_coef=0.01, nll_average_log_probs=False),
    "dpo, reference-free": DPOLoss(beta=0.02, reference_free=True),
    "dpo, mean": DPOLoss(beta=0.2, average_log_probs=True),
    "cdpo": DPOLoss(beta=0.2, label_smoothing=0.1),
    "robust": DPOLoss(beta=0.2, kind="robust", label_smoothing=0.1),
    "ipo, sum": DPOLoss(beta=0.2, kind="ipo"),
    "ipo, mean": DPOLoss(beta=0.2, kind="ipo", average_log_probs=True),
    "hinge": DPOLoss(beta=0.2, kind="hinge"),
    "exo": DPOLoss(beta=0.2, kind="exo", label_smoothing=0.1),
    "apo_zero": DPOLoss(beta=0.2, kind="apo_zero"),
    "apo_down": DPOLoss(beta=0.2, kind="apo_down"),
}
AGGREGATIONS: tuple[Any, ...] = ("token-mean", "token-sum", "sample-mean", "sample-sum", "sum-of-sample-means")
PPO = {
    "ppo": PPOConfig(critic=CriticConfig(value_clip=0.2)),
    "ppo, values not clipped": PPOConfig(critic=CriticConfig(value_clip=0.0), ppo=PPOOptions(whiten="off")),
    "ppo, dual clip and entropy": PPOConfig(actor=ActorConfig(dual_clip=1.1, entropy_coef=0.01)),
    "ppo, ptx": PPOConfig(actor=ActorConfig(ptx_coef=0.5)),
    "ppo, importance": PPOConfig(ppo=PPOOptions(tis_clip=1.1)),
    **{f"ppo, {how}": PPOConfig(ppo=PPOOptions(loss_aggregation=how)) for how in AGGREGATIONS[1:]},
}
ESTIMATORS: tuple[Any, ...] = ("k1", "k2", "k3", "abs", "k1+", "k3+")
NEAR: dict[str, Any] = {"rollout_ratio_low": 0.9, "rollout_ratio_high": 1.1}
GRPO = {
    **{name: grpo_options(name) for name in ALGORITHMS},
    **{f"grpo, {how}": GRPOOptions(loss_aggregation=how) for how in (*AGGREGATIONS, "constant")},
    **{f"grpo, {kl} in the loss": GRPOOptions(kl_estimator=kl, kl_coef=0.5) for kl in ESTIMATORS},
    **{f"dapo, {how}": grpo_options("dapo", rollout_correction=how, **NEAR) for how in grpo.CORRECTIONS},
    "rloo, sequence-sum": grpo_options("rloo", ratio_level="sequence-sum"),
    "grpo, dual clip and entropy": GRPOOptions(dual_clip=1.1, entropy_coef=0.01),
}
KINDS: dict[str, Kind] = {
    "sft": sft,
    "pretrain": pretrain,
    "reward": reward,
    "process": process,
    "kto": kto,
    "router": router,
    "dapo, router": routed,
    **{name: functools.partial(dpo, loss=loss) for name, loss in PAIR_LOSSES.items()},
    **{name: functools.partial(ppo_updates, config=config) for name, config in PPO.items()},
    **{name: functools.partial(grpo_updates, options=options) for name, options in GRPO.items()},
}


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Whole gradients of a learner's last step."""
    return {name: tensor for name, tensor in whole_states(role=learner).items() if "/grad/" in name}


def run(models: Models, kind: str, draw: Draw) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """Losses and gradients of each step, in the draw's micro-batches."""
    for role in (models.lm, models.score, models.moe, models.reference):
        role.sizes = draw.update
    return [
        ({name: value for name, value in metrics.items() if "loss" in name or "norm" in name}, gradients(learner))
        for learner, metrics in KINDS[kind](models, draw)
    ]
