"""Run of a script on its mesh: folder, resume, logs, checkpoints, export.

    def main(run: Run[SFTConfig]) -> None:
        ...                                              # read data, build the learners
        run.begin({"actor": (learner, folder)}, {"data": data}, steps)
        for step in run.steps():
            with run.phases("update", tokens=len(batch.tokens), epochs=1):
                ...
            run.end_step(metrics)                        # logged, displayed, saved when due
        run.finish(panels)                               # the exported model and the plot

    if __name__ == "__main__":
        start(SFTConfig, main, "sft", sys.argv[1:])

A run may be killed at any moment: its newest checkpoint is always complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from report.curves import plot
from report.panels import Panel
from trialign.algorithms.config.common import ModelPaths, ParallelConfig
from trialign.algorithms.config.data import DataConfig
from trialign.algorithms.config.memory import memory_options
from trialign.algorithms.config.reward import check_time_limits
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.algorithms.roles.build import build_decoder, trained_entries
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.nonfinite import check_states
from trialign.engine.config import absolute, flatten, parse
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.logging import MetricLog
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import broadcast_object, gather_objects, run_on_all_ranks
from trialign.engine.profiler import Profiler, data_sheet_peak, matmul_peak
from trialign.engine.progress import LINE_EVERY, Progress
from trialign.engine.storage import checkpoint
from trialign.engine.storage.atomic import replace_folder, write_text
from trialign.engine.storage.run_lock import run_lock
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.folder import assets
from trialign.models.hf.adapter_record import adapter_record, check_same_adapter
from trialign.models.hf.convert import SCORES, ExportRole, export_checkpoint
from trialign.models.hf.peft import export_adapter
from trialign.models.hf.peft_config import unsupported_by_peft

from . import failures
from .env import is_main, mesh_of, node, world_size
from .run_record import RunRecord, check_resumed
from .safe_points import SafePoints
from .signals import StopSignals


class ScriptConfig(Protocol):
    """Sections that every script's config has."""

    @property
    def model(self) -> ModelPaths: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def run(self) -> RunConfig: ...
    def check(self, world: int) -> int: ...


class Stateful(Protocol):
    """State in checkpoints besides the learners'; JSON must preserve it."""

    def state(self) -> Any: ...
    def load_state(self, state: Any, /) -> None: ...


Config = TypeVar("Config", bound=ScriptConfig)
Result = TypeVar("Result")


def start(cls: type[Config], main: Callable[[Run[Config]], None], name: str, argv: Sequence[str]) -> None:
    """Runs a script: parses `argv`, checks the config before anything is read, then calls `main` on the mesh under the
    folder's run lock.

    Errors that users can cause end in one rank's message without a traceback and a nonzero exit code; requests to stop
    (signals.py) in a checkpoint and the exit code `signals.EXIT_RESUMABLE`.

    Args:
        name: of the script and of its plot.
    """
    try:
        check_resumed(argv, name)
        config = absolute(parse(cls, argv, SCRIPTS, quiet=not is_main()))
        check_time_limits(config, config.run.timeout)
        config.check(world_size())
    except ValueError as error:  # the same on every rank
        failures.leave(error, alike=True)
    signals = StopSignals(Path(config.run.folder), is_main())
    with (
        failures.ended(),
        failures.reported(signals),
        signals,
        mesh_of(config.parallel, config.run.timeout, signals) as mesh,
        ExitStack() as stack,
        failures.reported(signals),  # before files and processes are closed, which may take long
    ):
        run = Run(config, mesh, stack, name, signals)
        lock = run_lock(run.folder)
        run.record.check_shared_disk(run.on_all_ranks(lambda: stack.enter_context(lock) if mesh.is_main else ""))
        run.record.open()
        if not run.record.is_finished():
            with run.phases.memory.explained(HEARTBEAT.phase_of):
                main(run)


