"""Model folders: where config.json, tokenizer and weights lie, in a Hugging Face folder and in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engine.storage.checkpoint import Reader

INDEX = "model.safetensors.index.json"

# Of the files that lie in models' folders, those that a model is loaded with; a trainer's and an adapter's are not.
_ASSETS = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "tekken.json",
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file: it is not JSON, or not an object.
    """
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
    """The role whose model a checkpoint stands for: its actor, or its critic or reward model where it has none; None
    for a path that is no checkpoint."""
    held = Path(path) / "assets"
    if not (held.parent / "SHA256SUMS").is_file():
        return None
    return next((role for role in ("actor", "critic", "reward") if (held / role / "config.json").is_file()), None)


def model_folder(path: Path | str) -> Path:
    """The folder of config.json and tokenizer: a Hugging Face folder itself, the assets of a checkpoint's role."""
    role = checkpoint_role(path)
    return Path(path) if role is None else Path(path) / "assets" / role


def open_checkpoint(path: Path) -> Reader:
    """A reader of the checkpoint at `path`.

    Raises:
        ValueError: no checkpoint there; of a run's folder, naming a checkpoint in it.
    """
    if path.is_dir() and not (path / "SHA256SUMS").is_file():
        found = [*path.glob("step_*"), *path.glob("checkpoints/step_*")]
        steps = (p for p in found if p.name.removeprefix("step_").isdigit())
        last = max(steps, key=lambda p: int(p.name.removeprefix("step_")), default=None)
        hint = f"; {last} is one" if last else "; a run's are RUN/checkpoints/step_N"
        raise ValueError(f"{path}: no checkpoint, SHA256SUMS is missing{hint}")
    return Reader(path)


def assets(path: Path | str, prefix: str = "") -> dict[str, Path]:
    """Name -> path of a model's files beside its weights: configs, tokenizer, chat templates.

    Args:
        prefix: put before every name.
    """
    folder = model_folder(path)
    found = [p for p in folder.iterdir() if p.name in _ASSETS or p.suffix in (".jinja", ".tiktoken")]
    found += (folder / "additional_chat_templates").glob("*.jinja")  # those of other names than "default"
    return {prefix + p.relative_to(folder).as_posix(): p for p in sorted(found) if p.is_file()}
