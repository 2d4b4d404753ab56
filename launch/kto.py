"""Aligns a language model with answers that are wanted or not (KTO), on any number of ranks.

python launch/kto.py --config launch/configs/kto_smollm2.toml
torchrun --nproc-per-node 8 launch/kto.py --config my.toml --parallel.tp 2 --parallel.pp 2 --loss.beta 0.3
torchrun ... launch/kto.py --resume runs/kto
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from report import Line, Panel
from session import Session, start
from torch import Tensor
from trialign.algorithms.batch import Batch
from trialign.algorithms.build import build_decoder, build_learner, load_tokenizer, read_shape
from trialign.algorithms.dialogue import Sample
from trialign.algorithms.dpo import with_reference
from trialign.algorithms.kto import held_out, kto_step, pack_labelled, reference_point, sums_of
from trialign.algorithms.pair_config import KTOConfig, check_kto
from trialign.algorithms.pairs import Labelled, mismatched, read_labelled
from trialign.algorithms.roles import Role
from trialign.algorithms.rows import RowStream
from trialign.algorithms.sft import plan
from trialign.engine.phases import forward_flops
from trialign.models.decoder import Decoder
from trialign.models.hf import stop_ids

FACTS = {"loss": "loss {:.4f}", "margin": "margin {:+.3f}", "eval_accuracy": "held out {:.3f}"}
PANELS = (
    Panel("Loss", "an answer", (Line("loss", "#0f766e"),)),
    Panel("Held-out accuracy", "wanted above unwanted", (Line("eval_accuracy", "#be123c", points=True),)),
    Panel(
        "Implicit reward", "β log-ratio", (Line("chosen", "#4338ca", "wanted"), Line("rejected", "#b45309", "unwanted"))
    ),
    Panel("KL reference point", "nats an answer", (Line("kl", "#475569"),)),
)


class Drawn(NamedTuple):
    """A batch, and the mismatched answers that its reference point is measured on."""

    batch: Batch
    mismatched: list[Sample]
    reference: Tensor  # [mismatched] their log-probability under the reference


class References:
    """The reference's log-probability of every answer the run will meet, with its own prompt and with another's."""

    def __init__(self, session: Session[KTOConfig], data: RowStream[Labelled], steps: int, role: Role):
        config, self.data, self.device = session.config, data, session.mesh.device
        self.rows = {place: i for i, place in enumerate(data.coming(steps * config.update.batch_size))}
        drawn = [self._row(place).sample for place in self.rows]
        self.others = [
            mismatched(self._row((pool, row)).sample, self._row((pool, row + 1)).sample, config.data.max_tokens)
            for pool, row in self.rows
        ]
        unseen = [row.sample for row in data.held_out]
        sums = sums_of(role, drawn + self.others + unseen, config.update)
        self.sums, self.other_sums, self.unseen_sums = sums.split([len(drawn), len(drawn), len(unseen)])

    def _row(self, place: tuple[int, int]) -> Labelled:
        pool, row = place
        return self.data.pools[pool][row % len(self.data.pools[pool])]

    def next(self, count: int) -> Drawn:
        """The next rows of the stream with their reference."""
        places = self.data.places(count)
        rows, numbers = [self._row(place) for place in places], [self.rows[place] for place in places]
        others = [self.others[i] for i in numbers]
        return Drawn(self._pack(rows, self.sums[numbers]), others, self.other_sums[numbers])

    def held_out(self) -> Batch:
        """The rows that are held out, with theirs."""
        return self._pack(self.data.held_out, self.unseen_sums)

    def _pack(self, rows: list[Labelled], sums: Tensor) -> Batch:
        batch = pack_labelled([row.sample for row in rows], [row.desirable for row in rows])
        return with_reference(batch, sums).to(self.device)


def main(session: Session[KTOConfig]) -> None:
    """Sets up, trains, and leaves the exported model and the plot in the run's folder."""
    config, mesh, folder = session.config, session.mesh, session.config.model.path
    shape = session.together(lambda: read_shape(folder, config.parallel, config.run, "lm", config.lora))
    tokenizer = session.together(lambda: load_tokenizer(folder, shape))
    ends = stop_ids(folder, shape)

    def read() -> RowStream[Labelled]:
        load = lambda source: read_labelled(source, config.data, tokenizer, ends)  # noqa: E731
        return RowStream(config.data, load, lambda row: len(row.sample.tokens), config.run.seed, "labelled answers")

    data = session.together(read)
    steps = config.run.total(len(data), config.update.batch_size)

    def build(path: str, trained: bool) -> Decoder:
        options = {"recompute": config.parallel.recompute, "lora": config.lora, "seed": config.run.seed}
        own = shape if path == folder else read_shape(path, config.parallel, config.run, "lm")
        return build_decoder(path, own, mesh, config.model.dtype, trained=trained, **options)

    model = session.together(lambda: build(folder, True))
    learner = build_learner(model, config.optimizer, steps, ema_decay=config.update.ema_decay)
    # Before `begin`: there the weights of a checkpoint come in, and the reference is the model before the first step.
    other = config.model.reference
    rows = References(session, data, steps, Role(session.together(lambda: build(other, False))) if other else learner)
    wanted = sum(row.desirable for pool in data.pools for row in pool)
    about = f"{data}; {wanted} of them wanted"
    session.begin({"actor": (learner, folder)}, {"data": data}, steps, about=about, facts=FACTS)
    unseen = rows.held_out() if data.held_out else None

    for step in session.steps():
        batch, others, reference = rows.next(config.update.batch_size)
        metrics = {"epoch": (step + 1) * config.update.batch_size / len(data)}

        if unseen and step % (config.run.eval_every or steps) == 0:  # of the weights before the step, as its loss is
            with session.phases("eval") as phase:
                metrics |= held_out(learner, unseen, config.update, config.loss)
                phase.tokens = len(unseen.tokens)
                phase.flops = forward_flops(shape, unseen.lengths, len(unseen.response))

        with session.phases("reference point") as phase:
            z = reference_point(learner, others, reference, config.update)
            lengths = [len(sample.tokens) for sample in others]
            phase.tokens = sum(lengths)
            phase.flops = forward_flops(shape, lengths, sum(sample.targets for sample in others))

        with session.phases("update") as phase:
            shares = plan(batch, config.update, mesh)
            metrics |= kto_step(learner, batch, shares, config.loss, z)
            phase.tokens = len(batch.tokens)
            phase.flops = 3 * forward_flops(shape, batch.lengths, len(batch.response))

        session.end_step(metrics, tokens=len(batch.tokens))

    if unseen:
        last = held_out(learner, unseen, config.update, config.loss)
        session.log(steps, last)
        session.progress.say("held out: " + ", ".join(f"{name[5:]} {value:.4f}" for name, value in last.items()))
    session.finish(PANELS)


if __name__ == "__main__":
    start(KTOConfig, check_kto, main, "kto", sys.argv[1:])
