"""A kernel file with a fault in it, as a module of its own: proves that a check of the kernels bites."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trialign.kernels import dispatch


def planted(module: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`module` again with `old`, which its source must hold, replaced by `new`; its custom ops under another name."""
    source = Path(str(module.__file__)).read_text()
    assert old in source, f"{module.__name__} has no {old!r}"
    name = f"trialign.kernels.planted_{module.__name__.rpartition('.')[2]}"
    path = folder / "planted.py"  # the kernels' compiler reads its source again
    path.write_text(source.replace(old, new).replace("trialign::", "planted::"))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module_again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module_again)
    monkeypatch.setattr(dispatch, "register", lambda *_, **__: None)  # the ops have their shapes and launchers already
    spec.loader.exec_module(module_again)
    return module_again
