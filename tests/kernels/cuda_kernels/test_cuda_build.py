"""The CUDA C++ part of trialign._C as nvcc builds it: no spills, every architecture; the probe that decides over it."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from trialign.kernels import dispatch
from trialign.kernels.backends.cuda_cpp import why_unfit

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc")
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


@pytest.mark.parametrize(
    "runtime, archs, torch_cuda, capability, reason",
    [
        ("12.8", "80;90a;100", "12.6", (8, 0), None),
        ("12.8", "80;90a;100", "12.6", (8, 9), None),  # a later minor version
        ("12.8", "80;90a;100", "12.6", (9, 0), None),
        ("12.8", "80;90a;100", "12.6", (10, 3), None),
        ("12.8", "80;90a;100", "12.6", (12, 0), None),  # PTX of sm_100
        ("13.0", "80;90a;100", "12.6", (8, 0), "built with CUDA 13.0, torch with CUDA 12.6"),
        ("12.8", "80;90a;100", "13.0", (8, 0), "built with CUDA 12.8, torch with CUDA 13.0"),
        ("12.8", "80;90a;100", None, (8, 0), "torch was built without CUDA"),
        ("12.8", "80;90a;100", "12.6", (7, 5), "built for sm_80, sm_90a, sm_100, the GPU is sm_75"),
        ("12.8", "90a", "12.6", (10, 0), "built for sm_90a, the GPU is sm_100"),
        ("12.8", "86", "12.6", (8, 0), "built for sm_86, the GPU is sm_80"),
    ],
)
def test_reasons_against_a_build(runtime, archs, torch_cuda, capability, reason):
    assert why_unfit(runtime, archs, torch_cuda, capability) == reason


DECIDE = """
import sys, warnings
import torch
torch.cuda.is_available, torch.version.cuda = (lambda: True), "13.0"
from trialign.kernels import dispatch, logprob, moe
problem = eval(sys.argv[1])
registered = []
dispatch.cuda_cpp_problem, dispatch.register_cuda_cpp = (lambda: problem), (lambda: registered.append("C++"))
impl = torch.library.impl
torch.library.impl = lambda name, key: registered.append((name.split("::")[1], key)) or impl(name, key)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        dispatch._choice("logprob_stats", "cuda", torch.float32)
        dispatch._choice("sort_by_expert", "cuda", torch.int64)
print(sorted(map(str, registered)), [str(w.message) for w in caught], dispatch.has_cuda("sort_by_expert"))
"""


@pytest.mark.skipif(not dispatch.EXTENSION, reason="no extension")
def test_triton_serves_where_the_probe_fails():
    pytest.importorskip("triton")

    def decide(problem: str | None) -> str:
        run = subprocess.run([sys.executable, "-c", DECIDE, repr(problem)], capture_output=True, text=True, check=True)
        return run.stdout

    assert decide(None).startswith("['C++'] []")
    failed = decide("no kernel image is available")
    assert all(f"('{op}', 'CUDA')" in failed for op in dispatch.CUDA_CPP) and "C++']" not in failed
    assert failed.count("no kernel image is available") == 1 and failed.rstrip().endswith("True")


@needs_cuda_ops
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_probe_reports_the_error_of_cuda():
    module = importlib.import_module("trialign._C")
    assert re.search("driver|device", module.cuda_problem())
    assert re.fullmatch(r"\d+\.\d+", module.cuda_runtime) and module.cuda_archs


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_runtime_is_torchs_where_the_versions_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    script = runpy.run_path(str(ROOT / "setup.py"))
    cuda = script["Cuda"](NVCC)
    cuda.home, cuda.version = tmp_path, "12.8"
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart.so").touch()
    for torch_cuda, shared in (("12.6", True), ("13.0", False), ("", False)):
        flags = cuda.link_flags(torch_cuda)
        assert ("-lcudart" in flags, "-lcudart_static" in flags) == (shared, not shared)
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '12.6'\n")
    assert script["torch_cuda"](tmp_path) == "12.6"
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert script["torch_cuda"](tmp_path) == ""
