"""Goes on with the pretraining of a language model on plain text, on any number of ranks.

python launch/pretrain.py --config launch/configs/pretrain_smollm2.toml
torchrun --nproc-per-node 8 launch/pretrain.py --config my.toml --parallel.tp 2 --parallel.pp 2 --optimizer.lr 3e-5
torchrun ... launch/pretrain.py --resume runs/pretrain
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys

from common.run import Run, start
from common.supervised import supervised_run
from report.curves import Line, Panel
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.pretrain import PretrainConfig, check_pretrain
from trialign.algorithms.data.documents import TextStream, pack_rows
from trialign.algorithms.metrics import perplexity
from trialign.algorithms.sft import held_out_loss, sft_step

FACTS = {"loss": "loss {:.4f}", "eval_perplexity": "held-out perplexity {:.3f}", "epoch": "epoch {:.2f}"}
PANELS = (
    Panel(
        "Loss", "nats a token", (Line("loss", "#0f766e", "training"), Line("eval_loss", "#be123c", "held out", True))
    ),
    Panel("Perplexity", "held out", (Line("eval_perplexity", "#be123c", exact=True),)),
    Panel("Entropy", "nats a token", (Line("entropy", "#4338ca"),)),
    Panel("Gradient norm", "before clipping", (Line("grad_norm", "#b45309"),)),
)


def main(run: Run[PretrainConfig]) -> None:
    """Sets up, trains, and leaves the exported model and the plot in the run's folder."""
    config, mesh = run.config, run.mesh
    work = supervised_run(run, config.data, lambda tokenizer, _: TextStream(config.data, tokenizer, config.run.seed))
    unseen = pack_rows(work.rows.held_out).to(mesh.device) if work.rows.held_out else None
    work.begin(facts=FACTS)

    def measure(batch: Batch) -> dict[str, float]:
        loss = held_out_loss(work.learner, batch)
        return {"eval_loss": loss, "eval_perplexity": perplexity(loss)}

    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch = pack_rows(work.rows.next(config.update.batch_size)).to(mesh.device)
        metrics = work.epoch()
        with run.phases("update") as phase:
            metrics |= sft_step(work.learner, batch)
            work.count(phase, batch, passes=3)
        metrics |= work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

    run.finish(PANELS)


if __name__ == "__main__":
    start(PretrainConfig, check_pretrain, main, "pretrain", sys.argv[1:])
