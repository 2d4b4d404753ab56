"""Rotary embeddings: the frequencies a config asks for, read from and written to Hugging Face's keys.

transformers 5 keeps everything in `rope_parameters`; before it, `rope_theta` stood beside `rope_scaling`. Both are
read, and both are written, so that transformers 4 and 5 and vLLM find what they know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]

# Keys of each kind besides rope_type and rope_theta: Hugging Face's name -> (our field, must it be there).
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
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(key for keys in _KEYS.values() for key in keys)}


@dataclass(frozen=True)
class Rope:
    """How the angles of a rotary embedding are stretched beyond the length a model was first trained on.

    `dynamic` NTK turns by plain angles up to the trained length and by others in every longer document. A rollout that
    grows past it would see its cached keys turned by the angles of shorter lengths, which no training forward repeats,
    so documents longer than `max_positions` are refused there and the angles are the plain ones.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int | None = None
    """trained length (yarn, llama3)"""
    low_factor: float = 1.0
    high_factor: float = 4.0
    """llama3: wavelengths above original/low are divided by factor, below original/high left alone"""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: turns over the trained length between which interpolation passes into extrapolation"""
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """yarn: what cos and sin are multiplied by; by default 0.1 ln(factor) + 1"""
    truncate: bool = True
    """yarn: round the bounds of the transition to whole dims"""

    def frequencies(self, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """Angle a position [head_dim/2] fp32, and the number that cos and sin are multiplied by.

        Computed in fp32 as the published models were trained: at large positions float64 would turn by other angles.
        """
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        inverse = 1.0 / theta**exponents
        if self.kind == "linear":
            return inverse / self.factor, 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(inverse, theta, head_dim)
        return inverse, 1.0

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long waves are stretched, short ones kept, those between blended (Llama 3.1, arXiv:2407.21783)."""
        assert self.original_positions is not None
        turns = self.original_positions * inverse / (2 * math.pi)  # over the trained length
        blend = ((turns - self.low_factor) / (self.high_factor - self.low_factor)).clamp(0, 1)
        return (1 - blend) * inverse / self.factor + blend * inverse

    def _yarn(self, inverse: Tensor, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """NTK by parts with a temperature on attention (arXiv:2309.00071)."""
        assert self.original_positions is not None

        def dim_of(turns: float) -> float:
            """The dim pair that makes `turns` turns over the trained length."""
            assert self.original_positions is not None
            return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dim_of(self.beta_fast), dim_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        stretched = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        blended = inverse / self.factor * stretched + inverse * (1 - stretched)
        return blended, self._attention_scale()

    def _attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


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
            found.append((key, _read(key, section, max_positions), _number(section, "rope_theta", theta)))
    if len(found) == 2 and found[0][1:] != found[1][1:]:
        raise ValueError(
            f"rope_parameters={values['rope_parameters']} and rope_scaling={values['rope_scaling']} disagree"
        )
    return found[0][1:] if found else (Rope(), theta)


def _read(name: str, section: Mapping[str, Any], max_positions: int) -> Rope:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in _KEYS:
        raise ValueError(
            f"{name} asks for rope_type={kind!r}, which is not supported; allowed: {', '.join(get_args(RopeKind))}"
        )
    if section.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name}: partial_rotary_factor={section['partial_rotary_factor']}; allowed: 1.0")
    unknown = [key for key in section if key not in _KNOWN]
    if unknown:
        raise ValueError(f"{name}: {', '.join(unknown)} not supported; allowed: {', '.join(sorted(_KNOWN))}")
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
    if kind in ("yarn", "llama3"):
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key}={value!r}: expected a number above 0")
    return float(value)
