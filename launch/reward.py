"""Reward models, trained on pairs of responses or on labeled steps (process), on any number of ranks.

python launch/reward.py --config launch/configs/reward_smollm2.toml
torchrun --nproc-per-node 8 launch/reward.py --config my.toml --parallel.tp 2 --parallel.pp 2
torchrun ... launch/reward.py --resume runs/reward
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys
from collections.abc import Callable, Sequence
from typing import Any

from common.run import Run, start
from common.supervised import SupervisedTask
from report.panels import REWARD_PANELS
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.preference import RewardModelConfig
from trialign.algorithms.data.preferences import Pair, PairStream, read_steps
from trialign.algorithms.data.sources import RowReader
from trialign.algorithms.data.streams import RowStream
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_eval, pair_step, process_eval, process_step

ReadPairs = Callable[[str, RowReader], Sequence[Pair]]
PROGRESS = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "eval_accuracy": "eval accuracy {:.3f}"}


def main(run: Run[RewardModelConfig], read: ReadPairs | None = None) -> None:
    """Trains; leaves the exported reward model and the plot in the run's folder.

    Args:
        read: reads the pairs of a source, where they are not rows of text.
    """
    config, mesh = run.config, run.mesh
    by_pairs = config.rows is config.data
    pack: Any = pack_pairs if by_pairs else pack_steps
    task = SupervisedTask(run, config.rows, lambda tokenizer, ends: stream(config, tokenizer, ends, read), "score")
    learner, rows, run.scores = task.learner, task.rows, "" if by_pairs else "steps"

    def evaluate(batch: Batch) -> dict[str, float]:
        if by_pairs:
            return pair_eval(learner, batch, config.loss.center_coef)
        return process_eval(learner, batch)

    task.begin(pack(rows.eval_rows).to(mesh.device) if rows.eval_rows else None, evaluate, PROGRESS)

    for _ in run.steps():
        batch = pack(rows.next(config.update.batch_size)).to(mesh.device)  # rows -> batch
        with task.update(batch):  # batch -> new weights
            if by_pairs:
                metrics = pair_step(learner, batch, config.loss.center_coef)
            else:
                metrics = process_step(learner, batch)
        task.end_step(metrics)

    run.finish(REWARD_PANELS, role="reward")


def stream(config: RewardModelConfig, tokenizer, ends, read: ReadPairs | None = None) -> RowStream[Any]:
    """The stream of pairs, or of responses in labeled steps."""
    seed, reader = config.run.seed, RowReader(config.rows.reader)
    if config.steps.sources:
        load_steps = lambda source: read_steps(source, config.steps, tokenizer, reader)  # noqa: E731
        return RowStream(config.steps, load_steps, lambda row: row.lengths, seed, "responses in steps", reader)
    if read is not None:
        load_pairs = lambda source: read(source, reader)  # noqa: E731
        return RowStream(config.data, load_pairs, lambda pair: pair.lengths, seed, "pairs", reader)
    return PairStream(config.data, tokenizer, ends, seed)


if __name__ == "__main__":
    start(RewardModelConfig, main, "reward", sys.argv[1:])
