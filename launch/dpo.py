"""Direct preference optimization (DPO, IPO, cDPO and kin) on pairs of responses, on any number of ranks.

python launch/dpo.py --config launch/configs/dpo_smollm2.toml
torchrun --nproc-per-node 8 launch/dpo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --loss.beta 0.3
torchrun ... launch/dpo.py --resume runs/dpo
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys

import torch
from common.reference import reference_pass
from common.run import Run, start
from common.supervised import SupervisedTask
from report.panels import DPO_PANELS
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.preference import DPOConfig
from trialign.algorithms.data.preferences import Pair, PairStream
from trialign.algorithms.dpo import dpo_eval, dpo_step, reference_sums, with_reference
from trialign.algorithms.reward_model import pack_pairs

PROGRESS = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "eval_accuracy": "eval accuracy {:.3f}"}


class PairsWithReference:
    """The stream's pairs with the reference's log-probabilities, computed once. Collective.

    Built before `SupervisedTask.begin`, which loads a checkpoint: the reference is the model before the first step.
    """

    def __init__(self, task: SupervisedTask[PairStream]):
        config, self.stream, self.device = task.config, task.rows, task.run.mesh.device
        self.rows = {place: i for i, place in enumerate(self.stream.coming(task.steps * config.update.batch_size))}
        pairs = [self.stream.pools[pool][row] for pool, row in self.rows] + self.stream.eval_rows
        self.sums = torch.zeros(len(pairs), 2)  # log-probabilities of chosen and rejected
        if not config.loss.reference_free:
            compute = lambda role, part: reference_sums(role, part, config.update.batch_size)  # noqa: E731
            both = lambda pair: (pair.chosen, pair.rejected)  # noqa: E731
            self.sums = reference_pass(task.run, task.learner, pairs, both, compute).view(-1, 2)

    def next(self, count: int) -> Batch:
        """The batch of the next `count` pairs."""
        places = self.stream.places(count)
        return self._pack([self.stream.pools[pool][row] for pool, row in places], [self.rows[p] for p in places])

    def eval_batch(self) -> Batch | None:
        """The batch of the eval split's pairs; None where there are none."""
        numbers = list(range(len(self.rows), len(self.sums)))
        return self._pack(self.stream.eval_rows, numbers) if numbers else None

    def _pack(self, pairs: list[Pair], numbers: list[int]) -> Batch:
        return with_reference(pack_pairs(pairs), self.sums[numbers].flatten()).to(self.device)


def main(run: Run[DPOConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    config = run.config
    read = lambda tokenizer, ends: PairStream(config.data, tokenizer, ends, config.run.seed)  # noqa: E731
    task = SupervisedTask(run, config.data, read)
    learner, pairs = task.learner, PairsWithReference(task)
    evaluate = lambda batch: dpo_eval(learner, batch, config.loss)  # noqa: E731
    task.begin(pairs.eval_batch(), evaluate, PROGRESS)

    for _ in run.steps():
        batch = pairs.next(config.update.batch_size)  # pairs -> batch with reference logprobs
        with task.update(batch):
            metrics = dpo_step(learner, batch, config.loss)  # batch -> new weights
        task.end_step(metrics)

    run.finish(DPO_PANELS)


if __name__ == "__main__":
    start(DPOConfig, main, "dpo", sys.argv[1:])
