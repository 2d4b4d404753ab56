"""What every training script has around its algorithm: a mesh, the run's folder, resume, logs, checkpoints, the export.

    def main(session: Session[SFTConfig]) -> None:
        ...                                              # read data, build what learns
        session.begin({"actor": (learner, folder)}, {"data": data}, steps)
        for step in session.steps():
            with session.phases("update") as phase:
                ...
            session.end_step(metrics, tokens)            # logged, shown, saved when it is time
        session.finish(panels)                           # the exported model and the plot

    if __name__ == "__main__":
        start(SFTConfig, check, main, "sft", sys.argv[1:])

A run may be killed at any moment: what it resumes from is always whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import failing
import torch
from report import Panel, plot
from safe_points import SafePoints
from stopping import Stopping
from trialign.algorithms.build import trained_entries
from trialign.algorithms.config import DataConfig, ModelPaths, ParallelConfig, RunConfig, check_time_limits
from trialign.algorithms.nonfinite import check_states
from trialign.algorithms.roles import Learner
from trialign.engine import checkpoint
from trialign.engine.config import flatten, parse
from trialign.engine.config import save as save_config
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.logging import MetricLog
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.phases import Phases, matmul_peak
from trialign.engine.progress import LINE_EVERY, Progress
from trialign.engine.sole_writer import sole_writer
from trialign.models.adapter import adapter_facts, export_adapter, has_peft_form, same_adapter
from trialign.models.export import ExportRole, assets, export_checkpoint
from world import is_main, mesh_of, world_size


class Common(Protocol):
    """The sections that every script's config has."""

    @property
    def model(self) -> ModelPaths: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def run(self) -> RunConfig: ...


class Stateful(Protocol):
    """What outlives a step beside the learners. Its state is what JSON gives back unchanged."""

    def state(self) -> Any: ...
    def load_state(self, state: Any, /) -> None: ...


Config = TypeVar("Config", bound=Common)
Result = TypeVar("Result")


def start(
    cls: type[Config],
    check: Callable[[Config, int], int],
    main: Callable[[Session[Config]], None],
    name: str,
    argv: Sequence[str],
) -> None:
    """Runs a script: its config out of `argv`, checked before anything is read, then `main` on the mesh, alone in the
    run's folder.

    What a user can cause ends in a message without a traceback, told by one rank, and an exit code other than 0. A
    request to stop (stopping.py) ends in a checkpoint and the exit code `stopping.GO_ON`.

    Args:
        check: cross-checks of the config that read no file, given the world's size.
        name: of the script and of its plot.
    """
    config = parse(cls, argv, prog=f"{name}.py", quiet=not is_main())
    try:
        check_time_limits(config, config.run.timeout)
        check(config, world_size())
    except ValueError as error:  # the same on every rank
        failing.leave(error, alike=True)
    stopping = Stopping(Path(config.run.folder), is_main())
    try:
        with stopping, mesh_of(config.parallel, config.run.timeout, stopping) as mesh, ExitStack() as stack:
            session = Session(config, mesh, stack, name, stopping)
            session.together(lambda: stack.enter_context(sole_writer(session.folder)) if mesh.is_main else None)
            main(session)
    except Exception as error:
        failing.leave(error, stopping.watchdog)


