"""CUDA C++ kernels run on the CPU (tests/kernels/emu) under address, undefined-behavior and thread sanitizers.

Faults planted in the kernels prove that each sanitizer, and each check of the emulator, would report them.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emu_build import ASAN, COMPILER, KERNELS, TSAN, compile_all, compile_kernel, link

pytestmark = pytest.mark.skipif(not COMPILER, reason="no g++")
FLAGS = {"asan": ASAN, "tsan": TSAN}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """objects(sanitizer): {kernel: object}, compiled once."""
    return functools.cache(lambda sanitizer: compile_all(tmp_path_factory.mktemp(sanitizer), FLAGS[sanitizer]))


def run(driver: Path, *names: str) -> subprocess.CompletedProcess:
    """The driver without address randomization, under which ThreadSanitizer may fail, in shuffled order."""
    settings = {"EMU_SEED": "7", "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*([shutil.which("setarch") or "", "-R"] if shutil.which("setarch") else []), str(driver), *names]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_every_kernel_passes_the_sanitizers(objects, tmp_path, sanitizer):
    driver = link(objects(sanitizer), tmp_path / "driver", FLAGS[sanitizer])
    result = run(driver)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-3000:]


RACE, BOUNDS, ALIGNMENT = "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow", "misaligned address"
BARRIER, EXITED = "__syncthreads reached by only part of the block", "warp collective names an exited lane"
# (expected message, kernel, file, code, the fault in its place)
FAULTS = [
    (RACE, "logprob", "logprob_kernel.cu", "threadIdx.x >> 5] = all;\n  __syncthreads();", "threadIdx.x >> 5] = all;"),
    (RACE, "moe", "moe_kernel.cu", "hits[e] = 0;\n  __syncthreads();", "hits[e] = 0;"),
    (RACE, "moe", "moe_kernel.cu", "= first + 32 * r;\n    __syncwarp();", "= first + 32 * r;"),
    (BOUNDS, "logprob", "logprob_kernel.cu", "threadIdx.x; j < v; j += threads", "threadIdx.x; j <= v; j += threads"),
    (BOUNDS, "moe", "moe_kernel.cu", "i < chunk && first + i < slots", "i < chunk"),
    (ALIGNMENT, "logprob", "logprob_kernel.cu", "packable(x) ? v / size : 0", "v / size"),
    (BARRIER, "moe", "moe_kernel.cu", "const int e = base + tid;", "const int e = base + tid; if (tid >= 64) return;"),
    (EXITED, "moe", "moe_kernel.cu", "const unsigned peers =", "if (lane >= 16) return; const unsigned peers ="),
]


@pytest.mark.parametrize("message, kernel, file, old, new", FAULTS)
def test_planted_faults_are_reported(objects, tmp_path, message, kernel, file, old, new):
    sanitizer = "tsan" if message == RACE else "asan"
    source = next(path for path in KERNELS if path.stem == f"{kernel}_kernel")
    faulty = compile_kernel(source, tmp_path / "faulty.o", FLAGS[sanitizer], {file: (old, new)})
    driver = link(objects(sanitizer) | {source.stem: faulty}, tmp_path / "driver", FLAGS[sanitizer])
    result = run(driver, kernel)
    assert result.returncode != 0 and message in result.stderr, (result.stdout + result.stderr)[-2000:]


def test_every_kernel_has_planted_faults():
    assert {kernel for _, kernel, *_ in FAULTS} == {path.stem.removesuffix("_kernel") for path in KERNELS}
