"""Aligns a language model with answers that are wanted or not (KTO), on any number of ranks.

python launch/kto.py --config launch/configs/kto_smollm2.toml
torchrun --nproc-per-node 8 launch/kto.py --config my.toml --parallel.tp 2 --parallel.pp 2 --loss.beta 0.3
torchrun ... launch/kto.py --resume runs/kto
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys
from typing import NamedTuple

from common.run import Run, start
from common.supervised import SupervisedRun, supervised_run
from report.curves import Line, Panel
from torch import Tensor
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.preference import KTOConfig, check_kto
from trialign.algorithms.data.dialogues import Sample, pack_samples
from trialign.algorithms.data.preferences import LabeledResponse, LabeledStream, mismatched
from trialign.algorithms.dpo import with_reference
from trialign.algorithms.kto import held_out, kto_step, pack_labeled, reference_point, sums_of

FACTS = {"loss": "loss {:.4f}", "margin": "margin {:+.3f}", "eval_accuracy": "held out {:.3f}"}
PANELS = (
    Panel("Loss", "an answer", (Line("loss", "#0f766e"),)),
    Panel("Held-out accuracy", "wanted above unwanted", (Line("eval_accuracy", "#be123c", exact=True),)),
    Panel(
        "Implicit reward", "β log-ratio", (Line("chosen", "#4338ca", "wanted"), Line("rejected", "#b45309", "unwanted"))
    ),
    Panel("KL reference point", "nats an answer", (Line("kl", "#475569"),)),
)


class Drawn(NamedTuple):
    """A batch, and the mismatched answers that its reference point is measured on."""

    batch: Batch
    mismatched: list[Sample]
    reference: Tensor  # [mismatched] their log-probability under the reference


class References:
    """The reference's log-probability of every answer the run will meet, with its own prompt and with another's.

    Collective. To be made before `begin`, which puts a checkpoint's weights in: the reference is the model before the
    first step.
    """

    def __init__(self, work: SupervisedRun[LabeledStream]):
        config, self.data, self.device = work.run.config, work.rows, work.run.mesh.device
        self.rows = {place: i for i, place in enumerate(self.data.coming(work.steps * work.batch_size))}
        drawn = [self._row(place).sample for place in self.rows]
        partners = [self._row((pool, self.data.partners[pool][row])).sample for pool, row in self.rows]
        self.others = [mismatched(*two, config.data.max_tokens) for two in zip(drawn, partners, strict=True)]
        unseen = [row.sample for row in self.data.held_out]
        asked = drawn + self.others + unseen
        read = lambda role, part: sums_of(role, part, config.update.batch_size)  # noqa: E731
        sums = work.reference_sums(asked, lambda sample: (sample,), read)
        self.sums, self.other_sums, self.unseen_sums = sums.split([len(drawn), len(drawn), len(unseen)])

    def _row(self, place: tuple[int, int]) -> LabeledResponse:
        pool, row = place
        return self.data.pools[pool][row]

    def next(self, count: int) -> Drawn:
        """The next rows of the stream with their reference."""
        places = self.data.places(count)
        rows, numbers = [self._row(place) for place in places], [self.rows[place] for place in places]
        others = [self.others[i] for i in numbers]
        return Drawn(self._pack(rows, self.sums[numbers]), others, self.other_sums[numbers])

    def held_out(self) -> Batch | None:
        """The rows that are held out, with theirs."""
        return self._pack(self.data.held_out, self.unseen_sums) if self.data.held_out else None

    def _pack(self, rows: list[LabeledResponse], sums: Tensor) -> Batch:
        batch = pack_labeled([row.sample for row in rows], [row.desirable for row in rows])
        return with_reference(batch, sums).to(self.device)


def main(run: Run[KTOConfig]) -> None:
    """Sets up, trains, and leaves the exported model and the plot in the run's folder."""
    config = run.config
    read = lambda tokenizer, ends: LabeledStream(config.data, tokenizer, ends, config.run.seed)  # noqa: E731
    work = supervised_run(run, config.data, read)
    learner, rows = work.learner, References(work)
    unseen = rows.held_out()
    measure = lambda batch: held_out(learner, batch, config.loss)  # noqa: E731
    work.begin(facts=FACTS)

    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch, others, reference = rows.next(config.update.batch_size)
        metrics = work.epoch()

        with run.phases("reference point") as phase:
            z = reference_point(learner, others, reference, config.update.batch_size)
            work.count(phase, pack_samples(others))

        with run.phases("update") as phase:
            metrics |= kto_step(learner, batch, config.loss, z)
            work.count(phase, batch, passes=3)

        metrics |= work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

    run.finish(PANELS)


if __name__ == "__main__":
    start(KTOConfig, check_kto, main, "kto", sys.argv[1:])