class Run(Generic[Config]):
    """A run of a script on its mesh; the module's docstring has the order of calls.

    Attributes:
        record: of the run in this folder.
        step: steps done, of `total`.
        saved: step of the newest checkpoint.
        scores: "steps" for a process reward model, recorded in checkpoints and exports.
        about: a short description of the data.
        stack: closed when the script ends.
        progress: the live display.
        phases: the profiler that roles and generator report to; phases are opened after `begin`.
    """

    def __init__(self, config: Config, mesh: Mesh, stack: ExitStack, name: str, signals: StopSignals):
        self.config, self.mesh, self.stack, self.name, self.signals = config, mesh, stack, name, signals
        self.folder = Path(config.run.folder)
        HEARTBEAT.phase, self.step, self.saved, self.total = "loading", 0, -1, 0
        self.about = ""
        self.progress = stack.enter_context(Progress(enabled=mesh.is_main))
        self.phases = Profiler(mesh, around=self._phase)
        self.phases.memory.options = partial(memory_options, flatten(config))
        self.record = RunRecord(config, name, mesh, self.on_all_ranks, self.on_main_rank)
        self.learners: Mapping[str, tuple[Learner, str]] = {}
        self.parts: Mapping[str, Stateful] = {}
        self.safe_points: SafePoints | None = None
        self.scores = ""

    def on_all_ranks(self, work: Callable[[], Result], name: str = "") -> Result:
        """Runs `work` on every rank and returns its result; where it fails on any, every rank exits. Collective.

        Args:
            work: without collectives.
            name: displayed meanwhile.
        """
        try:
            with self.progress.task(name) if name else nullcontext():
                return run_on_all_ranks(work, self.mesh.world)
        except (ValueError, OSError) as error:
            failures.leave_together(f"error: {error}", self.mesh.is_main)

    def on_main_rank(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the main rank and returns its result on every rank; a failure as in `on_all_ranks`."""
        result: Any = self.on_all_ranks(lambda: work() if self.mesh.is_main else None)
        return broadcast_object(result, self.mesh.world)

    def load_frozen(self, folder: str, shape: ModelConfig, head: HeadKind = "lm") -> Decoder:
        """A model of a folder that is not trained. Collective."""
        dtype, options = self.config.model.dtype, {"head": head, "parallel": self.config.parallel}
        return self.on_all_ranks(lambda: build_decoder(folder, shape, self.mesh, dtype, **options), folder)

    def check_same_on_all(self, value: Any) -> None:
        """Refuses ranks with different values, for example of the state of their data. Collective."""
        read = gather_objects((node()[0], value), self.mesh.world)
        for rank, (host, other) in enumerate(read):
            if other != read[0][1]:
                failures.leave_together(
                    f"error: node {host} (rank {rank}) has read other data than node {read[0][0]}: {other}, there"
                    f" {read[0][1]}",
                    self.mesh.is_main,
                )

    def begin(
        self,
        learners: Mapping[str, tuple[Learner, str]],
        parts: Mapping[str, Stateful],
        steps: int,
        *,
        about: str = "",
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Begins the run or resumes it: checkpoint, folder, logs. Collective.

        Args:
            learners: role -> learner, and the Hugging Face folder of its config and tokenizer.
            parts: name -> other state that checkpoints hold.
            steps: of the whole run.
            about: a short description of the data, for the first line.
            facts: metric -> its format in the progress line.
        """
        self.learners, self.parts, self.total, self.about = learners, parts, steps, about
        config, record = self.config, self.record
        self.check_same_on_all({name: part.state() for name, part in parts.items()})
        if record.checkpoint is not None:
            self._load(record.checkpoint)
        record.write_begun()
        dtype = getattr(torch, config.model.dtype)
        self.safe_points = SafePoints(self.signals, self.mesh, config.run.grace, self._state_of_parts, self._save)
        self.phases.peak = matmul_peak(dtype, self.mesh.device)
        if self.mesh.device.type == "cuda":
            self.phases.data_sheet = data_sheet_peak(dtype, torch.cuda.get_device_name(self.mesh.device))
        options = {"backends": config.run.log, "done": self.step, "config": flatten(config)}
        options["enabled"] = self.mesh.is_main
        self.log = self.on_all_ranks(lambda: self.stack.enter_context(MetricLog(self.folder, **options)))
        self.progress.start(steps, done=self.step, formats=facts)
        recompute = config.parallel.recompute_on(self.mesh.device.type)
        layout = f"{self.mesh}; {config.model.dtype}; recompute {recompute}"
        self.progress.print(f"{self.folder}: {about}; {layout}; from step {self.step}")
        if record.changes:
            self.progress.print(f"resumed with {'; '.join(record.changes)}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        assert self.safe_points is not None
        with self.safe_points.phase(name), self.progress.task(name, line_after=LINE_EVERY):
            yield

    def interrupted(self) -> bool:
        """Whether the step in progress will be dropped, so that generation may end early."""
        return self.safe_points is not None and self.safe_points.too_long()

    def steps(self) -> Iterator[int]:
        """Numbers of the steps left to do, from 0; the body ends with `end_step`. Collective."""
        if self.step < self.total:
            assert self.safe_points is not None
            with self.signals.held(), HEARTBEAT.at("step"):
                while self.step < self.total:
                    self.safe_points.step()
                    yield self.step
                    self.safe_points.after_step()

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """Logs and displays a step with the cost of its phases, and saves when due. Collective."""
        for role, (learner, _) in self.learners.items():
            for reason in learner.reasons:
                self.progress.print(f"{role}: step {self.step + 1} is skipped: {reason}")
            if learner.reasons:  # its metrics are of an update that was not applied
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            learner.reasons.clear()
        metrics = {**metrics, **self.phases.take()}
        self.step += 1
        self.log(self.step, metrics)
        self.progress.update(self.step, metrics)
        if self.step == self.total or not self.step % (self.config.run.save_every or self.total):
            self._save(self._state_of_parts())

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()` as JSON, kept in the folder: a resumed run reads it there. Collective, as `compute` may be: the
        main rank looks for the file, for another rank might not see it yet."""
        path = self.folder / name
        kept = self.on_main_rank(lambda: path.read_text(encoding="utf-8") if self.step and path.exists() else None)
        if kept is not None:
            return json.loads(kept)
        value = compute()
        self.on_main_rank(lambda: write_text(path, json.dumps(value, indent=1)))
        return value

    def finish(self, panels: Sequence[Panel], *shown: Any, role: ExportRole = "actor") -> None:
        """Exports the model, draws the plot, prints `shown`, then the paths of model and plot."""

        def work() -> None:
            with self.progress.task("export"):
                exported = self._export(role)
            picture = plot(self.folder / "metrics.jsonl", self.folder / f"{self.name}.png", panels)
            self.progress.close()
            for text in shown:
                self.progress.print(text)
            self.record.write_finished(self.step, model=exported.name, plot=picture.name)
            self.progress.print(f"model: {exported}\nplot:  {picture}")

        with HEARTBEAT.at("export"):
            if self.signals.watchdog is not None:
                self.signals.watchdog.wait_for_main("export", work)
            elif self.mesh.is_main:
                work()

    def _state_of_parts(self) -> dict[str, Any]:
        return {name: part.state() for name, part in self.parts.items()}

    def _save(self, parts: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the steps done, unless it exists. Collective."""
        if self.saved == self.step:
            return
        mixtures = {role: learner.model.config.moe for role, (learner, _) in self.learners.items()}
        state = {
            "step": self.step,
            "facts": self.record.facts,
            **({SCORES: self.scores} if self.scores else {}),
            "optimizer_steps": {role: learner.optimizer.steps for role, (learner, _) in self.learners.items()},
            "parts": dict(parts),
            "adapters": {role: adapter_record(learner.model, base) for role, (learner, base) in self.learners.items()},
            "router_aux_coef": {role: moe.aux_coef for role, moe in mixtures.items() if moe is not None},
        }
        files = {
            name: path
            for role, (_, source) in self.learners.items()
            for name, path in assets(source, f"{role}/").items()
        }
        check_states({role: learner.optimizer for role, (learner, _) in self.learners.items()}, self.mesh)
        entries = trained_entries({role: learner for role, (learner, _) in self.learners.items()})
        root, keep = self.folder / "checkpoints", self.config.run.keep
        with HEARTBEAT.at("checkpoint"), self.progress.task("checkpoint"):
            checkpoint.save(root, self.step, entries, state, self.mesh, keep=keep, assets=files)
        self.saved = self.step

    def _load(self, path: Path) -> None:
        """Resumes from a checkpoint, written in any layout."""
        entries = trained_entries({role: learner for role, (learner, _) in self.learners.items()})
        adapters = checkpoint.read_state(path).get("adapters", {})
        for role, (learner, base) in self.learners.items():
            check_same_adapter(adapters.get(role), learner.model, base)
        state = checkpoint.load(path, entries, self.mesh)
        for name, part in self.parts.items():
            if name in state["parts"]:  # a part that a changed option adds begins as in a new run
                part.load_state(state["parts"][name])
        for role, (learner, _) in self.learners.items():
            learner.optimizer.restore(state["optimizer_steps"][role])
        self.step = self.saved = state["step"]

    def _export(self, role: ExportRole) -> Path:
        """Exports the last checkpoint to model/, model_ema/ and adapter/, atomically; replaces earlier exports."""
        last = self.folder / "checkpoints" / f"step_{self.step}"
        averaged = self.learners[role][0].optimizer.ema_decay > 0
        for name in ("model_ema", "adapter"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for weights in ("master", "ema") if averaged else ("master",):
            folder = self.folder / ("model" if weights == "master" else "model_ema")
            aside = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(aside, ignore_errors=True)
            export_checkpoint(last, aside, role=role, weights=weights, dtype=getattr(torch, self.config.model.dtype))
            replace_folder(folder, aside)
        model = self.learners[role][0].model
        if model.lora is not None and unsupported_by_peft(model.config, model.lora) is None:
            export_adapter(last, self.folder / "adapter", role=role)
        return self.folder / "model"
