"""What scripts that learn from rows (SFT, reward models, DPO, KTO) have in common around a run.

    work = supervised_run(run, run.config.data, read)     # model, tokenizer and rows; what learns
    work.begin()
    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch = ...                                          # of the next rows
        with run.phases("update") as phase:
            metrics = ...
            work.count(phase, batch, passes=3)
        metrics |= work.epoch() | work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

Only the update is an algorithm's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.common import EpochRun, LoRAConfig, OptimizerConfig, UpdateConfig
from trialign.algorithms.config.data import RowData
from trialign.algorithms.data.dialogues import Sample
from trialign.algorithms.data.streams import RowStream
from trialign.algorithms.rewards.encoder import check_vocabulary
from trialign.algorithms.roles.build import build_decoder, build_learner, load_tokenizer, read_shape
from trialign.algorithms.roles.role import Learner, Role
from trialign.algorithms.rollout.sync import stop_tokens
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.profiler import Phase
from trialign.engine.storage.atomic import atomic_file
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.flops import forward_flops
from trialign.models.hf.tokenizer import stop_ids

from .run import Run, ScriptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Measure = Callable[[Batch], dict[str, float]]
Row = TypeVar("Row")
PART = 512
"""Rows whose reference is computed between two writes of what there is."""


class RowConfig(ScriptConfig, Protocol):
    """The sections that the config of such a script has."""

    @property
    def lora(self) -> LoRAConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def update(self) -> UpdateConfig: ...
    @property
    def run(self) -> EpochRun: ...


Rows = TypeVar("Rows", bound=RowStream[Any])


@dataclass(frozen=True)
class SupervisedRun(Generic[Rows]):
    """What there is before the first step, and what every step does besides its update."""

    run: Run[Any]
    shape: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]  # tokens that end an answer
    rows: Rows
    steps: int  # of the whole run
    learner: Learner

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self.run.config.update.batch_size

    def begin(self, facts: Mapping[str, str] | None = None) -> None:
        """`Run.begin` with what learns and its rows. Collective."""
        role = "actor" if self.learner.model.kind == "lm" else "reward"
        learners = {role: (self.learner, self.run.config.model.path)}
        about = f"{self.rows}; {stop_tokens(self.ends, self.tokenizer)}"
        self.run.begin(learners, {"data": self.rows}, self.steps, about=about, facts=facts)

    def epoch(self) -> dict[str, float]:
        """Passes over the rows after this step."""
        return {"epoch": (self.run.step + 1) * self.batch_size / len(self.rows)}

    def count(self, phase: Phase, batch: Batch, passes: int = 1) -> None:
        """Notes what a phase did with a batch; a forward with its backward is three passes."""
        logits = len(batch.response) if self.learner.model.kind == "lm" else 0
        phase.tokens += len(batch.tokens)
        phase.flops += passes * forward_flops(self.shape, batch.lengths, logits)

    def held_out_before(self, batch: Batch | None, measure: Measure) -> None:
        """Measures the held-out rows before the first step of the run and logs that as step 0."""
        if batch is not None and self.run.step == 0:
            self.run.log(0, self._measured(batch, measure) | self.run.phases.take())

    def held_out(self, batch: Batch | None, measure: Measure) -> dict[str, float]:
        """Measurements of the held-out rows after the update of a step, where they are due."""
        done = self.run.step + 1
        if batch is None or (done % (self.run.config.run.eval_every or self.steps) and done != self.steps):
            return {}
        measured = self._measured(batch, measure)
        if done == self.steps:
            text = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in measured.items())
            self.run.progress.say(f"held out, after {done} steps: {text}")
        return measured

    def _measured(self, batch: Batch, measure: Measure) -> dict[str, float]:
        with self.run.phases("eval") as phase:
            self.count(phase, batch)
            return measure(batch)

    def reference_sums(
        self,
        rows: Sequence[Row],
        samples: Callable[[Row], Sequence[Sample]],
        read: Callable[[Role, Sequence[Row]], Tensor],
    ) -> Tensor:
        """[samples of all rows] fp32: their log-probabilities under the reference, each computed once. Collective.

        The reference: model.reference, or where that is "" the learner as it is now. What it gave is kept in the run's
        folder as it comes, in parts named after all that they depend on: a run that is started again computes only
        what is not there.

        Args:
            samples: of a row.
            read: computes the log-probabilities of some rows' samples, given the reference.

        Raises:
            FloatingPointError: one is not finite, and its step may not be skipped; on every rank, naming its row.
        """
        run, config = self.run, self.run.config
        option = "model.reference" if config.model.reference else "model.path"
        contents = [[*run.record.facts["contents"][key].values()] for key in (option, "lora.adapter")]
        asked = json.dumps([*contents, config.model.dtype])
        parts = [rows[i : i + PART] for i in range(0, len(rows), PART)]
        names = [_digest(asked, (sample for row in part for sample in samples(row))) for part in parts]
        folder = run.folder / "reference"
        kept = run.on_all_ranks(lambda: _kept(folder, names) if run.mesh.is_main else {})
        kept = gather_objects(kept, run.mesh.world)[0]
        run.record.write_begun()
        missing = [(name, part) for name, part in zip(names, parts, strict=True) if name not in kept]
        role: Role = self.learner
        if missing:
            if run.mesh.is_main:  # said, for it may take a while before the run's first line
                name, count = config.model.reference or "the model as it is", sum(len(part) for _, part in missing)
                print(f"reference: {name}; log-probabilities of {count} rows, computed once", flush=True)
            role = self._reference(config.model.reference) if config.model.reference else self.learner
        with run.progress.work("log-probabilities under the reference"):
            for name, part in missing:
                kept[name] = sums = read(role, part).contiguous()
                self._check_reference([sample for row in part for sample in samples(row)], sums)
                run.on_all_ranks(lambda n=name, s=sums: _keep(folder, n, s) if run.mesh.is_main else None)
        return torch.cat([kept[name] for name in names])

    def _check_reference(self, samples: Sequence[Sample], sums: Tensor) -> None:
        """Raises FloatingPointError where a sample's log-probability is not finite, unless its step is skipped."""
        config = self.run.config
        bad = (~sums.isfinite()).nonzero().flatten().tolist()
        if bad and config.optimizer.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{config.model.reference or 'the model as it is'}: the reference's log-probability of"
                f" {samples[bad[0]].where} is {sums[bad[0]].item()}: must be a finite number"
                f" ({len(bad)} of {len(samples)} are not)"
            )

    def _reference(self, folder: str) -> Role:
        config: RowConfig = self.run.config
        shape = self.run.on_all_ranks(lambda: read_shape(folder, config.parallel, config.run, "lm"))
        mesh, dtype, parallel = self.run.mesh, config.model.dtype, config.parallel
        build = lambda: build_decoder(folder, shape, mesh, dtype, parallel=parallel)  # noqa: E731
        return Role(self.run.on_all_ranks(build, folder), sizes=config.update)


