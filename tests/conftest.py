"""What every test needs before anything of the project is imported."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# With the checkout's root importable, transformers would take our kernels/ for the Hub's package of that name
# (`python -m pytest` puts the root there; an empty entry is the working directory).
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

# One thread a process, also in the scripts that tests start: ranks share the cores, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
