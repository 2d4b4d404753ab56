"""What launch/world.py sets for a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).parent.parent / "launch"
PRODUCTS = """
import sys
sys.path.insert(0, {launch!r})
import torch
import world
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(2, 202), 2]:
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_cache_of_onednn_primitives_is_bounded_by_default():
    """200 shapes, then the first one again: it has left the cache, which holds 1024 if it is not told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment |= {"ONEDNN_VERBOSE": "profile_create"}
    words = [sys.executable, "-c", PRODUCTS.format(launch=str(LAUNCH))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=True)
    made = [line for line in done.stdout.splitlines() if "create:cache_miss" in line and ",2x64:64x64" in line]
    if not made:
        pytest.skip("oneDNN does not multiply bfloat16 on this machine")
    assert len(made) == 2
