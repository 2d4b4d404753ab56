"""Fingerprint of a run, options and digests of model files, and its changes when the run is resumed.

One rule for every option. Those in `FIXED` may not change once there is a checkpoint: the samples drawn so far, the
reference, or the optimizer's state and schedule depend on them; a change is refused by name. Every other option may
change, and takes effect from the step at which the run is resumed; the run's first line lists those that have.

An option that names a model or a reward function is compared by the content of its files: a folder that was moved is
the same, other weights under the same name are a change. Rows are compared by their streams, in the checkpoint's state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trialign.engine.config import absolute, flatten, paths
from trialign.engine.mesh import Mesh
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.storage.safetensors_io import sha256
from trialign.models.folder import assets, checkpoint_role

from .env import node

FIXED = (
    *("model.path", "model.critic", "model.reference", "lora", "data", "steps", "run.seed", "run.prompts_per_step"),
    *("rollout.samples_per_prompt", "update.batch_size", "update.ema_decay", "actor.ema_decay", "grpo.ema_decay"),
    *("ppo.epochs", "ppo.minibatches", "grpo.epochs", "grpo.minibatches", "rejection.method", "rejection.epochs"),
    *("rejection.prompts_per_round", "condition.template", "condition.normalize", "condition.buckets"),
)
"""Options and sections that may not change."""
FIXED_OF = {
    "conditional": ("reward",),  # the rows are scored once, before the first step
    "rlhf": ("prompts",),  # split once; each stage has a record of its own
    "evaluate": ("model", "text", "dialogues", "rollout", "reward", "metrics", "run.prompts_per_save"),
}
"""Further ones of one script."""
FREE = (
    *("data.sources", "data.eval_sources", "data.ptx_source", "steps.sources", "steps.eval_sources"),
    "prompts.sources",
)
"""Exceptions in those sections: the rows are compared, not their files' names."""
IGNORED = ("run.output", "run.resume", "run.overwrite", "run.log", "run.timeout", "run.grace", "parallel")
"""Options that change no result: a change is not reported."""

Content = dict[str, Any]  # file -> SHA-256; config.json -> its keys
Facts = dict[str, Any]  # "options": dotted key -> value; "contents": dotted key -> {path: Content}
OnAllRanks = Callable[[Callable[[], Any]], Any]


def facts_of(config: Any, mesh: Mesh, on_all_ranks: OnAllRanks) -> Facts:
    """Options and file contents that the run depends on, as JSON. Every node reads its own files, each rank a part.
    Collective.

    Args:
        on_all_ranks: `Run.on_all_ranks`.

    Raises:
        ValueError: on every rank: a node has other files than the first one; names option, file and both nodes.
    """
    config = absolute(config)
    flat, kinds = flatten(config), paths(config)
    places = {
        key: flat[key] if isinstance(flat[key], tuple) else (flat[key],) for key, inside in kinds.items() if inside
    }
    files = on_all_ranks(lambda: {key: {place: files_of(place) for place in own} for key, own in places.items()})
    every = {path for own in files.values() for found in own.values() for path in found.values()}
    sums = _sums(sorted(every, key=lambda path: (-path.stat().st_size, path)), mesh, on_all_ranks)
    contents = {
        key: {place: {name: sums[path] for name, path in found.items()} for place, found in own.items() if place}
        for key, own in files.items()
    }
    _same_on_all(contents, mesh)
    options = {key: v for key, v in flat.items() if key not in places and not _is_of(key, IGNORED)}
    return json.loads(json.dumps({"options": options, "contents": contents}))


def files_of(place: str) -> dict[str, Path]:
    """Name -> path of the files that a model's folder, or PATH:FUNCTION, is read from; {} where it does not exist."""
    path = Path(place)
    if not place or not path.exists():
        file, _, function = place.rpartition(":")
        path = Path(file)
        return {f"{path.name}:{function}": path} if path.is_file() else {}
    if path.is_file():
        return {path.name: path}
    found = assets(path) | {file.name: file for file in path.iterdir() if file.suffix in (".safetensors", ".json")}
    if checkpoint_role(path) is not None:  # SHA256SUMS covers its files, which hold the optimizer's state too
        found = assets(path) | {"SHA256SUMS": path / "SHA256SUMS"}
    return {name: file for name, file in found.items() if file.is_file()}


