"""Rotary embedding keys of config.json, read and written.

transformers 5 has `rope_parameters`, earlier versions and vLLM `rope_theta` and `rope_scaling`. Both forms are read,
and both are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from ..rope import Rope, RopeKind

_ORIGINAL = "original_max_position_embeddings"
_FIELDS = {  # Hugging Face's key -> Rope's field
    "factor": "factor",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    _ORIGINAL: "original_positions",
    **{key: key for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")},
}
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}
_KEYS: dict[str, tuple[str, ...]] = {  # of each kind, besides rope_type and rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", *(key for key in _FIELDS if key not in _REQUIRED)),
}
_ALL_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_FIELDS}


def read_rope(values: Mapping[str, Any], max_positions: int, theta: float = 10000.0) -> tuple[Rope, float]:
    """Rotary embedding of a config.json, and its base.

    Args:
        max_positions: default of the trained length.
        theta: default of the base.

    Raises:
        ValueError: an unknown kind or key, a missing or invalid number, two sections that disagree.
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
    """The section with the trained length from the top level, where transformers reads it from."""
    original = values.get(_ORIGINAL)
    if original is None:
        return section
    if section.get(_ORIGINAL) not in (None, original):
        raise ValueError(f"{_ORIGINAL}={original} and {section[_ORIGINAL]} in {name} disagree")
    return {**section, _ORIGINAL: original}


def _read(name: str, section: Mapping[str, Any], max_positions: int) -> Rope:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in _KEYS:
        raise ValueError(f"{name}: rope_type={kind!r} is not supported; allowed: {', '.join(get_args(RopeKind))}")
    if section.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name}: partial_rotary_factor={section['partial_rotary_factor']}; allowed: 1.0")
    unknown = [key for key in section if key not in _ALL_KEYS]
    if unknown:
        raise ValueError(f"{name}: {', '.join(unknown)} not supported; allowed: {', '.join(sorted(_ALL_KEYS))}")
    fields: dict[str, Any] = {}
    for key in _KEYS[kind]:
        if section.get(key) is None:
            if key in _REQUIRED:
                raise ValueError(f"{name}: rope_type={kind!r} needs {key}")
        elif key == "truncate":
            fields[key] = bool(section[key])
        else:
            number = _number(section, key, 1.0)
            fields[_FIELDS[key]] = int(number) if key == _ORIGINAL else number
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
    """The keys of `read_rope`, for transformers 4 and 5 and vLLM."""
    section: dict[str, Any] = {"rope_type": rope.kind}
    for key in _KEYS[rope.kind]:
        value = getattr(rope, _FIELDS[key])
        if key in _REQUIRED or value != getattr(Rope(), _FIELDS[key]):
            section[key] = value
    keys: dict[str, Any] = {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, **section}}
    return keys if rope.kind == "default" else keys | {"rope_scaling": section}


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key) if values.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}: expected a finite number above 0")
    return float(value)
