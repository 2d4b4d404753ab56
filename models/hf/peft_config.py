"""What a PEFT adapter folder's adapter_config.json says, refused where PEFT would compute other than plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...engine.parallel.lora import Target
from ..config import read_json
from .peft_file import TENSORS, adapter_name
from .table import Place

CONFIG = "adapter_config.json"
_NAMES = ("target_modules", "exclude_modules", "target_parameters")
# Keys that are looked at by themselves, or change nothing of what adapters on given weights compute.
_FREE = {
    *(*_NAMES, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "modules_to_save"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("eva_config", "qalora_group_size", "megatron_core"),
}
# Keys with the values that are plain LoRA; and the values under which any other key asks for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, True, None),
    # The others begin from weights they have changed themselves: on the plain base they are another model.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_UNSET = (None, False, [], {}, "")
# What transformers 5 has as parameters of a mixture, without the layer.
_PARAMETERS: dict[str, str] = {
    "experts.gate": "mlp.experts.gate_up_proj",
    "experts.up": "mlp.experts.gate_up_proj",
    "experts.down": "mlp.experts.down_proj",
    "router": "mlp.gate.weight",
}


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The folder's adapter_config.json.

    Raises:
        ValueError: no such file; another kind of adapter than LoRA, a key that is not known and is set, a value of the
            wrong type; naming the key and what is allowed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG}, so no PEFT adapter")
    values = read_json(path)
    for key in (*_PLAIN, *values):  # first those that say why the others are there
        if key in values and key not in _FREE and values[key] not in _PLAIN.get(key, _UNSET):
            allowed = repr(_PLAIN[key][0]) if key in _PLAIN else "null, false or empty"
            raise ValueError(f"{path}: {key}={values[key]!r} is not supported; allowed: {allowed}")
    for key, kind, wanted in (("r", int, "a whole number"), ("lora_alpha", int | float, "a number")):
        value = values.get(key, 8)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{path}: {key}={value!r}: expected {wanted}")
    for key in _NAMES:
        _check_names(path, key, values.get(key))
    return values


def _check_names(path: Path, key: str, value: Any) -> None:
    """Refuses what is neither a list of names nor a regular expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{path}: {key}={value!r}: no regular expression: {error}") from None
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{path}: {key}={value!r}: expected a list of names or a regular expression")


def _names(which: str | set[str], name: str) -> bool:
    """Whether PEFT takes a value of `_NAMES` to mean this module or parameter: the whole of it, or its last words."""
    if isinstance(which, str):
        return re.fullmatch(which, name) is not None
    words = name.split(".")
    return any(".".join(words[i:]) in which for i in range(len(words)))


def check_targets(
    folder: Path, values: Mapping[str, Any], linears: Mapping[Target, Iterable[Place]], found: Collection[str]
) -> None:
    """Refuses a config that names other weights than its folder has adapters on, where it names any at all.

    PEFT passes in silence over tensors on a weight that is not named. A name may mean a mixture's dense layers and
    shared expert alone, for transformers 5 holds experts and routers as parameters.

    Args:
        linears: target -> all that the model has of it.
        found: the folder's tensors, named as by `adapter_name`.
    """
    said = (values.get(key) or [] for key in _NAMES)
    modules, excluded, parameters = (value if isinstance(value, str) else {*value} for value in said)
    if not modules and not parameters:
        return
    all_linear = isinstance(modules, str) and modules.lower() == "all-linear"  # PEFT's word: all but the head
    for target, place in ((target, place) for target, held in linears.items() for place in held):
        module, parameter = place.name.partition("#")[0].removesuffix(".weight"), _PARAMETERS.get(target)
        named = (target != "head" if all_linear else _names(modules, module)) and not _names(excluded, module)
        if adapter_name(place.name, "A") in found:
            if not named and not _names(parameters, parameter or place.name):
                raise ValueError(
                    f"{folder / CONFIG}: target_modules does not name {module}, on which {TENSORS} has an adapter; PEFT"
                    " would leave it out"
                )
        elif named and parameter is None:
            raise ValueError(
                f"{folder / CONFIG}: target_modules names {module}, on which {TENSORS} has no adapter; allowed: the"
                " modules it has adapters on"
            )
