"""trialign._host (csrc/host): the scheduler of the embedded generator and the packing of micro-batches in C++.

engine/generation/scheduler.py and algorithms/micro_batch.py are its references, which serve where it is not built and
under TRIALIGN_KERNELS=reference.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..kernels.backends.extension import load_extension
from ..kernels.dispatch import MODE

HOST: Any = None
"""The module; None where the references serve."""
if MODE != "reference" and load_extension("_host") is None:
    HOST = importlib.import_module("trialign._host")