def _sums(files: Sequence[Path], mesh: Mesh, on_all_ranks: OnAllRanks) -> dict[Path, Any]:
    """Path -> content of a file, each read by one rank of this node. Collective."""
    nodes = gather_objects(node(), mesh.world)
    ranks = [rank for rank, other in enumerate(nodes) if other == nodes[mesh.world.rank]]
    mine = files[ranks.index(mesh.world.rank) :: len(ranks)]

    def read() -> dict[Path, Any]:
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            return dict(zip(mine, pool.map(_content, mine), strict=True))

    parts = gather_objects(on_all_ranks(read), mesh.world)
    return {path: value for rank in ranks for path, value in parts[rank].items()}


def _content(path: Path) -> Any:
    """SHA-256 of a file; of config.json the keys that describe the model."""
    if path.name != "config.json":
        return sha256(path)
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in keys.items() if key not in ("_name_or_path", "transformers_version")}
    except (ValueError, AttributeError, RecursionError):
        return sha256(path)


def _same_on_all(contents: dict[str, dict[str, Content]], mesh: Mesh) -> None:
    """Raises ValueError on every rank where a node's files are not those of the first. Collective."""
    found = gather_objects((node()[0], contents), mesh.world)
    host, first = found[0]
    for other, own in found[1:]:
        for key, places in own.items():
            for (path, files), expected in zip(places.items(), first[key].values(), strict=True):
                if files != expected:
                    raise ValueError(
                        f"{key}={path}: differs between node {host} and node {other}: {difference(expected, files)}"
                    )


def difference(before: Content, now: Content) -> str:
    """The first file that differs, and of config.json the keys."""
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "config.json", name)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if old is None or new is None:
            return f"{name} is {'new' if old is None else 'missing'}"
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            return "another architecture: " + ", ".join(f"{key}={new.get(key)}, was {old.get(key)}" for key in keys[:4])
        return f"{name} differs"
    return ""


def changes(before: Facts, now: Facts, script: str, *, strict: bool = True, prefix: str = "") -> list[str]:
    """A text for each option that differs.

    Args:
        before, now: of `facts_of`; an option that only one of them has, of another version, is ignored.
        prefix: of the options' names in the message.
        strict: options of `FIXED` may not change any more.

    Raises:
        ValueError: `strict`, and an option of `FIXED` differs; names it with both values.
    """
    found: dict[str, str] = {}
    for key, value in now["options"].items():
        old = before["options"].get(key, value)
        if old != value:
            found[key] = f"{key}={_short(value)} (was {_short(old)})"
    for key, own in now["contents"].items():
        old = before["contents"].get(key, own)
        if _sources(old) == _sources(own):
            continue
        found[key] = f"{key}={_short([*own])} (was {_short([*old])})"
        if len(old) == len(own):
            pairs = zip(old.values(), own.values(), strict=True)
            found[key] += "".join(f": {difference(*pair)}" for pair in pairs if pair[0] != pair[1])
    fixed = (*FIXED, *FIXED_OF.get(script, ()))
    for key in found:
        if strict and _is_of(key, fixed) and key not in FREE:
            raise ValueError(
                f"{prefix}{found[key]}: may not change once a run has begun; another run.output begins anew"
            )
    return list(found.values())


def _sources(own: dict[str, Content]) -> list[Any]:
    """The contents of an option's files, or its value where it has none, like module:function."""
    return [content or place for place, content in own.items()]


def chosen(facts: Facts, names: Iterable[str]) -> Facts:
    """The facts of some options and sections."""
    names = tuple(names)
    return {kind: {key: v for key, v in own.items() if _is_of(key, names)} for kind, own in facts.items()}


def _is_of(key: str, names: Iterable[str]) -> bool:
    """Whether an option is in a list of options and sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _short(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return repr(value) if value == "" else str(value)
