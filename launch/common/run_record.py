"""Record of the run in a folder, RUN/run.json: script, fingerprint and, once it has finished, its results.

A folder with a record is never overwritten silently: by the config's `run` section a script resumes the run, deletes
it, or is refused.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

from trialign.engine.config import AUTO, NEW, absolute, option_value, to_toml
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import broadcast_object, gather_objects
from trialign.engine.storage import checkpoint
from trialign.engine.storage.atomic import write_text

from . import failures
from .env import node, restarted
from .fingerprint import Facts, changes, facts_of

DISK_WAIT = 60.0
"""Seconds until a node sees a file of another node: NFS caches folder listings."""
OUTPUTS = (
    *("run.json", "config.toml", "metrics.jsonl", "checkpoints", "tensorboard", "wandb", "wandb_id", "before.json"),
    *("model", "model_ema", "adapter", "reference", "begun", "rewards.json", "rounds", "completions.jsonl"),
    *("results.json", "STOP", "STOPPED"),
)
"""Files and folders of runs, besides the plot."""
LENGTHS = ("run.steps", "run.epochs", "rejection.rounds")
"""Options that may give a finished run more steps: larger ones, and run.steps=0, by which run.epochs counts."""
OUTPUTS_OF = {"rlhf": ("prompts", "stages.json", "report.html", "sft", "preferences", "reward", "ppo", "evaluation")}
"""Further ones of one script."""


class RunRecord:
    """The run in a folder. Its methods are collective.

    Args:
        on_all_ranks, on_main_rank: of `Run`.

    Attributes:
        found: run.json of the resumed run; None in a new run.
        checkpoint: of the resumed run; None where it has none yet.
        results: kind -> path in the folder; {} where the run has not finished or a file is missing.
        changes: a text for each option that differs from before.
    """

    def __init__(
        self,
        config: Any,
        script: str,
        mesh: Mesh,
        on_all_ranks: Callable[..., Any],
        on_main_rank: Callable[..., Any],
    ):
        self.config, self.script, self.mesh = config, script, mesh
        self.on_all_ranks, self.on_main_rank = on_all_ranks, on_main_rank
        self.folder = Path(config.run.folder)
        self.found: dict[str, Any] | None = None
        self.checkpoint: Path | None = None
        self.results: dict[str, str] = {}
        self.changes: list[str] = []
        self._claimed = False

    @cached_property
    def facts(self) -> Facts:
        """Options and file contents that the run depends on. Collective at its first use."""
        try:
            return facts_of(self.config, self.mesh, partial(self.on_all_ranks, name="digests of the models' files"))
        except ValueError as error:  # the same on every rank
            self._refuse(str(error))

    def check_shared_disk(self, token: str) -> None:
        """Refuses a folder that is not the same on all nodes.

        Args:
            token: content of the folder's lock, on the main rank.
        """
        token, lock = broadcast_object(token, self.mesh.world), self.folder / ".lock"
        deadline = time.monotonic() + DISK_WAIT
        seen = self.mesh.is_main  # it would lose its lock by closing the file
        while not seen and time.monotonic() < deadline:
            seen = lock.is_file() and lock.read_text() == token
            time.sleep(0 if seen else 0.2)
        looked = gather_objects((seen, node()[0], str(self.folder.absolute())), self.mesh.world)
        blind = next(((rank, host, path) for rank, (sees, host, path) in enumerate(looked) if not sees), None)
        if blind is not None:
            rank, host, path = blind
            self._refuse(
                f"run.output={self.folder}: node {host} (rank {rank}) does not see in {path} what node"
                f" {looked[0][1]} writes to {looked[0][2]}: the folder must be on a disk that all nodes share"
            )

    def open(self, prefix: str = "") -> None:
        """Finds the run to resume and its checkpoint; refuses changes of fixed options.

        Args:
            prefix: of the options' names in messages.
        """
        root = self.folder / "checkpoints"

        def look() -> tuple[dict[str, Any] | None, bool, dict[str, str]]:
            found = resumed(self.folder, self.script, self.config.run)
            files = found["finished"].get("files", {}) if found else {}
            complete = all((self.folder / path).exists() for path in files.values())
            return found, any(root.glob("step_*")), files if complete else {}

        self.found, saved, self.results = self.on_main_rank(look)
        if self.found is None:
            return
        try:
            self.checkpoint = checkpoint.latest(root, self.mesh) if saved else None
            before = self.found["facts"]
            if self.checkpoint is not None:
                last = self.checkpoint
                before = self.on_main_rank(lambda: checkpoint.read_state(last).get("facts", before))
            strict = self.checkpoint is not None or self.script in ("evaluate", "rlhf")
            self.changes = changes(before, self.facts, self.script, strict=strict, prefix=prefix)
        except ValueError as error:
            self._refuse(str(error))

    def is_finished(self) -> bool:
        """Whether all steps are done and no option may add some; prints the results then.

        A finished run with changed options and without a checkpoint to resume from is refused.
        """
        step = self.found["finished"].get("step") if self.found else None
        if not self.results or not step or self.checkpoint is not None and self.checkpoint.name != f"step_{step}":
            return False
        if self.changes and self.checkpoint is None:
            self._refuse(
                f"{self.folder}: the run has ended at step {step} and its checkpoints are gone: it cannot be resumed"
                f" with {'; '.join(self.changes)}; another run.output begins anew"
            )
        before, now = self.found["facts"]["options"] if self.found else {}, self.facts["options"]
        lengths = [(before.get(name, now[name]), now[name]) for name in LENGTHS if name in now]
        if any(new > old or new != old == 0 or old != new == 0 for old, new in lengths):
            return False
        self.print_finished()
        return True

    def print_finished(self) -> None:
        """Prints that the run has ended, its results, and how to begin anew."""
        step = self.found["finished"]["step"] if self.found else 0
        if self.mesh.is_main:
            print(f"{self.folder}: this run has ended{f' at step {step}' * bool(step)}")
            for name, path in self.results.items():
                print(f"{name + ':':<6} {self.folder / path}")
            if self.changes:
                print(f"ignored, as no step is left: {'; '.join(self.changes)}")
            more = "; to go on: more steps" * bool(step)
            print(f"to begin anew: --run.overwrite True, or another run.output{more}")

    def write_begun(self) -> None:
        """Writes the record and the config of a run that begins."""
        if not self._claimed:
            self._claimed, facts = True, self.facts
            self.on_main_rank(lambda: self._write_begun(facts))

    def _write_begun(self, facts: Facts) -> None:
        config: Any = absolute(self.config)
        own = {"output": str(self.folder.absolute()), "resume": "", "overwrite": False}
        own = {key: value for key, value in own.items() if hasattr(config.run, key)}
        self._write({"script": self.script, "facts": facts, "finished": {}})  # first: a kill in between leaves a run
        write_text(self.folder / "config.toml", to_toml(replace(config, run=replace(config.run, **own))))

    def write_finished(self, step: int, **files: str) -> None:
        """Writes the record of a finished run. On the main rank alone.

        Args:
            files: kind -> path in the folder.
        """
        self._write({"script": self.script, "facts": self.facts, "finished": {"step": step, "files": files}})

    def _write(self, record: dict[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(record, indent=1))

    def _refuse(self, text: str) -> NoReturn:
        failures.leave_together(f"error: {text}", self.mesh.is_main)


def resumed(folder: Path, script: str, section: Any) -> dict[str, Any] | None:
    """The record of the run to resume in this folder; None where a run is to begin. On the main rank alone.

    Args:
        section: `run` of the config; a stage of a pipeline, whose section has no `resume`, is always resumed.

    Raises:
        ValueError: the folder holds a run and no option resumes or deletes it, or it holds another script's run; or
            a run is to be resumed and there is none.
    """
    resume, overwrite = getattr(section, "resume", AUTO), getattr(section, "overwrite", False)
    record = read(folder)
    if record is None:
        if resume not in (NEW, AUTO):
            raise ValueError(f"run.resume={resume}: there is no run in this folder")
        return None
    check_script(folder, record, script)
    if overwrite and not restarted():  # by the launcher: then it is this command's own run
        delete(folder, script)
        return None
    if resume == NEW and not overwrite:
        ended = " that has ended" if record["finished"] else ""
        raise ValueError(
            f"run.output={folder}: holds a run{ended}: --run.resume auto resumes it, --run.overwrite True deletes it,"
            " another run.output leaves it alone"
        )
    return record


def check_script(folder: Path, record: dict[str, Any] | None, script: str) -> None:
    """Refuses the record of another script's run."""
    if record is not None and record["script"] not in (script, ""):
        raise ValueError(f"{folder}: holds a run of {record['script']}.py, not of {script}.py; name another folder")


def check_resumed(argv: Sequence[str], script: str) -> None:
    """Refuses `--resume RUN` of another script's run, before its config is read."""
    folder = option_value(argv, "--resume") or option_value(argv, "--run.resume")
    if folder not in (NEW, AUTO):
        check_script(Path(folder), read(Path(folder)), script)


def read(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None where it holds no run."""
    path = folder / "run.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
    if (folder / "config.toml").exists() or (folder / "checkpoints").exists():  # written before there were records
        return {"script": "", "facts": {"options": {}, "contents": {}}, "finished": {}}
    return None


def delete(folder: Path, script: str) -> None:
    """Deletes a run's files, and no others; the record last, so that a killed deletion still leaves a run."""
    for name in reversed((*OUTPUTS, f"{script}.png", *OUTPUTS_OF.get(script, ()))):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
