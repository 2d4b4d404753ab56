"""Aligns a language model with pairs of a better and a worse answer (DPO, IPO, cDPO and kin), on any number of ranks.

python launch/dpo.py --config launch/configs/dpo_smollm2.toml
torchrun --nproc-per-node 8 launch/dpo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --loss.beta 0.3
torchrun ... launch/dpo.py --resume runs/dpo
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys

import torch
from common.run import Run, start
from common.supervised import SupervisedRun, supervised_run
from report.curves import Line, Panel
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.preference import DPOConfig, check_dpo
from trialign.algorithms.data.preferences import Pair, PairStream
from trialign.algorithms.dpo import dpo_step, held_out, reference_sums, with_reference
from trialign.algorithms.reward_model import pack_pairs

FACTS = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "eval_accuracy": "held out {:.3f}"}
PANELS = (
    Panel("Loss", "a pair", (Line("loss", "#0f766e", "training"), Line("eval_loss", "#be123c", "held out", True))),
    Panel(
        "Implicit-reward accuracy",
        "share",
        (Line("accuracy", "#0f766e", "training"), Line("eval_accuracy", "#be123c", "held out", True)),
    ),
    Panel(
        "Implicit reward", "β log-ratio", (Line("chosen", "#4338ca", "chosen"), Line("rejected", "#b45309", "rejected"))
    ),
    Panel("Gradient norm", "before clipping", (Line("grad_norm", "#475569"),)),
)


class References:
    """The reference's log-probability of every answer the run will meet, computed once. Collective.

    To be made before `begin`, which puts a checkpoint's weights in: the reference is the model before the first step.
    """

    def __init__(self, work: SupervisedRun[PairStream]):
        config, self.data, self.device = work.run.config, work.rows, work.run.mesh.device
        self.rows = {place: i for i, place in enumerate(self.data.coming(work.steps * work.batch_size))}
        pairs = [self.data.pools[pool][row] for pool, row in self.rows] + self.data.held_out
        self.sums = torch.zeros(len(pairs), 2)
        if not config.loss.reference_free:
            read = lambda role, part: reference_sums(role, part, config.update.batch_size)  # noqa: E731
            sums = work.reference_sums(pairs, lambda pair: (pair.chosen, pair.rejected), read)
            self.sums = sums.view(-1, 2)

    def next(self, count: int) -> Batch:
        """The next pairs of the stream with their reference."""
        places = self.data.places(count)
        return self._pack([self.data.pools[pool][row] for pool, row in places], [self.rows[p] for p in places])

    def held_out(self) -> Batch | None:
        """The pairs that are held out, with theirs."""
        numbers = list(range(len(self.rows), len(self.sums)))
        return self._pack(self.data.held_out, numbers) if numbers else None

    def _pack(self, pairs: list[Pair], numbers: list[int]) -> Batch:
        return with_reference(pack_pairs(pairs), self.sums[numbers].flatten()).to(self.device)


def main(run: Run[DPOConfig]) -> None:
    """Sets up, trains, and leaves the exported model and the plot in the run's folder."""
    config = run.config
    read = lambda tokenizer, ends: PairStream(config.data, tokenizer, ends, config.run.seed)  # noqa: E731
    work = supervised_run(run, config.data, read)
    learner, rows = work.learner, References(work)
    unseen = rows.held_out()
    measure = lambda batch: held_out(learner, batch, config.pair_loss)  # noqa: E731
    work.begin(facts=FACTS)

    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch = rows.next(config.update.batch_size)
        metrics = work.epoch()

        with run.phases("update") as phase:
            metrics |= dpo_step(learner, batch, config.pair_loss)
            work.count(phase, batch, passes=3)

        metrics |= work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

    run.finish(PANELS)


if __name__ == "__main__":
    start(DPOConfig, check_dpo, main, "dpo", sys.argv[1:])
