"""Pairs, labeled answers and labeled steps of random tokens, and what learns from them on tiny models."""

import random
from array import array
from dataclasses import replace
from pathlib import Path

from layouts import Layout, whole_states
from tiny import VOCAB
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.preference import DPOLoss, KTOLoss
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import Sample, pack_samples
from trialign.algorithms.data.preferences import Pair, Steps, mismatched
from trialign.algorithms.dpo import dpo_eval, dpo_step, reference_sums, with_reference
from trialign.algorithms.kto import kto_eval, kto_step, pack_labeled, reference_point
from trialign.algorithms.reward_model import (
    pack_pairs,
    pack_steps,
    pair_eval,
    pair_step,
    process_eval,
    process_step,
)
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.role import Role
from trialign.models.families.registry import read_config

UPDATE = UpdateConfig(batch_size=8, micro_batch_size=4)
KINDS = ("reward", "process", "dpo", "kto")
DPO = DPOLoss(beta=0.2, label_smoothing=0.1, nll_coef=0.3)
KTO = KTOLoss(beta=0.2, desirable_weight=1.2)


def answer(prompt: list[int], chance: random.Random, where: str = "") -> Sample:
    """A prompt with an answer of 1 to 9 tokens, its targets."""
    tokens = [chance.randrange(3, VOCAB) for _ in range(chance.randrange(1, 10))]
    return Sample(array("i", prompt + tokens), bytes(len(prompt)) + b"\1" * len(tokens), "", where)


def pairs(seed: int, count: int = 8) -> list[Pair]:
    """Pairs whose answers are of unequal length, with margins."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, VOCAB) for _ in range(chance.randrange(2, 9))] for _ in range(count)]
    return [Pair(answer(prompt, chance), answer(prompt, chance), 0.1 * i) for i, prompt in enumerate(prompts)]


def labeled(seed: int, count: int = 8) -> tuple[list[Sample], list[bool]]:
    """Answers to a prompt each, three of eight of them wanted."""
    return [pair.chosen for pair in pairs(seed, count)], [i % 8 in (0, 3, 4) for i in range(count)]


def steps(seed: int, count: int = 8) -> list[Steps]:
    """Answers of one to four steps."""
    chance, rows = random.Random(seed), []
    for pair in pairs(seed, count):
        prompt, ends = pair.chosen.mask.index(1), [len(pair.chosen.tokens) - 1]
        ends += [place for place in range(prompt, ends[0]) if chance.random() < 0.3]
        mask = bytes(int(place in ends) for place in range(len(pair.chosen.tokens)))
        rows.append(Steps(pair.chosen._replace(mask=mask), tuple(chance.random() < 0.5 for _ in ends)))
    return rows


def two_steps(
    rank: int,
    world: int,
    layout: Layout,
    folders: dict[str, Path],
    kinds: tuple[str, ...] = KINDS,
    changes: dict[str, int] | None = None,
    order: tuple[int, ...] = tuple(range(8)),
):
    """Two steps of each kind and a look at seven other rows: {kind: (metrics, gradients and weights)}.

    Args:
        folders: of the language model, of the reference and of the reward model.
        changes: to UPDATE.
        order: of the rows in a batch.
    """
    mesh = layout.mesh()
    update = replace(UPDATE, **(changes or {}))
    # A large eps: Adam's first step turns the rounding of gradients that are all but 0 into whole steps otherwise.
    settings = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=0.5, weight_decay=0.1, warmup_ratio=0.0)
    results = {}
    for kind in kinds:
        head = "score" if kind in ("reward", "process") else "lm"
        shape = read_config(folders[head])
        model = build_decoder(str(folders[head]), shape, mesh, "float32", head=head, trained=True)
        learner = reference = build_learner(model, settings, 4, sizes=update)
        if head == "lm":
            reference = Role(build_decoder(str(folders["reference"]), shape, mesh, "float32"), sizes=update)
        metrics: dict[str, float] = {}
        for step in (0, 1, 9):
            count = 7 if step == 9 else 8  # the last ones are only looked at
            rows = [i for i in order if i < count]
            drawn = [pairs(step, count)[i] for i in rows]
            if kind == "reward":
                batch = pack_pairs(drawn)
                if step == 9:
                    got = pair_eval(learner, batch, 0.05)
                else:
                    got = pair_step(learner, batch, 0.05)
            elif kind == "process":
                batch = pack_steps([steps(step, count)[i] for i in rows])
                if step == 9:
                    got = process_eval(learner, batch)
                else:
                    got = process_step(learner, batch)
            elif kind == "dpo":
                batch = with_reference(pack_pairs(drawn), reference_sums(reference, drawn, update.batch_size))
                if step == 9:
                    got = dpo_eval(learner, batch, DPO)
                else:
                    got = dpo_step(learner, batch, DPO)
            else:
                samples, labels = labeled(step, count)
                others = [mismatched(samples[i], samples[(i + 1) % count], 64) for i in rows]
                z = reference_point(
                    learner,
                    others,
                    reference_sums(reference, others, update.batch_size, pack_samples),
                    update.batch_size,
                )
                samples, labels = [samples[i] for i in rows], [labels[i] for i in rows]
                batch = with_reference(
                    pack_labeled(samples, labels), reference_sums(reference, samples, update.batch_size, pack_samples)
                )
                if step == 9:
                    got = kto_eval(learner, batch, KTO) | {"kl": z}
                else:
                    got = kto_step(learner, batch, KTO, z)
            metrics |= {f"{name}/{step}": value for name, value in got.items()}
        results[kind] = metrics, whole_states(actor=learner)
    return results


def odd_batches(
    rank: int, world: int, layout: Layout, folders: dict[str, Path], counts: tuple[int, ...], size: int = 4
):
    """KTO's two steps on batches of so many rows in micro-batches of `size`: {rows: as `two_steps` gives them}."""
    changes = {"batch_size": 5, "micro_batch_size": size}  # the reference is computed in chunks of at most five
    return {n: two_steps(0, 1, layout, folders, ("kto",), changes, tuple(range(n)))["kto"] for n in counts}
