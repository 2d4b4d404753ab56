"""Supervised fine-tuning (SFT) on the assistant's turns of dialogues, on any number of ranks.

python launch/sft.py --config launch/configs/sft_smollm2.toml
torchrun --nproc-per-node 8 launch/sft.py --config my.toml --parallel.tp 2 --parallel.pp 2 --optimizer.lr 2e-5
torchrun ... launch/sft.py --resume runs/sft
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys

from common.run import Run, start
from common.supervised import SupervisedTask
from report.panels import SFT_PANELS
from report.tables import response_table
from trialign.algorithms.config.sft import SFTConfig
from trialign.algorithms.data.dialogues import DialogueDataset, joined, pack_samples
from trialign.algorithms.sft import eval_loss, sft_step

PROGRESS = {"loss": "loss {:.4f}", "eval_loss": "eval loss {:.4f}", "epoch": "epoch {:.2f}"}


def main(run: Run[SFTConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    config, mesh = run.config, run.mesh
    read = lambda tokenizer, ends: DialogueDataset(config.data, tokenizer, ends, config.run.seed)  # noqa: E731
    task = SupervisedTask(run, config.data, read)
    learner, rows = task.learner, task.rows
    eval_batch = pack_samples(joined(rows.eval_rows)).to(mesh.device) if rows.eval_rows else None
    task.begin(eval_batch, lambda batch: {"eval_loss": eval_loss(learner, batch)}, PROGRESS)
    shown = rows.prompts(config.run.show)
    before = run.remember("before.json", lambda: task.greedy_responses(shown)[0])

    for _ in run.steps():
        batch = pack_samples(joined(rows.next(config.update.batch_size))).to(mesh.device)  # rows -> batch
        with task.update(batch):
            metrics = sft_step(learner, batch)  # batch -> new weights
        task.end_step(metrics)

    after, _ = task.greedy_responses(shown)
    run.finish(SFT_PANELS, *([response_table(before, after)] if after else []))


if __name__ == "__main__":
    start(SFTConfig, main, "sft", sys.argv[1:])
