"""Kahneman-Tversky optimization (KTO) on responses labeled desirable or not, on any number of ranks.

python launch/kto.py --config launch/configs/kto_smollm2.toml
torchrun --nproc-per-node 8 launch/kto.py --config my.toml --parallel.tp 2 --parallel.pp 2 --loss.beta 0.3
torchrun ... launch/kto.py --resume runs/kto
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys

from common.reference import reference_pass
from common.run import Run, start
from common.supervised import SupervisedTask
from report.panels import KTO_PANELS
from torch import Tensor
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.preference import KTOConfig
from trialign.algorithms.data.dialogues import Sample, pack_samples
from trialign.algorithms.data.preferences import LabeledResponse, LabeledStream, mismatched
from trialign.algorithms.dpo import reference_sums, with_reference
from trialign.algorithms.kto import kto_eval, kto_step, pack_labeled, reference_point

PROGRESS = {"loss": "loss {:.4f}", "margin": "margin {:+.3f}", "eval_accuracy": "eval accuracy {:.3f}"}


class LabeledWithReference:
    """The stream's responses with the reference's log-probabilities, after their own prompt and after another's. These
    are computed once. Collective.

    Built before `SupervisedTask.begin`, which loads a checkpoint: the reference is the model before the first step.
    """

    def __init__(self, task: SupervisedTask[LabeledStream]):
        config, self.stream, self.device = task.config, task.rows, task.run.mesh.device
        self.rows = {place: i for i, place in enumerate(self.stream.coming(task.steps * config.update.batch_size))}
        own = [self._row(place).sample for place in self.rows]
        partners = [self._row((pool, self.stream.partners[pool][row])).sample for pool, row in self.rows]
        self.others = [mismatched(*two, config.data.max_tokens) for two in zip(own, partners, strict=True)]
        evaluated = [row.sample for row in self.stream.eval_rows]
        compute = lambda role, part: reference_sums(role, part, config.update.batch_size, pack_samples)  # noqa: E731
        samples = own + self.others + evaluated
        sums = reference_pass(task.run, task.learner, samples, lambda sample: (sample,), compute)
        self.sums, self.other_sums, self.eval_sums = sums.split([len(own), len(own), len(evaluated)])

    def _row(self, place: tuple[int, int]) -> LabeledResponse:
        pool, row = place
        return self.stream.pools[pool][row]

    def next(self, count: int) -> tuple[Batch, list[Sample], Tensor]:
        """(batch of the next rows, their mismatched responses, reference log-probabilities of the mismatched)."""
        places = self.stream.places(count)
        numbers = [self.rows[place] for place in places]
        batch = self._pack([self._row(place) for place in places], self.sums[numbers])
        return batch, [self.others[i] for i in numbers], self.other_sums[numbers]

    def eval_batch(self) -> Batch | None:
        """The batch of the eval split's rows; None where there are none."""
        return self._pack(self.stream.eval_rows, self.eval_sums) if self.stream.eval_rows else None

    def _pack(self, rows: list[LabeledResponse], sums: Tensor) -> Batch:
        batch = pack_labeled([row.sample for row in rows], [row.desirable for row in rows])
        return with_reference(batch, sums).to(self.device)


def main(run: Run[KTOConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    config = run.config
    read = lambda tokenizer, ends: LabeledStream(config.data, tokenizer, ends, config.run.seed)  # noqa: E731
    task = SupervisedTask(run, config.data, read)
    learner, rows = task.learner, LabeledWithReference(task)
    evaluate = lambda batch: kto_eval(learner, batch, config.loss)  # noqa: E731
    task.begin(rows.eval_batch(), evaluate, PROGRESS)

    for _ in run.steps():
        batch, others, reference = rows.next(config.update.batch_size)  # rows -> batch with reference logprobs
        with run.phases("reference point"):
            z = reference_point(learner, others, reference, config.update.batch_size)
        with task.update(batch):
            metrics = kto_step(learner, batch, config.loss, z)  # batch -> new weights
        task.end_step(metrics)

    run.finish(KTO_PANELS)


if __name__ == "__main__":
    start(KTOConfig, main, "kto", sys.argv[1:])
