"""The CUDA C++ part of trialign._C as nvcc builds it: no spills, every architecture, every op registered."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
from trialign.kernels import dispatch

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc")
OPS = re.findall(r'ops\.impl\("(\w+)"', (ROOT / "csrc" / "cuda_ops.cpp").read_text())
# 200 values a thread, all live at once: more than the registers of 1024 threads, fewer than those of 64.
CROWDED = """
__global__ void __launch_bounds__(THREADS) crowded(volatile float* x) {
    float kept[200];
    #pragma unroll
    for (int i = 0; i < 200; i++) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 200; i++) x[i * 1024 + threadIdx.x] = kept[i] * kept[199 - i];
}
"""

needs_cuda_ops = pytest.mark.skipif(not dispatch.EXTENSION or NVCC is None, reason="no extension or no nvcc")


@needs_cuda_ops
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_registered(op):
    assert dispatch.has_cuda(op)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("threads, built", [(64, True), (1024, False)])
def test_spilling_kernel_fails_the_build(threads, built, tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("TRIALIGN_CUDA_ARCHS", "80")
    monkeypatch.chdir(ROOT)
    command = runpy.run_path(str(ROOT / "setup.py"))["Cuda"](NVCC).compile_command()
    source = tmp_path / "crowded.cu"
    source.write_text(CROWDED.replace("THREADS", str(threads)))
    result = subprocess.run([*command, "-c", source, "-o", tmp_path / "crowded.o"], capture_output=True, text=True)
    assert (result.returncode == 0) == built, result.stderr
    assert built or "spill" in result.stderr.lower()


def cuobjdump() -> str:
    """Path of the tool in Triton's wheel or the CUDA toolkit; skips without either."""
    try:
        import triton  # an optional dependency

        return triton.knobs.nvidia.cuobjdump.path  # pyright: ignore[reportAttributeAccessIssue]
    except (ImportError, RuntimeError):
        return shutil.which("cuobjdump") or pytest.skip("neither Triton nor the CUDA toolkit has a cuobjdump here")


@needs_cuda_ops
def test_module_holds_every_architecture():
    found = list((ROOT / "csrc").glob("_C*.so"))
    if not found:
        pytest.skip("trialign._C is not built in this checkout")
    listing = subprocess.run([cuobjdump(), "--list-elf", found[0]], capture_output=True, text=True).stdout
    kernels = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert sorted(re.findall(r"\.(sm_\w+)\.cubin", listing)) == sorted(["sm_80", "sm_90a", "sm_100"] * kernels)
