"""Registry of model families; config.json read and written through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import HeadKind, ModelConfig
from ..folder import checkpoint_role, model_folder, read_json
from .baichuan import BAICHUAN
from .family import Family
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .qwen import QWEN
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen_moe import QWEN2_MOE, QWEN3_MOE

FAMILIES = (LLAMA, MISTRAL, QWEN, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, BAICHUAN, MIXTRAL)
_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def family_of(config: ModelConfig) -> Family:
    """Family of a config."""
    return _BY_ARCHITECTURE[config.architecture]


def head_of(config: ModelConfig) -> HeadKind:
    """Head of a folder with this config."""
    return family_of(config).architectures[config.architecture]


def with_head(config: ModelConfig, head: HeadKind) -> ModelConfig:
    """The config with another head."""
    return replace(config, architecture=family_of(config).architecture(head))


def read_config(folder: Path | str) -> ModelConfig:
    """Config of a Hugging Face folder, or of a checkpoint's `checkpoint_role` with this role's head.

    Raises:
        ValueError: no such folder or file, not JSON, an unsupported architecture or feature, a missing or invalid
            number; naming key, value and what is allowed.
    """
    path = model_folder(folder) / "config.json"
    if not path.is_file():
        missing = "no config.json in this folder" if Path(folder).is_dir() else "no such folder"
        if Path(folder).suffix == ".gguf":
            missing = "a GGUF file is imported into a checkpoint first (launch/import_hf.py)"
        raise ValueError(f"{folder}: {missing}")
    values = read_json(path)
    try:
        config = from_hf_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError) as error:  # of a key whose type its family does not check
        raise ValueError(f"{path}: a value of the wrong type: {error}") from error
    # A critic's or a reward model's config.json is that of the language model it was initialized from.
    return with_head(config, "score") if checkpoint_role(folder) in ("critic", "reward") else config


def from_hf_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Config from the content of a Hugging Face config.json; raises as `read_config`."""
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _BY_ARCHITECTURE:
        raise ValueError(f"architectures={names}: allowed: {', '.join(_BY_ARCHITECTURE)}")
    family, model_type = _BY_ARCHITECTURE[names[0]], values.get("model_type")
    if model_type not in (None, "", family.model_type):  # transformers goes by model_type
        raise ValueError(f"model_type={model_type!r} is not that of {names[0]}: allowed: {family.model_type!r}")
    return family.read(values)


def to_hf_dict(config: ModelConfig, head: HeadKind = "lm", dtype: str = "bfloat16") -> dict[str, Any]:
    """Content of a config.json for transformers 4 and 5 and vLLM, of a folder with the given head."""
    family = family_of(config)
    names = {"architectures": [family.architecture(head)], "model_type": family.model_type}
    return names | family.write(config, head) | {"torch_dtype": dtype}
