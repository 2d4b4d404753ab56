"""Shipped configs: they pass their script's checks, and data files that no script writes exist."""

from pathlib import Path

import pytest
from conftest import ROOT
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.engine.config import flatten, load

CONFIGS = {path.stem.removesuffix("_smollm2"): path for path in (ROOT / "launch" / "configs").glob("*.toml")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_shipped_config_passes_its_checks(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert CONFIGS.keys() == SCRIPTS.keys()
    config = load(SCRIPTS[script], str(CONFIGS[script]))
    assert config.check(1) == 1
    files = [path for name, paths in flatten(config).items() if name.endswith("sources") for path in paths]
    assert files and all(Path(path).is_file() for path in files if not path.startswith("runs/"))
