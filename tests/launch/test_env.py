"""Settings of torch and its libraries, and the store of a restarted job."""

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from conftest import ROOT
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from trialign.algorithms.config.common import ParallelConfig

PRODUCTS = f"""
import sys
sys.path.insert(0, {str(ROOT / "launch")!r})
import torch
from common import env
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(2, 202), 2]:
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
"""


ALLOCATOR = f"""
import runpy, sys
sys.argv = [{str(ROOT / "launch" / "ppo.py")!r}, "--help"]
sys.path.insert(0, {str(ROOT / "launch")!r})

class BeforeTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            import os
            print("before torch:", os.environ.get("PYTORCH_ALLOC_CONF"))

sys.meta_path.insert(0, BeforeTorch())
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    import torch
    print("torch:", torch._C._accelerator_getAllocatorSettings())
"""


def test_allocator_segments_are_expandable_before_torch_is_imported():
    """torch's libraries for CUDA read the variable while they are loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    printed = subprocess.check_output([sys.executable, "-c", ALLOCATOR], env=environment, text=True, timeout=300)
    assert "before torch: expandable_segments:True\n" in printed and "torch: expandable_segments:True\n" in printed


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_allocator_settings_of_the_user_stay(name, monkeypatch):
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    runpy.run_path(str(ROOT / "launch" / "common" / "interrupts.py"))
    found = {key: value for key, value in os.environ.items() if key.endswith("_ALLOC_CONF")}
    assert found == {name: "max_split_size_mb:64"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_primitive_cache_is_bounded():
    """200 shapes, then the first again: it has left the cache, which by default holds 1024."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment |= {"ONEDNN_VERBOSE": "profile_create"}
    printed = subprocess.check_output([sys.executable, "-c", PRODUCTS], env=environment, text=True, timeout=300)
    compiled = [line for line in printed.splitlines() if "create:cache_miss" in line and ",2x64:64x64" in line]
    if not compiled:
        pytest.skip("oneDNN does not multiply bfloat16 on this machine")
    assert len(compiled) == 2


def test_products_are_summed_in_fp32_from_the_start_of_a_run(launched):
    """Whatever a container has set; torch's own defaults allow sums in bf16."""
    matmul, names = torch.backends.cuda.matmul, ("bf16_reduced_precision_reduction", "fp16_reduced_precision_reduction")
    flags = [f"allow_{name}" for name in ("tf32", *names, "fp16_accumulation")]
    before = {flag: getattr(matmul, flag) for flag in flags}
    try:
        for flag in flags:
            setattr(matmul, flag, True)
        torch.set_float32_matmul_precision("high")
        env = launched("common.env")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # those that repeat
        with env.mesh_of(ParallelConfig(device="cpu"), 60.0, cast(Any, None)):
            assert [flag for flag in flags if getattr(matmul, flag)] == []
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        for flag, value in before.items():
            setattr(matmul, flag, value)


def test_restarted_job_has_a_store_prefix_of_its_own(launched):
    """Despite keys of ranks that died in an earlier start; a rank that never joins is reported."""
    env = launched("common.env")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        server.add("asked", 1)
        server.set(f"asks/{server.add('asked', 1)}", "a dead rank")
        with ThreadPoolExecutor(3) as pool:
            stores = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
            parts = list(pool.map(lambda rank: env.own_part(stores[rank], rank, 3, 60.0), range(3)))  # noqa: B023
        assert not parts[0].check(["stop"])
        parts[1].set("stop", "asked")
        assert all(part.get("stop") == b"asked" for part in parts)
    with pytest.raises(TimeoutError, match="rank 1, 2"):
        env.own_part(server, 0, 3, 0.1)


@pytest.mark.parametrize(
    "given", [{}, {"TRITON_CACHE_DIR": "mine"}, {"TRITON_HOME": "mine"}, {"writable": "by others"}]
)
def test_triton_cache_is_local_to_the_node(tmp_path, given):
    """Unless the user names one, or the folder is open to others."""
    folder = tmp_path / f"trialign-triton-{os.getuid()}"
    if "writable" in given:
        folder.mkdir()
        folder.chmod(0o777)
    program = f"import sys, os\nsys.path.insert(0, {str(ROOT / 'launch')!r})\nimport common.interrupts, tempfile\n"
    program += "print(os.environ.get('TRITON_CACHE_DIR', ''))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment = kept | {"TMPDIR": str(tmp_path)} | given
    printed = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).strip()
    assert printed == (given.get("TRITON_CACHE_DIR", "") if given else str(folder))
    assert given or folder.stat().st_mode & 0o777 == 0o700