def _digest(asked: str, samples: Iterable[Sample]) -> str:
    """A name for what the reference gives these samples."""
    digest = sha256(asked.encode())
    for sample in samples:
        digest.update(len(sample.tokens).to_bytes(8) + sample.tokens.tobytes() + sample.mask)
    return digest.hexdigest()[:32]


def _kept(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The parts that are there."""
    paths = {name: folder / f"{name}.safetensors" for name in names}
    return {name: load_file(path)["sums"] for name, path in paths.items() if path.exists()}


def _keep(folder: Path, name: str, sums: Tensor) -> None:
    """Writes a part, whole or not at all."""
    with atomic_file(folder / f"{name}.safetensors") as aside:
        save_file({"sums": sums}, aside)


def supervised_run(
    run: Run[Any],
    section: RowData,
    read: Callable[[PreTrainedTokenizerBase, tuple[int, ...]], Rows],
    kind: HeadKind = "lm",
) -> SupervisedRun[Rows]:
    """Reads the model's shape and tokenizer, then the rows, then builds what learns from them. Collective.

    Args:
        section: of the config, which says how long a row's samples may be.
        read: the rows, given the tokenizer and the tokens that end an answer.
        kind: the head of what learns; "score" puts one on a language model that has none.
    """
    config: RowConfig = run.config
    folder = config.model.path

    def look() -> tuple[ModelConfig, PreTrainedTokenizerBase]:
        shape = read_shape(folder, config.parallel, config.run, "lm" if kind == "lm" else None, config.lora)
        if section.max_tokens > shape.longest_document:
            raise ValueError(f"max_tokens={section.max_tokens}: {folder} has positions for {shape.longest_document}")
        reference = getattr(config.model, "reference", "")
        if reference:
            check_vocabulary(reference, read_shape(reference, config.parallel, config.run, "lm"), folder, shape)
        return shape, load_tokenizer(folder, shape)

    shape, tokenizer = run.on_all_ranks(look)
    ends = run.on_all_ranks(lambda: stop_ids(folder, shape, tokenizer))
    rows = run.on_all_ranks(lambda: read(tokenizer, ends), "rows")
    run.check_same_on_all(rows.state())
    steps = config.run.total(len(rows), config.update.batch_size)
    options = {"parallel": config.parallel, "lora": config.lora, "seed": config.run.seed}
    model = run.on_all_ranks(
        lambda: build_decoder(folder, shape, run.mesh, config.model.dtype, head=kind, trained=True, **options),
        "model",
    )
    name = "actor" if kind == "lm" else "reward"
    update = {"ema_decay": config.update.ema_decay, "sizes": config.update}
    learner = build_learner(model, config.optimizer, steps, **update, name=name)
    return SupervisedRun(run, shape, tokenizer, ends, rows, steps, learner)
