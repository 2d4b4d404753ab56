"""Trains a reward model on pairs of a better and a worse answer, or on steps that are right or wrong, on any number of
ranks.

python launch/reward.py --config launch/configs/reward_smollm2.toml
torchrun --nproc-per-node 8 launch/reward.py --config my.toml --parallel.tp 2 --parallel.pp 2
torchrun ... launch/reward.py --resume runs/reward
"""

from __future__ import annotations

import sys
from typing import Any

from report import Line, Panel
from session import Session, start
from trialign.algorithms.build import build_decoder, build_learner, load_tokenizer, read_shape
from trialign.algorithms.pair_config import RewardModelConfig, check_reward
from trialign.algorithms.pairs import Pair, Steps, read_pairs, read_steps
from trialign.algorithms.reward_model import (
    held_out_pairs,
    held_out_steps,
    pack_pairs,
    pack_steps,
    pair_shares,
    pair_step,
    step_step,
)
from trialign.algorithms.rows import RowStream
from trialign.algorithms.sft import plan
from trialign.engine.phases import forward_flops
from trialign.models.decoder import Decoder
from trialign.models.hf import stop_ids

FACTS = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "eval_accuracy": "held out {:.3f}"}
PANELS = (
    Panel("Loss", "nats a pair", (Line("loss", "#0f766e", "training"), Line("eval_loss", "#be123c", "held out", True))),
    Panel(
        "Accuracy",
        "share",
        (Line("accuracy", "#0f766e", "training"), Line("eval_accuracy", "#be123c", "held out", True)),
    ),
    Panel("Scores", "mean", (Line("chosen", "#4338ca", "chosen"), Line("rejected", "#b45309", "rejected"))),
    Panel("Calibration error", "held out", (Line("eval_calibration", "#475569", points=True),)),
)


def main(session: Session[RewardModelConfig]) -> None:
    """Sets up, trains, and leaves the exported reward model and the plot in the run's folder."""
    config, mesh, folder = session.config, session.mesh, session.config.model.path
    shape = session.together(lambda: read_shape(folder, config.parallel, config.run, None, config.lora))
    tokenizer = session.together(lambda: load_tokenizer(folder, shape))
    data: RowStream[Any] = session.together(lambda: rows(config, tokenizer, stop_ids(folder, shape)))
    steps = config.run.total(len(data), config.update.batch_size)

    def build() -> Decoder:
        options = {"recompute": config.parallel.recompute, "lora": config.lora, "seed": config.run.seed}
        return build_decoder(folder, shape, mesh, config.model.dtype, head="score", trained=True, **options)

    model = session.together(build)
    learner = build_learner(model, config.optimizer, steps, ema_decay=config.update.ema_decay, name="reward")
    by_pairs = config.rows is config.data
    held_out = (pack_pairs if by_pairs else pack_steps)(data.held_out).to(mesh.device) if data.held_out else None
    session.begin({"reward": (learner, folder)}, {"data": data}, steps, about=str(data), facts=FACTS)

    def measure() -> dict[str, float]:
        if held_out is None:
            return {}
        if by_pairs:
            return held_out_pairs(learner, held_out, config.update, config.loss.centring)
        return held_out_steps(learner, held_out, config.update)

    for step in session.steps():
        rows_ = data.next(config.update.batch_size)
        batch = (pack_pairs if by_pairs else pack_steps)(rows_).to(mesh.device)
        metrics = {"epoch": (step + 1) * config.update.batch_size / len(data)}

        if held_out and step % (config.run.eval_every or steps) == 0:
            with session.phases("eval") as phase:
                metrics |= measure()
                phase.tokens, phase.flops = len(held_out.tokens), forward_flops(shape, held_out.lengths)

        with session.phases("update") as phase:
            if by_pairs:
                shares = pair_shares(batch, config.update, learner)
                metrics |= pair_step(learner, batch, shares, config.loss.centring)
            else:
                metrics |= step_step(learner, batch, plan(batch, config.update, mesh))
            phase.tokens, phase.flops = len(batch.tokens), 3 * forward_flops(shape, batch.lengths)

        session.end_step(metrics, tokens=len(batch.tokens))

    if last := measure():
        session.log(steps, last)
        session.progress.say("held out: " + ", ".join(f"{name[5:]} {value:.4f}" for name, value in last.items()))
    session.finish(PANELS, role="reward")


def rows(config: RewardModelConfig, tokenizer, ends) -> RowStream[Pair] | RowStream[Steps]:
    """The stream of pairs, or of answers in steps."""
    if config.steps.sources:

        def load_steps(source: str) -> list[Steps]:
            return read_steps(source, config.steps, tokenizer, ends)

        return RowStream(config.steps, load_steps, lambda r: len(r.sample.tokens), config.run.seed, "answers in steps")

    def load_pairs(source: str) -> list[Pair]:
        return read_pairs(source, config.data, tokenizer, ends)

    return RowStream(config.data, load_pairs, lambda pair: pair.tokens, config.run.seed, "pairs")


if __name__ == "__main__":
    start(RewardModelConfig, check_reward, main, "reward", sys.argv[1:])
