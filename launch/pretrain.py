"""Continued pretraining of a language model on plain text, on any number of ranks.

python launch/pretrain.py --config launch/configs/pretrain_smollm2.toml
torchrun --nproc-per-node 8 launch/pretrain.py --config my.toml --parallel.tp 2 --parallel.pp 2 --optimizer.lr 3e-5
torchrun ... launch/pretrain.py --resume runs/pretrain
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys

from common.run import Run, start
from common.supervised import SupervisedTask
from report.panels import PRETRAIN_PANELS
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.pretrain import PretrainConfig
from trialign.algorithms.data.documents import TextStream, pack_documents, pack_rows
from trialign.algorithms.metrics import perplexity
from trialign.algorithms.sft import eval_loss, sft_step

PROGRESS = {"loss": "loss {:.4f}", "eval_perplexity": "eval perplexity {:.3f}", "epoch": "epoch {:.2f}"}


def main(run: Run[PretrainConfig]) -> None:
    """Trains; leaves the exported model and the plot in the run's folder."""
    config, mesh = run.config, run.mesh
    task = SupervisedTask(run, config.data, lambda tokenizer, _: TextStream(config.data, tokenizer, config.run.seed))
    eval_batch = pack_documents(task.rows.eval_rows).to(mesh.device) if task.rows.eval_rows else None

    def evaluate(batch: Batch) -> dict[str, float]:
        loss = eval_loss(task.learner, batch)
        return {"eval_loss": loss, "eval_perplexity": perplexity(loss)}

    task.begin(eval_batch, evaluate, PROGRESS)

    for _ in run.steps():
        batch = pack_rows(task.rows.next(config.update.batch_size)).to(mesh.device)  # rows -> batch
        with task.update(batch):
            metrics = sft_step(task.learner, batch)  # batch -> new weights
        task.end_step(metrics)

    run.finish(PRETRAIN_PANELS)


if __name__ == "__main__":
    start(PretrainConfig, main, "pretrain", sys.argv[1:])
