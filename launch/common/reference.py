"""Log-probabilities of the reference model (DPO, KTO), each computed once and kept in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trialign.algorithms.data.dialogues import Sample
from trialign.algorithms.roles.build import read_shape
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role
from trialign.engine.storage.atomic import atomic_file

from .run import Run

Row = TypeVar("Row")
CHUNK = 512
"""Rows of a chunk: a killed pass resumes after the last one."""


def reference_pass(
    run: Run[Any],
    learner: Learner,
    rows: Sequence[Row],
    samples: Callable[[Row], Sequence[Sample]],
    compute: Callable[[Role, Sequence[Row]], Tensor],
) -> Tensor:
    """[samples of all rows] fp32: their log-probabilities under the reference. Collective.

    The reference is model.reference or, where that is "", the learner before `Run.begin` loads a checkpoint into it.
    Chunks are named by a digest of all that they depend on, so that only missing ones are computed.

    Args:
        samples: of a row.
        compute: log-probabilities of some rows' samples under a model.

    Raises:
        FloatingPointError: one is not finite, and its step may not be skipped; on every rank, naming its row.
    """
    config, contents = run.config, run.record.facts["contents"]
    option = "model.reference" if config.model.reference else "model.path"
    salt = json.dumps([[*contents[key].values()] for key in (option, "lora.adapter")] + [config.model.dtype])
    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    names = [_digest(salt, (sample for row in chunk for sample in samples(row))) for chunk in chunks]
    folder = run.folder / "reference"
    sums = run.on_main_rank(lambda: _read(folder, names))
    run.record.write_begun()
    missing = [(name, chunk) for name, chunk in zip(names, chunks, strict=True) if name not in sums]
    role: Role = learner
    if missing:
        if run.mesh.is_main:  # before the run's first line, and may take long
            name, count = config.model.reference or "the model as it is", sum(len(chunk) for _, chunk in missing)
            print(f"reference: {name}; log-probabilities of {count} rows, computed once", flush=True)
        role = _reference(run) if config.model.reference else learner
    with run.progress.task("log-probabilities under the reference"):
        for name, chunk in missing:
            sums[name] = values = compute(role, chunk).contiguous()
            _check_finite(config, [sample for row in chunk for sample in samples(row)], values)
            run.on_main_rank(lambda name=name, values=values: _write(folder, name, values))
    return torch.cat([sums[name] for name in names])


def _reference(run: Run[Any]) -> Role:
    folder, config = run.config.model.reference, run.config
    shape = run.on_all_ranks(lambda: read_shape(folder, config.parallel, config.run, "lm"))
    return Role(run.load_frozen(folder, shape), sizes=config.update)


def _check_finite(config: Any, samples: Sequence[Sample], sums: Tensor) -> None:
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    if bad and config.optimizer.on_nonfinite == "stop":
        raise FloatingPointError(
            f"{config.model.reference or 'the model as it is'}: the reference's log-probability of"
            f" {samples[bad[0]].where} is {sums[bad[0]].item()}: must be a finite number"
            f" ({len(bad)} of {len(samples)} are not)"
        )


def _digest(salt: str, samples: Iterable[Sample]) -> str:
    digest = sha256(salt.encode())
    for sample in samples:
        digest.update(len(sample.tokens).to_bytes(8) + sample.tokens.tobytes() + sample.mask)
    return digest.hexdigest()[:32]


def _read(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    paths = {name: folder / f"{name}.safetensors" for name in names}
    return {name: load_file(path)["sums"] for name, path in paths.items() if path.exists()}


def _write(folder: Path, name: str, sums: Tensor) -> None:
    with atomic_file(folder / f"{name}.safetensors") as aside:
        save_file({"sums": sums}, aside)
