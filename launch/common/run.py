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
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from report.curves import Panel, plot
from trialign.algorithms.config.common import DataConfig, ModelPaths, ParallelConfig, RunConfig, check_time_limits
from trialign.algorithms.roles.build import trained_entries
from trialign.algorithms.roles.nonfinite import check_states
from trialign.algorithms.roles.role import Learner
from trialign.engine.config import absolute, flatten, parse, to_toml
from trialign.engine.heartbeat import HEARTBEAT
from trialign.engine.logging import MetricLog
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.profiler import Profiler, matmul_peak
from trialign.engine.progress import LINE_EVERY, Progress
from trialign.engine.storage import checkpoint
from trialign.engine.storage.run_lock import run_lock
from trialign.models.hf.save import SCORES, ExportRole, assets, export_checkpoint
from trialign.models.lora import adapter_facts, export_adapter, has_peft_form, same_adapter

from . import failures, run_folder
from .env import is_main, mesh_of, node, world_size
from .fingerprint import Facts, changes, facts_of
from .safe_points import SafePoints
from .stop_requests import Stopping

DISK_WAIT = 60.0
"""Seconds until a node sees a file that another one wrote: NFS keeps what it knows of a folder for so long."""


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
    config = absolute(parse(cls, argv, prog=f"{name}.py", quiet=not is_main()))
    try:
        check_time_limits(config, config.run.timeout)
        check(config, world_size())
    except ValueError as error:  # the same on every rank
        failures.leave(error, alike=True)
    stopping = Stopping(Path(config.run.folder), is_main())
    try:
        with stopping, mesh_of(config.parallel, config.run.timeout, stopping) as mesh, ExitStack() as stack:
            session = Session(config, mesh, stack, name, stopping)
            lock = run_lock(session.folder)
            session.same_disk(session.together(lambda: stack.enter_context(lock) if mesh.is_main else ""))
            session.open()
            if not session.finished():
                main(session)
    except Exception as error:
        failures.leave(error, stopping.watchdog)


