"""Loading of the compiled extensions trialign._C and trialign._host, where they fit the sources and the torch."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Literal

import torch

from ...source_hash import source_hash  # pyright: ignore[reportMissingImports] (it is in csrc/)


def why_unusable(built_hash: str, built_torch: str, sources: Path) -> str | None:
    """Reason why an extension built from `built_hash` against `built_torch` does not fit; None if it does.

    trialign._C uses torch's stable ABI, so another patch release fits; another minor release is rebuilt to be safe.
    """
    here = source_hash(sources)
    if here and here != built_hash:
        return "was built from other sources than those in csrc/"
    if built_torch.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"was built for torch {built_torch}, this is torch {torch.__version__}"
    return None


def load_extension(name: Literal["_C", "_host"]) -> str | None:
    """Loads trialign.`name`; _C registers torch.ops.trialign.*. Returns the reason why it cannot be used, or None.

    Its source hash and torch version are read from the file: a stale one must not register its ops.
    """
    spec = importlib.util.find_spec(f"trialign.{name}")
    if spec is None or spec.origin is None:
        return "is not built"
    module = Path(spec.origin)
    facts = re.search(rb"trialign\.\w+ built from <(\w+)> for torch <([^>]+)>", module.read_bytes())
    built_hash, built_torch = (fact.decode() for fact in facts.groups()) if facts else ("", torch.__version__)
    problem = why_unusable(built_hash, built_torch, module.parent)
    if problem is None:
        try:
            importlib.import_module(f"trialign.{name}")
        except ImportError as error:
            problem = f"does not load ({error})"
    return problem
