"""Model folders: config.json, tokenizer files and weights of a Hugging Face folder or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engine.storage.checkpoint import Reader

INDEX = "model.safetensors.index.json"

# Files needed to load a model; a trainer's and an adapter's are left out.
_ASSETS = set(
    "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json"
    " added_tokens.json vocab.json vocab.txt merges.txt chat_template.json tekken.json".split()
)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises ValueError naming the file where it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: lists or objects are nested too deep to be read") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: object) -> None:
    """Writes a JSON file as transformers does: indented by 2, a newline at the end."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def checkpoint_role(path: Path | str) -> str | None:
    """Role whose model is loaded from a checkpoint: actor, else critic, else reward; None if not a checkpoint."""
    folder = Path(path) / "assets"
    if not (folder.parent / "SHA256SUMS").is_file():
        return None
    return next((role for role in ("actor", "critic", "reward") if (folder / role / "config.json").is_file()), None)


def model_folder(path: Path | str) -> Path:
    """Folder of config.json and tokenizer: a Hugging Face folder itself, or the role's assets in a checkpoint."""
    role = checkpoint_role(path)
    return Path(path) if role is None else Path(path) / "assets" / role


def open_checkpoint(path: Path) -> Reader:
    """Reader of a checkpoint; raises ValueError where `path` is none, naming one if `path` is a run's folder."""
    if path.is_dir() and not (path / "SHA256SUMS").is_file():
        found = [*path.glob("step_*"), *path.glob("checkpoints/step_*")]
        steps = (p for p in found if p.name.removeprefix("step_").isdigit())
        last = max(steps, key=lambda p: int(p.name.removeprefix("step_")), default=None)
        hint = f"; {last} is one" if last else "; a run saves them as RUN/checkpoints/step_N"
        raise ValueError(f"{path}: no checkpoint, SHA256SUMS is missing{hint}")
    return Reader(path)


def assets(path: Path | str, prefix: str = "") -> dict[str, Path]:
    """Name -> path of a model's files other than weights: configs, tokenizer, chat templates.

    Args:
        prefix: of every name.
    """
    folder = model_folder(path)
    found = [p for p in folder.iterdir() if p.name in _ASSETS or p.suffix in (".jinja", ".tiktoken")]
    found += (folder / "additional_chat_templates").glob("*.jinja")  # templates not named "default"
    return {prefix + p.relative_to(folder).as_posix(): p for p in sorted(found) if p.is_file()}