class Session(Generic[Config]):
    """One run of a script on its mesh. See the module for the order of its calls.

    Attributes:
        step: steps that are done, of `total`; `saved`: of the newest checkpoint.
        scores: "steps" where a score head learns at the ends of steps, which checkpoints and exports keep.
        about: the data in a few words, once it is read.
        stack: what is to be closed when the script ends is entered here.
        record: of the run that goes on in this folder (run_folder.py); None where one begins.
        checkpoint: that the run goes on from; None where it has none yet.
        changes: options that are others than before, a text each.
        progress: the live display.
        phases: the profiler that roles and generator report to; phases are opened after `begin`.
    """

    def __init__(self, config: Config, mesh: Mesh, stack: ExitStack, name: str, stopping: Stopping):
        self.config, self.mesh, self.stack, self.name, self.stopping = config, mesh, stack, name, stopping
        self.folder = Path(config.run.folder)
        HEARTBEAT.phase, self.step, self.saved, self.total = "loading", 0, -1, 0
        self.about = ""
        self.progress = stack.enter_context(Progress(enabled=mesh.is_main))
        self.phases = Profiler(mesh, around=self._phase)
        self.learners: Mapping[str, tuple[Learner, str]] = {}
        self.parts: Mapping[str, Stateful] = {}
        self.safe_points: SafePoints | None = None
        self.scores = ""
        self.record: dict[str, Any] | None = None
        self.checkpoint: Path | None = None
        self.changes: list[str] = []
        self._held = False

    @cached_property
    def facts(self) -> Facts:
        """What the run depends on. Collective where it is first asked for."""
        try:
            return facts_of(self.config, self.mesh, partial(self.together, name="digests of the models' files"))
        except ValueError as error:  # the same on every rank
            failures.leave_together(f"error: {error}", self.mesh.is_main)

    def same_disk(self, token: str) -> None:
        """Refuses a run whose folder a rank does not see. Collective.

        Args:
            token: the main rank's, which the folder's lock holds.
        """
        token, lock = gather_objects(token, self.mesh.world)[0], self.folder / ".lock"
        deadline = time.monotonic() + DISK_WAIT
        seen = self.mesh.is_main  # it would lose its lock, were it to open the file and close it
        while not seen and time.monotonic() < deadline:
            seen = lock.is_file() and lock.read_text() == token
            time.sleep(0 if seen else 0.2)
        looked = gather_objects((seen, node()[0], str(self.folder.absolute())), self.mesh.world)
        blind = next(((rank, host, path) for rank, (there, host, path) in enumerate(looked) if not there), None)
        if blind is not None:
            rank, host, path = blind
            failures.leave_together(
                f"error: run.output={self.folder}: node {host} (rank {rank}) does not see in {path} what node"
                f" {looked[0][1]} writes to {looked[0][2]}: the folder must be on a disk that all nodes share",
                self.mesh.is_main,
            )

    def open(self, prefix: str = "") -> None:
        """Finds out whether the run begins or goes on, and from where; refuses what may not change. Collective.

        Args:
            prefix: of the options' names in messages.
        """
        main, root = self.mesh.is_main, self.folder / "checkpoints"
        record = self.together(lambda: run_folder.found(self.folder, self.name, self.config.run) if main else None)
        self.record, saved = gather_objects((record, any(root.glob("step_*"))), self.mesh.world)[0]
        if self.record is None:
            return
        if saved:
            try:
                self.checkpoint = checkpoint.latest(root, self.mesh)
            except ValueError as error:
                failures.leave_together(f"error: {error}", main)
        before = self.record["facts"]
        if self.checkpoint is not None:
            before = checkpoint.read_state(self.checkpoint).get("facts", before)
        strict = self.checkpoint is not None or self.name in ("evaluate", "rlhf")
        try:
            self.changes = changes(before, self.facts, self.name, strict=strict, prefix=prefix)
        except ValueError as error:
            failures.leave_together(f"error: {error}", main)

    @property
    def left(self) -> dict[str, str]:
        """What it is -> path in the folder, of a run that has ended and whose files are there."""
        files = self.record["finished"].get("files", {}) if self.record else {}
        return files if all((self.folder / path).exists() for path in files.values()) else {}

    def finished(self) -> bool:
        """Whether all steps are made, and nothing is asked for in another way than when they were; says so then.

        A run that is to go on in another way, and has no checkpoint any more, is refused.
        """
        step = self.record["finished"].get("step") if self.record else None
        if not self.left or not step or self.checkpoint is not None and self.checkpoint.name != f"step_{step}":
            return False
        if self.changes and self.checkpoint is None:
            failures.leave_together(
                f"error: {self.folder}: the run has ended at step {step} and its checkpoints are gone: it cannot go on"
                f" with {'; '.join(self.changes)}; another run.output begins anew",
                self.mesh.is_main,
            )
        if not self.changes:
            self.tell_end()
        return not self.changes

    def tell_end(self) -> None:
        """Says that the run has ended, what it left, and how to begin anew."""
        step = self.record["finished"]["step"] if self.record else 0
        if self.mesh.is_main:
            print(f"{self.folder}: this run has ended{f' at step {step}' * bool(step)}")
            for name, path in self.left.items():
                print(f"{name + ':':<6} {self.folder / path}")
            print("to begin anew: --run.overwrite True, or another run.output" + "; to go on: more steps" * bool(step))

    def hold(self) -> None:
        """Makes the folder one that holds this run, with the config that a resume starts from. Collective."""
        if not self._held:
            self._held, facts = True, self.facts
            self.together(lambda: self._hold(facts) if self.mesh.is_main else None)

    def _hold(self, facts: Facts) -> None:
        config: Any = absolute(self.config)
        own = {"output": str(self.folder.absolute()), "resume": "", "overwrite": False}
        own = {key: value for key, value in own.items() if hasattr(config.run, key)}
        run_folder.write_whole(self.folder / "config.toml", to_toml(replace(config, run=replace(config.run, **own))))
        run_folder.write(self.folder, {"script": self.name, "facts": facts, "finished": {}})

    def agree(self, value: Any) -> None:
        """Refuses ranks that differ in `value`, what was read of the data, say. Collective."""
        read = gather_objects((node()[0], value), self.mesh.world)
        for rank, (host, other) in enumerate(read):
            if other != read[0][1]:
                failures.leave_together(
                    f"error: node {host} (rank {rank}) has read other data than node {read[0][0]}: {other}, there"
                    f" {read[0][1]}",
                    self.mesh.is_main,
                )

    def done(self, **files: str) -> None:
        """Notes that the run has ended, and what it left. For the main rank.

        Args:
            files: what it is -> path in the folder.
        """
        ended = {"step": self.step, "files": files}
        run_folder.write(self.folder, {"script": self.name, "facts": self.facts, "finished": ended})

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
        failed = [(rank, text) for rank, text in enumerate(gather_objects(failure, self.mesh.world)) if text]
        if failed:
            rank, text = failed[0]
            where = f"rank {rank}: " if rank else ""
            failures.leave_together(f"{where}error: {text}", self.mesh.is_main)
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
        self.agree({name: part.state() for name, part in parts.items()})
        if self.checkpoint is not None:
            self._load(self.checkpoint)
        self.hold()
        dtype = getattr(torch, config.model.dtype)
        self.safe_points = SafePoints(self.stopping, self.mesh, config.run.grace, self._state_of_parts, self._save)
        self.phases.peak = matmul_peak(dtype, self.mesh.device)
        options = {"backends": config.run.log, "done": self.step, "config": flatten(config), "enabled": main}
        self.log = self.together(lambda: self.stack.enter_context(MetricLog(self.folder, **options)))
        self.progress.start(steps, done=self.step, facts=facts)
        self.progress.say(f"{self.folder}: {about}; {self.mesh}; {config.model.dtype}; from step {self.step}")
        if self.changes:
            self.progress.say(f"resumed with {'; '.join(self.changes)}")

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
            self.done(model=exported.name, plot=picture.name)
            self.progress.say(f"model: {exported}\nplot:  {picture}")

    def _state_of_parts(self) -> dict[str, Any]:
        return {name: part.state() for name, part in self.parts.items()}

    def _save(self, parts: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the steps that are done, unless it is there. Collective."""
        if self.saved == self.step:
            return
        state = {
            "step": self.step,
            "facts": self.facts,
            **({SCORES: self.scores} if self.scores else {}),
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

    def _load(self, path: Path) -> None:
        """Goes on from a checkpoint, written in any layout."""
        entries = trained_entries({role: learner for role, (learner, _) in self.learners.items()})
        adapters = checkpoint.read_state(path).get("adapters", {})
        for role, (learner, base) in self.learners.items():
            same_adapter(adapters.get(role), learner.model, base)
        state = checkpoint.load(path, entries, self.mesh)
        for name, part in self.parts.items():
            if name in state["parts"]:  # what an option has only now brought in begins as in a new run
                part.load_state(state["parts"][name])
        for role, (learner, _) in self.learners.items():
            learner.optimizer.loaded(state["optimizer_steps"][role])
        self.step = self.saved = state["step"]

    def _export(self, role: ExportRole) -> Path:
        """The last checkpoint's model as a Hugging Face folder, its average beside it; written whole, then swapped.
        An adapter or an average that an earlier run left is none of this model's."""
        last = self.folder / "checkpoints" / f"step_{self.step}"
        averaged = self.learners[role][0].optimizer.ema_decay > 0
        for name in ("model_ema", "adapter"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for weights in ("master", "ema") if averaged else ("master",):
            folder = self.folder / ("model" if weights == "master" else "model_ema")
            aside = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(aside, ignore_errors=True)
            export_checkpoint(last, aside, role=role, weights=weights, dtype=getattr(torch, self.config.model.dtype))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        model = self.learners[role][0].model
        if model.lora is not None and has_peft_form(model.config, model.lora):  # beside the model they are merged into
            export_adapter(last, self.folder / "adapter", role=role)
        return self.folder / "model"
