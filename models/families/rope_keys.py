"""Rotary embeddings in config.json: Hugging Face's keys for the scaling of the frequencies, read and written.

transformers 5 keeps everything in `rope_parameters`; before it, `rope_theta` stood beside `rope_scaling`. Both are
read, and both are written, for transformers 4 and 5 and vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from ..rope import Rope, RopeKind

# Keys of each kind besides rope_type and rope_theta: Hugging Face's name -> (our field, whether it is required).
_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, dict[str, tuple[str, bool]]] = {
    "default": {},
    "linear": {"factor": ("factor", True)},
    "dynamic": {"factor": ("factor", True)},
    "llama3": {
        "factor": ("factor", True),
        "low_freq_factor": ("low_factor", True),
        "high_freq_factor": ("high_factor", True),
        _ORIGINAL: ("original_positions", False),
    },
    "yarn": {
        "factor": ("factor", True),
        _ORIGINAL: ("original_positions", False),
        "beta_fast": ("beta_fast", False),
        "beta_slow": ("beta_slow", False),
        "attention_factor": ("attention_factor", False),
        "mscale": ("mscale", False),
        "mscale_all_dim": ("mscale_all_dim", False),
        "truncate": ("truncate", False),
    },
}
_ALL_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    *(key for keys in _KEYS.values() for key in keys),
}


def read_rope(values: Mapping[str, Any], max_positions: int, theta: float = 10000.0) -> tuple[Rope, float]:
    """The rotary embedding of a config.json and its base.

    Args:
        max_positions: the trained length where the config names no other.
        theta: the base where it names none.

    Raises:
        ValueError: an unknown kind or key, a number that is missing or impossible, or two sections that disagree.
    """
    theta = _number(values, "rope_theta", theta)
    found: list[tuple[str, Rope, float]] = []
    for key in ("rope_parameters", "rope_scaling"):
        section = values.get(key) or {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{key}={section!r}: expected an object")
        if section:
            rope = _read(key, _with_original(key, section, values), max_positions)
            found.append((key, rope, _number(section, "rope_theta", theta)))
    if len(found) == 2 and found[0][1:] != found[1][1:]:
        raise ValueError(
            f"rope_parameters={values['rope_parameters']} and rope_scaling={values['rope_scaling']} disagree"
        )
    return found[0][1:] if found else (Rope(), theta)


def _with_original(name: str, section: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section with the trained length that stands beside it, where transformers takes it from."""
    beside = values.get(_ORIGINAL)
    if beside is None:
        return section
    if section.get(_ORIGINAL) not in (None, beside):
        raise ValueError(f"{_ORIGINAL}={beside} and {section[_ORIGINAL]} in {name} disagree")
    return {**section, _ORIGINAL: beside}


def _read(name: str, section: Mapping[str, Any], max_positions: int) -> Rope:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in _KEYS:
        raise ValueError(
            f"{name} asks for rope_type={kind!r}, which is not supported; allowed: {', '.join(get_args(RopeKind))}"
        )
    if section.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name}: partial_rotary_factor={section['partial_rotary_factor']}; allowed: 1.0")
    unknown = [key for key in section if key not in _ALL_KEYS]
    if unknown:
        raise ValueError(f"{name}: {', '.join(unknown)} not supported; allowed: {', '.join(sorted(_ALL_KEYS))}")
    fields: dict[str, Any] = {}
    for key, (field, needed) in _KEYS[kind].items():
        if section.get(key) is None:
            if needed:
                raise ValueError(f"{name}: rope_type={kind!r} needs {key}")
        elif key == "truncate":
            fields[field] = bool(section[key])
        else:
            number = _number(section, key, 1.0)
            fields[field] = int(number) if field == "original_positions" else number
    if kind in ("dynamic", "yarn", "llama3"):
        fields.setdefault("original_positions", max_positions)
    if kind != "default" and fields["factor"] < 1:
        raise ValueError(f"{name}: factor={fields['factor']}: expected at least 1")
    if kind == "llama3" and not fields["high_factor"] > fields["low_factor"]:
        raise ValueError(
            f"{name}: high_freq_factor={fields['high_factor']} must be above low_freq_factor={fields['low_factor']}"
        )
    return Rope(kind=kind, **fields)


def write_rope(rope: Rope, theta: float) -> dict[str, Any]:
    """The keys of a config.json that `read_rope` reads, for transformers 4 and 5 and vLLM."""
    section: dict[str, Any] = {"rope_type": rope.kind}
    for key, (field, needed) in _KEYS[rope.kind].items():
        value = getattr(rope, field)
        if needed or value != getattr(Rope(), field):
            section[key] = value
    keys: dict[str, Any] = {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, **section}}
    return keys if rope.kind == "default" else keys | {"rope_scaling": section}


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key) if values.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}: expected a finite number above 0")
    return float(value)
