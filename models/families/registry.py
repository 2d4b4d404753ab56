"""All families, by the `architectures` entry of a config.json."""

from __future__ import annotations

from functools import cache

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


@cache
def architectures() -> dict[str, Family]:
    """Every architecture that is read -> its family."""
    return {name: family for family in FAMILIES for name in family.architectures}


def family_of(architecture: str) -> Family:
    """The family of an architecture that is known."""
    return architectures()[architecture]
