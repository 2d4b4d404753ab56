"""Aligns a language model with pairs of a better and a worse answer (DPO, IPO, cDPO and kin), on any number of ranks.

python launch/dpo.py --config launch/configs/dpo_smollm2.toml
torchrun --nproc-per-node 8 launch/dpo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --loss.beta 0.3
torchrun ... launch/dpo.py --resume runs/dpo
"""

from __future__ import annotations

import sys

import torch
from report import Line, Panel
from session import Session, start
from trialign.algorithms.batch import Batch
from trialign.algorithms.build import build_decoder, build_learner, load_tokenizer, read_shape
from trialign.algorithms.dpo import dpo_step, held_out, reference_sums, with_reference
from trialign.algorithms.pair_config import DPOConfig, check_dpo
from trialign.algorithms.pairs import Pair, read_pairs
from trialign.algorithms.reward_model import pack_pairs, pair_shares
from trialign.algorithms.roles import Role
from trialign.algorithms.rows import RowStream
from trialign.engine.phases import forward_flops
from trialign.models.decoder import Decoder
from trialign.models.hf import stop_ids

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
    """The reference's log-probability of every answer the run will meet, computed once."""

    def __init__(self, session: Session[DPOConfig], data: RowStream[Pair], steps: int, role: Role | None):
        self.data, self.device = data, session.mesh.device
        self.rows = {place: i for i, place in enumerate(data.coming(steps * session.config.update.batch_size))}
        pairs = [data.pools[pool][row] for pool, row in self.rows] + data.held_out
        self.sums = None if role is None else reference_sums(role, pairs, session.config.update).view(-1, 2)

    def next(self, count: int) -> Batch:
        """The next pairs of the stream with their reference."""
        places = self.data.places(count)
        return self._pack([self.data.pools[pool][row] for pool, row in places], [self.rows[p] for p in places])

    def held_out(self) -> Batch:
        """The pairs that are held out, with theirs."""
        first = len(self.rows)
        return self._pack(self.data.held_out, list(range(first, first + len(self.data.held_out))))

    def _pack(self, pairs: list[Pair], numbers: list[int]) -> Batch:
        batch = pack_pairs(pairs)
        sums = torch.zeros(len(batch)) if self.sums is None else self.sums[numbers].flatten()
        return with_reference(batch, sums).to(self.device)


def main(session: Session[DPOConfig]) -> None:
    """Sets up, trains, and leaves the exported model and the plot in the run's folder."""
    config, mesh, folder = session.config, session.mesh, session.config.model.path
    shape = session.together(lambda: read_shape(folder, config.parallel, config.run, "lm", config.lora))
    tokenizer = session.together(lambda: load_tokenizer(folder, shape))
    ends = stop_ids(folder, shape)

    def read() -> RowStream[Pair]:
        load = lambda source: read_pairs(source, config.data, tokenizer, ends)  # noqa: E731
        return RowStream(config.data, load, lambda pair: pair.tokens, config.run.seed, "pairs")

    data = session.together(read)
    steps = config.run.total(len(data), config.update.batch_size)

    def build(path: str, trained: bool) -> Decoder:
        options = {"recompute": config.parallel.recompute, "lora": config.lora, "seed": config.run.seed}
        own = shape if path == folder else read_shape(path, config.parallel, config.run, "lm")
        return build_decoder(path, own, mesh, config.model.dtype, trained=trained, **options)

    model = session.together(lambda: build(folder, True))
    learner = build_learner(model, config.optimizer, steps, ema_decay=config.update.ema_decay)
    # Before `begin`: there the weights of a checkpoint come in, and the reference is the model before the first step.
    reference: Role | None = None
    if not config.loss.reference_free:
        other = config.model.reference
        reference = Role(session.together(lambda: build(other, False))) if other else learner
    rows = References(session, data, steps, reference)
    del reference
    session.begin({"actor": (learner, folder)}, {"data": data}, steps, about=str(data), facts=FACTS)
    unseen = rows.held_out() if data.held_out else None

    for step in session.steps():
        batch = rows.next(config.update.batch_size)
        metrics = {"epoch": (step + 1) * config.update.batch_size / len(data)}

        if unseen and step % (config.run.eval_every or steps) == 0:  # of the weights before the step, as its loss is
            with session.phases("eval") as phase:
                metrics |= held_out(learner, unseen, config.update, config.loss)
                phase.tokens = len(unseen.tokens)
                phase.flops = forward_flops(shape, unseen.lengths, len(unseen.response))

        with session.phases("update") as phase:
            metrics |= dpo_step(learner, batch, pair_shares(batch, config.update, learner), config.loss)
            phase.tokens = len(batch.tokens)
            phase.flops = 3 * forward_flops(shape, batch.lengths, len(batch.response))

        session.end_step(metrics, tokens=len(batch.tokens))

    if unseen:
        last = held_out(learner, unseen, config.update, config.loss)
        session.log(steps, last)
        session.progress.say("held out: " + ", ".join(f"{name[5:]} {value:.4f}" for name, value in last.items()))
    session.finish(PANELS)


if __name__ == "__main__":
    start(DPOConfig, check_dpo, main, "dpo", sys.argv[1:])
