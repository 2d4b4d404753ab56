"""Pairs, labeled responses and labeled steps of random tokens, and optimizer steps on them in a layout."""

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
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_eval, pair_step, process_eval, process_step
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.role import Role
from trialign.algorithms.sft import eval_loss, sft_step
from trialign.models.families.registry import read_config

UPDATE = UpdateConfig(batch_size=8, micro_batch_size=4)
KINDS = ("sft", "reward", "process", "dpo", "kto")
DPO = DPOLoss(beta=0.2, label_smoothing=0.1, nll_coef=0.3)
KTO = KTOLoss(beta=0.2, desirable_weight=1.2)


def response(prompt: list[int], chance: random.Random, where: str = "") -> Sample:
    """A prompt with a response of 1 to 9 tokens, the targets."""
    tokens = [chance.randrange(3, VOCAB) for _ in range(chance.randrange(1, 10))]
    return Sample(array("i", prompt + tokens), bytes(len(prompt)) + b"\1" * len(tokens), "", where)


def pairs(seed: int, count: int = 8) -> list[Pair]:
    """Pairs with margins and responses of unequal lengths."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, VOCAB) for _ in range(chance.randrange(2, 9))] for _ in range(count)]
    return [Pair(response(prompt, chance), response(prompt, chance), 0.1 * i) for i, prompt in enumerate(prompts)]


def labeled(seed: int, count: int = 8) -> tuple[list[Sample], list[bool]]:
    """Answers to a prompt each, three of eight of them desirable."""
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
    count: int = 8,
    update: UpdateConfig = UPDATE,
):
    """{kind: (metrics of two steps of `count` rows and of an eval split of at most seven, whole states)}."""
    mesh = layout.mesh()
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
        for step, rows in ((0, count), (1, count), (9, min(count, 7))):
            size, evaluate = update.batch_size, step == 9
            if kind == "sft":
                batch = pack_samples(labeled(step, rows)[0])
                numbers = {"eval_loss": eval_loss(learner, batch)} if evaluate else sft_step(learner, batch)
            elif kind == "reward":
                batch = pack_pairs(pairs(step, rows))
                numbers = pair_eval(learner, batch, 0.05) if evaluate else pair_step(learner, batch, 0.05)
            elif kind == "process":
                batch = pack_steps(steps(step, rows))
                numbers = process_eval(learner, batch) if evaluate else process_step(learner, batch)
            elif kind == "dpo":
                own = pairs(step, rows)
                batch = with_reference(pack_pairs(own), reference_sums(reference, own, size))
                numbers = dpo_eval(learner, batch, DPO) if evaluate else dpo_step(learner, batch, DPO)
            else:
                samples, labels = labeled(step, rows)
                others = [mismatched(samples[i], samples[(i + 1) % rows], 64) for i in range(rows)]
                z = reference_point(learner, others, reference_sums(reference, others, size, pack_samples), size)
                sums = reference_sums(reference, samples, size, pack_samples)
                batch = with_reference(pack_labeled(samples, labels), sums)
                numbers = kto_eval(learner, batch, KTO) | {"kl": z} if evaluate else kto_step(learner, batch, KTO, z)
            metrics |= {f"{name}/{step}": value for name, value in numbers.items()}
        results[kind] = metrics, whole_states(actor=learner)
    return results


def odd_batches(
    rank: int, world: int, layout: Layout, folders: dict[str, Path], counts: tuple[int, ...], size: int = 4
):
    """{rows: KTO's `two_steps`} for batches of `counts` rows in micro-batches of `size`."""
    update = replace(UPDATE, batch_size=5, micro_batch_size=size)  # reference passes of at most five rows
    return {n: two_steps(0, 1, layout, folders, ("kto",), n, update)["kto"] for n in counts}
