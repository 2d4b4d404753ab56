"""What launch/common/env.py sets for a process."""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PRODUCTS = """
import sys
sys.path.insert(0, {launch!r})
import torch
from common import env
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


def test_a_start_has_a_part_of_the_store_that_no_start_before_it_wrote_to(monkeypatch):
    """Ranks ask that have died since, some before they wrote what they ask for; and one is never there."""
    monkeypatch.syspath_prepend(LAUNCH)
    world = importlib.import_module("common.env")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start() -> None:
        server.add("asked", 1)
        server.set(f"asks/{server.add('asked', 1)}", "of the dead")
        with ThreadPoolExecutor(3) as pool:
            stores = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
            parts = list(pool.map(lambda rank: world.own_part(stores[rank], rank, 3, 60.0), range(3)))
        assert not parts[0].check(["stop"])
        parts[1].set("stop", "asked")
        assert all(part.get("stop") == b"asked" for part in parts)

    start()
    start()
    with pytest.raises(TimeoutError, match="rank 1, 2 has not joined the run"):
        world.own_part(server, 0, 3, 0.1)
