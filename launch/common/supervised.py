"""Setup and evaluation shared by scripts that learn from rows: pretraining, SFT, reward models, DPO, KTO.

task = SupervisedTask(run, config.data, read)            # model, tokenizer, rows, learner
task.begin(eval_batch, evaluate, PROGRESS)               # evaluates before the first step
for _ in run.steps():
    batch = ...                                          # of the next rows
    with task.update(batch):
        metrics = ...
    task.end_step(metrics)                               # evaluates when due
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from report.tables import response_text
from trialign.algorithms.batch import Batch, Prompt, Rollout, response_texts
from trialign.algorithms.config.common import LoRAConfig, OptimizerConfig
from trialign.algorithms.config.data import RowData
from trialign.algorithms.config.run import EpochRun
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.streams import RowStream
from trialign.algorithms.rewards.encoder import check_vocabulary
from trialign.algorithms.roles.build import build_decoder, build_learner, load_tokenizer, read_shape
from trialign.algorithms.rollout.sync import sample, stop_tokens
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.hf.tokenizer import stop_ids

from .run import Run, ScriptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowConfig(ScriptConfig, Protocol):
    """Sections of the config of such a script."""

    @property
    def lora(self) -> LoRAConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def update(self) -> UpdateConfig: ...
    @property
    def run(self) -> EpochRun: ...


Rows = TypeVar("Rows", bound=RowStream[Any])


class SupervisedTask(Generic[Rows]):
    """A learner and the rows it learns from. Built in this order: shape and tokenizer, rows, model. Collective.

    Args:
        section: of the config, with the limit on a row's tokens.
        read: reads the rows, given the tokenizer and the tokens that end a response.
        kind: the head of the learner; "score" puts one on a language model that has none.

    Attributes:
        stop_ids: tokens that end a response.
        steps: of the whole run.
    """

    def __init__(
        self,
        run: Run[Any],
        section: RowData,
        read: Callable[[PreTrainedTokenizerBase, tuple[int, ...]], Rows],
        kind: HeadKind = "lm",
    ):
        self.run, self.config, self.section, self.kind = run, run.config, section, kind
        config: RowConfig = run.config
        folder = config.model.path
        self.shape = run.on_all_ranks(self._read_shape)
        self.tokenizer = run.on_all_ranks(lambda: load_tokenizer(folder, self.shape))
        self.stop_ids = run.on_all_ranks(lambda: stop_ids(folder, self.shape, self.tokenizer))
        self.rows = run.on_all_ranks(lambda: read(self.tokenizer, self.stop_ids), "rows")
        run.check_same_on_all(self.rows.state())
        self.steps = config.run.total(len(self.rows), config.update.batch_size)
        self.role = "actor" if kind == "lm" else "reward"
        options = {"parallel": config.parallel, "lora": config.lora, "seed": config.run.seed}
        model = run.on_all_ranks(
            lambda: build_decoder(folder, self.shape, run.mesh, config.model.dtype, head=kind, trained=True, **options),
            "model",
        )
        options = {"ema_decay": config.update.ema_decay, "sizes": config.update, "profiler": run.phases}
        self.learner = build_learner(model, config.optimizer, self.steps, **options, name=self.role)
        self._evaluate: Callable[[], dict[str, float]] | None = None

    def _read_shape(self) -> ModelConfig:
        config, folder = self.config, self.config.model.path
        shape = read_shape(folder, config.parallel, config.run, "lm" if self.kind == "lm" else None, config.lora)
        if self.section.max_tokens > shape.longest_document:
            most = shape.longest_document
            raise ValueError(f"max_tokens={self.section.max_tokens}: {folder} has positions for {most}")
        reference = getattr(config.model, "reference", "")
        if reference:
            check_vocabulary(reference, read_shape(reference, config.parallel, config.run, "lm"), folder, shape)
        return shape

    def begin(
        self,
        eval_batch: Batch | None,
        evaluate: Callable[[Batch], dict[str, float]],
        progress: Mapping[str, str] | None = None,
    ) -> None:
        """Begins or resumes the run, and evaluates before its first step, which is logged as step 0. Collective.

        Args:
            eval_batch: of the eval split; None where there is none.
            progress: metric -> its format in the progress line.
        """
        run = self.run
        about = f"{self.rows}; {stop_tokens(self.stop_ids, self.tokenizer)}"
        learners = {self.role: (self.learner, self.config.model.path)}
        run.begin(learners, {"data": self.rows}, self.steps, about=about, facts=progress)
        if eval_batch is not None:

            def measure() -> dict[str, float]:
                with run.phases("eval", tokens=len(eval_batch.tokens)):
                    return evaluate(eval_batch)

            self._evaluate = measure
            if run.step == 0:
                run.log(0, measure() | run.phases.take())

    def update(self, batch: Batch) -> AbstractContextManager[None]:
        """The phase in which the learner learns from a batch."""
        return self.run.phases("update", tokens=len(batch.tokens), epochs=1)

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """`Run.end_step` with the epoch and, every run.eval_every steps and after the last, the eval metrics."""
        run, done = self.run, self.run.step + 1
        epoch = {"epoch": done * self.config.update.batch_size / len(self.rows)}
        evaluated = {}
        if self._evaluate and (done == self.steps or not done % (self.config.run.eval_every or self.steps)):
            evaluated = self._evaluate()
        if evaluated and done == self.steps:
            text = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in evaluated.items())
            run.progress.print(f"eval split, after {done} steps: {text}")
        run.end_step({**metrics, **epoch, **evaluated})

    def greedy_responses(self, rows: list[tuple[Prompt, list[int]]]) -> tuple[list[list[str]], list[Rollout]]:
        """[prompt, response in the data, the model's greedy response] of rows, and the rollouts. Collective.

        Args:
            rows: prompts and the tokens of their responses; those that leave no room to respond are left out.
        """
        run, options, longest = self.run, self.config.run, self.shape.longest_rollout
        rows = [row for row in rows if len(row[0].tokens) < longest]
        if not rows:
            return [], []
        prompts = [prompt for prompt, _ in rows]
        room = min(options.show_tokens, longest - max(len(prompt.tokens) for prompt in prompts))
        greedy = SamplingParams(temperature=0.0, max_new_tokens=room, stop_ids=self.stop_ids)
        with run.progress.task("responses"):
            generator = EmbeddedGenerator(self.learner.model, run.mesh, max_running=len(rows))
            rollouts = sample(generator, prompts, greedy)
        texts = response_texts(rollouts, self.tokenizer)
        texts = [response_text(text, rollout.finish) for text, rollout in zip(texts, rollouts, strict=True)]
        targets = self.tokenizer.batch_decode([target for _, target in rows], skip_special_tokens=True)
        return [[p.text, *row] for p, *row in zip(prompts, targets, texts, strict=True)], rollouts
