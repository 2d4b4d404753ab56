"""adapter_config.json of PEFT: read, refused where it is not plain LoRA, and written."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...engine.parallel.lora import LoRA
from ..config import HeadKind, ModelConfig
from ..families.registry import family_of
from ..folder import read_json
from ..lora import Target, adapted_weights, adapter_name
from .table import TensorSlice

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_NAMES = ("target_modules", "exclude_modules", "target_parameters")
# Keys with their own checks, or without effect on an adapter's output.
_FREE = {
    *(*_NAMES, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "modules_to_save"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("eva_config", "qalora_group_size", "megatron_core"),
}
# Keys -> values of plain LoRA; any other key must be unset.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, True, None),
    # Other initializations change the base weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_UNSET = (None, False, [], {}, "")
_GATE_UP = r".*\.gate_up_proj"  # PEFT's pattern for the parameter that holds experts' gate and up
# Parameters of an MoE layer in transformers 5 that are not linear modules.
_PARAMETERS: dict[str, str] = {
    "experts.gate": "mlp.experts.gate_up_proj",
    "experts.up": "mlp.experts.gate_up_proj",
    "experts.down": "mlp.experts.down_proj",
    "router": "mlp.gate.weight",
}


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Reads a folder's adapter_config.json.

    Raises:
        ValueError: no such file; not LoRA, an unknown key that is set, a value of the wrong type; naming key, value and
            what is allowed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: not a PEFT adapter, no {CONFIG}")
    values = read_json(path)
    for key in (*_PLAIN, *values):  # peft_type first: it explains the others
        if key in values and key not in _FREE and values[key] not in _PLAIN.get(key, _UNSET):
            allowed = repr(_PLAIN[key][0]) if key in _PLAIN else "null, false or empty"
            raise ValueError(f"{path}: {key}={values[key]!r} is not supported; allowed: {allowed}")
    for key, kind, wanted in (("r", int, "an integer"), ("lora_alpha", int | float, "a number")):
        value = values.get(key, 8)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{path}: {key}={value!r}: expected {wanted}")
    for key in _NAMES:
        _check_names(path, key, values.get(key))
    return values


def _check_names(path: Path, key: str, value: Any) -> None:
    """Raises ValueError where a value is neither a list of names nor a regular expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{path}: {key}={value!r}: not a regular expression: {error}") from None
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{path}: {key}={value!r}: expected a list of names or a regular expression")


def _matches(pattern: str | set[str], name: str) -> bool:
    """Whether PEFT matches a module or parameter: a regular expression in full, or a list by the name's last words."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    words = name.split(".")
    return any(".".join(words[i:]) in pattern for i in range(len(words)))


def check_targets(
    folder: Path, values: Mapping[str, Any], linears: Mapping[Target, Iterable[TensorSlice]], found: Collection[str]
) -> None:
    """Checks that the config's targets, if it has any, are the weights with adapters in the folder.

    PEFT skips other tensors without a warning. In MoE models a module's name may match only dense layers and the shared
    expert: transformers 5 has experts and routers as parameters.

    Args:
        linears: target -> all weights of it in the model.
        found: `adapter_name`s of the folder's tensors.
    """
    given = (values.get(key) or [] for key in _NAMES)
    modules, excluded, parameters = (value if isinstance(value, str) else {*value} for value in given)
    if not modules and not parameters:
        return
    all_linear = isinstance(modules, str) and modules.lower() == "all-linear"  # PEFT's keyword: all but the head
    for target, weight in ((target, weight) for target, weights in linears.items() for weight in weights):
        module, parameter = weight.name.partition("#")[0].removesuffix(".weight"), _PARAMETERS.get(target)
        chosen = (target != "head" if all_linear else _matches(modules, module)) and not _matches(excluded, module)
        if adapter_name(weight.name, "A") in found:
            if not chosen and not _matches(parameters, parameter or weight.name):
                raise ValueError(
                    f"{folder / CONFIG}: target_modules lacks {module}, which has an adapter in {TENSORS} (PEFT would"
                    " skip it)"
                )
        elif chosen and parameter is None:
            raise ValueError(f"{folder / CONFIG}: target_modules has {module}, without an adapter in {TENSORS}")


def unsupported_by_peft(config: ModelConfig, lora: LoRA) -> str | None:
    """Reason why PEFT (0.21) cannot hold these adapters; None where it can."""
    weights = adapted_weights(config, lora)
    fused = [weight.name for found in weights.values() for weight in found if "#" in weight.name]
    if fused:
        return f"{fused[0]}: PEFT has no adapters on parts of a fused weight"
    experts = {target for target in weights if target.startswith("experts.")}
    if experts not in (set(), {"experts.down"}, {"experts.gate", "experts.up", "experts.down"}):
        return f"{', '.join(sorted(experts))}: PEFT reads adapters of experts.down alone, or of all three"
    dense = [target for target in weights if target in ("gate", "up", "down")]
    if dense and family_of(config).name == "Qwen3-MoE":
        return f"{', '.join(dense)}: PEFT takes modules of these names in a Qwen3-MoE for those of experts"
    return None


def peft_targets(config: ModelConfig, lora: LoRA, head: HeadKind) -> dict[str, Any]:
    """The keys of adapter_config.json for adapted weights, their ranks and alphas.

    PEFT loads single experts' adapters into adapters of the experts' parameters (models/hf/peft.py): that of gate and
    up together has twice the rank, and needs an alpha that gives the same scale.
    """
    modules, parameters = set(), set()
    for target, found in adapted_weights(config, lora, head).items():
        if target.startswith("experts."):
            parameters.add("experts.down_proj" if target == "experts.down" else "experts.gate_up_proj")
        elif target == "router":
            parameters.add("mlp.gate.weight")
        else:  # in MoE models the last word also names an expert's module
            words = 2 if config.moe is not None and target.rpartition(".")[2] in ("gate", "up", "down") else 1
            modules |= {".".join(weight.name.removesuffix(".weight").split(".")[-words:]) for weight in found}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    if "experts.gate_up_proj" in parameters:
        ranks[_GATE_UP], alphas[_GATE_UP] = 2 * lora.rank, number(lora.alpha * (math.sqrt(2) if lora.rslora else 2))
    return {
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters, reverse=True) or None,  # PEFT wraps gate and up first
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def number(alpha: float) -> float:
    """`alpha` as PEFT writes it: integers without a decimal point."""
    return int(alpha) if alpha.is_integer() else alpha
