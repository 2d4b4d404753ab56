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

    `dynamic` NTK turns by plain angles up to the trained length; every longer document has a base of its own, by which
    it is turned from its first token on (`by_length`).
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int | None = None
    """trained length (dynamic, yarn, llama3)"""
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
    doubling: bool = False
    """dynamic: the base grows whenever the length has doubled (Qwen 1), not with every token"""

    def frequencies(self, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """Angle a position [head_dim/2] fp32, and the number that cos and sin are multiplied by.

        Computed in fp32 as the published models were trained: at large positions float64 would turn by other angles.
        """
        inverse = 1.0 / theta ** _exponents(head_dim)
        if self.kind == "linear":
            return inverse / self.factor, 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(inverse, theta, head_dim)
        return inverse, 1.0

    def by_length(self, theta: float, head_dim: int, lengths: Tensor) -> Tensor:
        """Angle a position under dynamic NTK, [tokens, head_dim/2] fp32: the base is multiplied by s^(d/(d-2)).

        With L the document's length and T the trained one, s = factor L/T - (factor - 1) as transformers has it, or
        2^(ceil(log2(L/T)) + 1) - 1 as Qwen 1's own code has it (`doubling`); at least 1.

        Args:
            lengths: [tokens] of the document that each token is of.
        """
        assert self.kind == "dynamic" and self.original_positions is not None
        ratio = lengths.double() / self.original_positions
        stretch = 2 ** (ratio.log2().ceil() + 1) - 1 if self.doubling else self.factor * ratio - (self.factor - 1)
        bases = theta * stretch.clamp_min(1) ** (head_dim / (head_dim - 2))
        return 1.0 / bases.float()[:, None] ** _exponents(head_dim).to(lengths.device)

    def stretched_positions(self, max_positions: int) -> int:
        """Positions a config means that names `max_positions`: what is interpolated may have been left out of them."""
        if self.kind == "linear":
            return int(max_positions * self.factor)
        if self.kind == "yarn" and self.original_positions is not None:
            return max(max_positions, int(self.original_positions * self.factor))
        return max_positions

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


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2).float() / head_dim


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