class Session(Generic[Config]):
    """One run of a script on its mesh. See the module for the order of its calls.

    Attributes:
        step: steps that are done, of `total`; `saved`: of the newest checkpoint.
        about: the data in a few words, once it is read.
        stack: what is to be closed when the script ends is entered here.
        progress: the live display.
        phases: there after `begin`.
    """

    def __init__(self, config: Config, mesh: Mesh, stack: ExitStack, name: str, stopping: Stopping):
        self.config, self.mesh, self.stack, self.name, self.stopping = config, mesh, stack, name, stopping
        self.folder = Path(config.run.folder)
        HEARTBEAT.phase, self.step, self.saved, self.total = "loading", 0, -1, 0
        self.about = ""
        self.progress = stack.enter_context(Progress(enabled=mesh.is_main))
        self.learners: Mapping[str, tuple[Learner, str]] = {}
        self.parts: Mapping[str, Stateful] = {}
        self.safe_points: SafePoints | None = None

    def together(self, work: Callable[[], Result], name: str = "") -> Result:
        """What `work` gives, on every rank; where it fails on any, every rank leaves and one of them says why.

        Args:
            work: reads and builds; no collectives in it.
            name: shown while it goes on, where it may take seconds.
        """
        result, failure = None, ""
        try:
            with self.progress.work(name) if name else nullcontext():
                result = work()
        except (ValueError, OSError) as error:
            failure = str(error)
        failures = [(rank, text) for rank, text in enumerate(gather_objects(failure, self.mesh.world)) if text]
        if failures:
            rank, text = failures[0]
            where = f"rank {rank}: " if rank else ""
            failing.leave_together(f"{where}error: {text}", self.mesh.is_main)
        return result  # pyright: ignore[reportReturnType]

    def begin(
        self,
        learners: Mapping[str, tuple[Learner, str]],
        parts: Mapping[str, Stateful],
        steps: int,
        *,
        about: str = "",
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Takes up the run where it was left, or begins it: checkpoint, folder, logs. Collective.

        Args:
            learners: role -> what learns, and the Hugging Face folder whose config and tokenizer belong to it.
            parts: name -> what else a checkpoint holds.
            steps: of the whole run.
            about: the data in a few words, for the first line.
            facts: metric -> format, what the progress line shows beside tokens/s.
        """
        self.learners, self.parts, self.total, self.about = learners, parts, steps, about
        config, main = self.config, self.mesh.is_main
        if config.run.resume:
            self._resume()
        self.together(lambda: self._prepare() if main else None)
        dtype = getattr(torch, config.model.dtype)
        self.safe_points = SafePoints(self.stopping, self.mesh, config.run.grace, self._state_of_parts, self._save)
        peak = matmul_peak(dtype, self.mesh.device)
        self.phases = Phases(self.mesh.device, self.mesh.world.size, peak=peak, around=self._phase)
        options = {"backends": config.run.log, "done": self.step, "config": flatten(config), "enabled": main}
        self.log = self.together(lambda: self.stack.enter_context(MetricLog(self.folder, **options)))
        self.progress.start(steps, done=self.step, facts=facts)
        self.progress.say(f"{self.folder}: {about}; {self.mesh}; {config.model.dtype}; from step {self.step}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        assert self.safe_points is not None
        with self.safe_points.phase(name), self.progress.work(name, line_after=LINE_EVERY):
            yield

    def interrupted(self) -> bool:
        """Whether the answers that a step is at are no longer wanted, for the step will be dropped."""
        return self.safe_points is not None and self.safe_points.too_long()

    def steps(self) -> Iterator[int]:
        """The steps that are still to be made, from 0; the body ends with `end_step`. Collective."""
        if self.step < self.total:
            assert self.safe_points is not None
            with self.stopping.held(), HEARTBEAT.at("step"):
                while self.step < self.total:
                    self.safe_points.step()
                    yield self.step
                    self.safe_points.after_step()

    def end_step(self, metrics: Mapping[str, float], tokens: int) -> None:
        """Logs and shows a step with the cost of its phases, and saves when it is time. Collective.

        Args:
            tokens: of the whole batch, for tokens_per_s.
        """
        for role, (learner, _) in self.learners.items():
            for reason in learner.reasons:
                self.progress.say(f"{role}: step {self.step + 1} is skipped: {reason}")
            if learner.reasons:  # of a step that was not made
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            learner.reasons.clear()
        costs = self.phases.take()
        metrics = {**metrics, **costs, "tokens_per_s": tokens / costs["seconds/step"]}
        self.step += 1
        self.log(self.step, metrics)
        self.progress.update(self.step, metrics)
        every = self.config.run.save_every
        if self.step == self.total or (every and self.step % every == 0):
            self._save(self._state_of_parts())

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave before the first step, as JSON has it; a resumed run finds it in its folder. Collective."""
        path = self.folder / name
        if self.step and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        made, main = make(), self.mesh.is_main
        self.together(lambda: path.write_text(json.dumps(made, indent=1), encoding="utf-8") if main else None)
        return made

    def finish(self, panels: Sequence[Panel], *shown: Any, role: ExportRole = "actor") -> None:
        """Leaves the exported model and the plot in the folder, and says where they are below what is `shown`."""
        HEARTBEAT.phase = "export"
        if self.mesh.is_main:
            with self.progress.work("export"):
                exported = self._export(role)
            picture = plot(self.folder / "metrics.jsonl", self.folder / f"{self.name}.png", panels)
            self.progress.close()
            for text in shown:
                self.progress.say(text)
            self.progress.say(f"model: {exported}\nplot:  {picture}")

    def _state_of_parts(self) -> dict[str, Any]:
        return {name: part.state() for name, part in self.parts.items()}

    def _save(self, parts: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the steps that are done, unless it is there. Collective."""
        if self.saved == self.step:
            return
        state = {
            "step": self.step,
            "optimizer_steps": {role: learner.optimizer.steps for role, (learner, _) in self.learners.items()},
            "parts": dict(parts),
            "adapters": {role: adapter_facts(learner.model, base) for role, (learner, base) in self.learners.items()},
        }
        mixtures = {role: learner.model.config.moe for role, (learner, _) in self.learners.items()}
        state["router_aux_coef"] = {role: moe.aux_coef for role, moe in mixtures.items() if moe is not None}
        files = {
            name: path
            for role, (_, source) in self.learners.items()
            for name, path in assets(source, f"{role}/").items()
        }
        check_states({role: learner.optimizer for role, (learner, _) in self.learners.items()}, self.mesh)
        entries = trained_entries({role: learner for role, (learner, _) in self.learners.items()})
        root, keep = self.folder / "checkpoints", self.config.run.keep
        with HEARTBEAT.at("checkpoint"), self.progress.work("checkpoint"):
            checkpoint.save(root, self.step, entries, state, self.mesh, keep=keep, assets=files)
        self.saved = self.step

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint, written in any layout."""
        path = checkpoint.latest(self.folder / "checkpoints", self.mesh)
        entries = trained_entries({role: learner for role, (learner, _) in self.learners.items()})
        adapters = checkpoint.read_state(path).get("adapters", {})
        for role, (learner, base) in self.learners.items():
            same_adapter(adapters.get(role), learner.model, base)
        state = checkpoint.load(path, entries, self.mesh)
        for name, part in self.parts.items():
            if name not in state["parts"]:
                raise ValueError(
                    f"{path}: saved without {name}, which this config asks for; it holds {', '.join(state['parts'])}"
                )
            part.load_state(state["parts"][name])
        for role, (learner, _) in self.learners.items():
            learner.optimizer.loaded(state["optimizer_steps"][role])
        self.step = self.saved = state["step"]

    def _prepare(self) -> None:
        """Makes the run's folder and writes the config that a resume starts from.

        A new run in a used folder sets the old run's checkpoints aside, so that no resume takes them for its own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        used = self.folder / "checkpoints"
        if not self.config.run.resume and used.exists():
            shutil.rmtree(self.folder / "checkpoints_of_the_run_before", ignore_errors=True)
            used.rename(self.folder / "checkpoints_of_the_run_before")
        config: Any = self.config
        whole = replace(config, run=replace(config.run, output=str(self.folder), resume=""))
        aside = self.folder / "config.toml.new"
        save_config(whole, aside)
        os.replace(aside, self.folder / "config.toml")

    def _export(self, role: ExportRole) -> Path:
        """The last checkpoint's model as a Hugging Face folder, its average beside it; written whole, then swapped."""
        last = self.folder / "checkpoints" / f"step_{self.step}"
        averaged = self.learners[role][0].optimizer.ema_decay > 0
        for weights in ("master", "ema") if averaged else ("master",):
            folder = self.folder / ("model" if weights == "master" else "model_ema")
            aside = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(aside, ignore_errors=True)
            export_checkpoint(last, aside, role=role, weights=weights, dtype=getattr(torch, self.config.model.dtype))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        model = self.learners[role][0].model
        if model.lora is not None and has_peft_form(model.config, model.lora):  # beside the model they are merged into
            shutil.rmtree(self.folder / "adapter", ignore_errors=True)
            export_adapter(last, self.folder / "adapter", role=role)
        return self.folder / "model"
