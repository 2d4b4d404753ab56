"""Trains a reward model on pairs of a better and a worse answer, or on steps that are right or wrong, on any number of
ranks.

python launch/reward.py --config launch/configs/reward_smollm2.toml
torchrun --nproc-per-node 8 launch/reward.py --config my.toml --parallel.tp 2 --parallel.pp 2
torchrun ... launch/reward.py --resume runs/reward
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys
from collections.abc import Callable, Sequence
from typing import Any

from common.run import Run, start
from common.supervised import supervised_run
from report.curves import Line, Panel
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.preference import RewardModelConfig, check_reward
from trialign.algorithms.data.preferences import Pair, PairStream, Steps, read_steps
from trialign.algorithms.data.sources import RowReader
from trialign.algorithms.data.streams import RowStream
from trialign.algorithms.reward_model import (
    held_out_pairs,
    held_out_process,
    pack_pairs,
    pack_steps,
    pair_step,
    process_step,
)

ReadPairs = Callable[[str, RowReader], Sequence[Pair]]
FACTS = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "eval_accuracy": "held out {:.3f}"}
PANELS = (
    Panel("Loss", "nats a pair", (Line("loss", "#0f766e", "training"), Line("eval_loss", "#be123c", "held out", True))),
    Panel(
        "Accuracy",
        "share",
        (Line("accuracy", "#0f766e", "training"), Line("eval_accuracy", "#be123c", "held out", True)),
    ),
    Panel("Scores", "mean", (Line("chosen", "#4338ca", "chosen"), Line("rejected", "#b45309", "rejected"))),
    Panel("Calibration error", "held out", (Line("eval_calibration", "#475569", exact=True),)),
)


def main(run: Run[RewardModelConfig], read: ReadPairs | None = None) -> None:
    """Sets up, trains, and leaves the exported reward model and the plot in the run's folder.

    Args:
        read: the pairs of a source, where they are not rows of text.
    """
    config, mesh = run.config, run.mesh
    by_pairs = config.rows is config.data
    pack: Any = pack_pairs if by_pairs else pack_steps
    work = supervised_run(run, config.rows, lambda tokenizer, ends: rows(config, tokenizer, ends, read), "score")
    learner, data, run.scores = work.learner, work.rows, "" if by_pairs else "steps"

    def measure(batch: Batch) -> dict[str, float]:
        if by_pairs:
            return held_out_pairs(learner, batch, config.loss.centering, names)
        return held_out_process(learner, batch, names)

    names = scored_names(data.held_out)
    unseen = pack(data.held_out).to(mesh.device) if data.held_out else None
    work.begin(facts=FACTS)

    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch = pack(data.next(config.update.batch_size)).to(mesh.device)
        metrics = work.epoch()

        with run.phases("update") as phase:
            if by_pairs:
                metrics |= pair_step(learner, batch, config.loss.centering)
            else:
                metrics |= process_step(learner, batch)
            work.count(phase, batch, passes=3)

        metrics |= work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

    run.finish(PANELS, role="reward")


def scored_names(rows: Sequence[Pair] | Sequence[Steps]) -> list[str]:
    """What the scores of these rows are of, in their order: both responses of a pair, each step of an answer."""
    names = []
    for row in rows:
        if isinstance(row, Pair):
            names += [f"{row.chosen.where} (chosen)", f"{row.rejected.where} (rejected)"]
        else:
            names += [f"{row.sample.where} (step {i + 1})" for i in range(len(row.labels))]
    return names


def rows(config: RewardModelConfig, tokenizer, ends, read: ReadPairs | None = None) -> RowStream[Any]:
    """The stream of pairs, or of answers in steps."""
    seed, reader = config.run.seed, RowReader()
    if config.steps.sources:
        load_steps = lambda source: read_steps(source, config.steps, tokenizer, reader)  # noqa: E731
        return RowStream(config.steps, load_steps, lambda row: row.lengths, seed, "answers in steps", reader)
    if read is not None:
        load_pairs = lambda source: read(source, reader)  # noqa: E731
        return RowStream(config.data, load_pairs, lambda pair: pair.lengths, seed, "pairs", reader)
    return PairStream(config.data, tokenizer, ends, seed)


if __name__ == "__main__":
    start(RewardModelConfig, check_reward, main, "reward", sys.argv[1:])
