"""The CUDA C++ kernels on the CPU: built as C++ under tests/emu/cuda_emu.h, their results held to the law, also under
address and undefined-behaviour sanitizers, which planted faults prove to be awake."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_law import assert_law
from trialign.kernels import gae as G
from trialign.kernels import logprob as P
from trialign.kernels import rms_norm as N

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or ""
pytestmark = pytest.mark.skipif(not COMPILER, reason="no g++")
SANITIZERS = os.environ.get("EMU_SANITIZE")  # set in the process that the sanitizer test starts
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = 1e-5


def build(folder: Path, *flags: str, edit: tuple[str, str, str] | None = None) -> Path:
    """csrc/cuda as one shared library for the CPU; `edit` (file, old, new) plants a fault."""
    (folder / "cuda").mkdir(exist_ok=True)
    shutil.copy(ROOT / "csrc" / "common.cuh", folder)
    sources = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        text = source.read_text()
        if edit and edit[0] == source.name:
            assert edit[1] in text, "the planted fault no longer fits the source"
            text = text.replace(edit[1], edit[2])
        sources.append(folder / "cuda" / source.name)
        sources[-1].write_text(text)
    library = folder / "emulated.so"
    command = [COMPILER, "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-w", f"-I{ROOT / 'tests' / 'emu'}", *flags]
    subprocess.run([*command, "-x", "c++", *sources, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    path = os.environ.get("EMU_LIBRARY") or build(tmp_path_factory.mktemp("emu"))
    return ctypes.CDLL(str(path))


def call(function, *arguments):
    """Tensors as pointers, None as null, int and float as the kernel's int64_t and float (the first int: the dtype)."""
    passed = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            passed.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            passed.append(ctypes.c_float(argument))
        elif argument is None:
            passed.append(ctypes.c_void_p(None))
        else:
            passed.append(ctypes.c_int64(argument))
    assert function(*passed, ctypes.c_void_p(None)) == 0


def graded(fn, dtype, inputs, upstream):
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    arriving = [u.to(out.dtype) for u, out in zip(upstream, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, arriving)]


def law(ours, fn, inputs, upstream):
    eager, exact = (graded(fn, dtype, inputs, upstream) for dtype in (inputs[0].dtype, torch.float64))
    for place, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_law(a, b.detach(), c.detach(), f"result {place}")


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("n,h", [(1, 1), (3, 70), (17, 576)])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(kernels, n, h, add, dtype):
    torch.manual_seed(h)
    x, residual, g, through = (torch.randn(n, h).to(dtype) for _ in range(4))
    weight = torch.randn(h).to(dtype)
    y, total, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(n)
    plus = (residual, total) if add else (None, None)
    call(kernels.launch_rms_norm, NUMBERS[dtype], x, plus[0], weight, y, plus[1], rstd, n, h, EPS)
    normed = total if add else x
    kernels.rms_norm_blocks.restype = ctypes.c_int64
    grad_x, partial = torch.empty_like(x), torch.full((kernels.rms_norm_blocks(ctypes.c_int64(n)), h), torch.nan)
    through = through if add else None
    call(kernels.launch_rms_norm_backward, NUMBERS[dtype], g, normed, weight, rstd, through, grad_x, partial, n, h)
    grad_weight = partial.sum(0).to(dtype)
    if add:
        fn = lambda x, r, w: N.add_rms_norm_ref(x, r, w, EPS)  # noqa: E731
        law((y, total, grad_x, grad_x, grad_weight), fn, (x, residual, weight), [g, through])
    else:
        law((y, grad_x, grad_weight), lambda x, w: N.rms_norm_ref(x, w, EPS), (x, weight), [g])


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("n,v,shift", [(1, 1, 0.0), (3, 1000, 0.0), (2, 4099, 0.0), (2, 3000, 1e4)])
def test_logprob(kernels, n, v, shift, dtype):
    torch.manual_seed(v)
    logits, labels, scale = (torch.randn(n, v) * 3 + shift).to(dtype), torch.randint(0, v, (n,)), 1.0 if shift else 0.7
    g, ge = torch.randn(n), torch.randn(n)
    stats = torch.zeros(4, n)
    stats[0] = -torch.inf
    half = v // 2  # two pieces of the vocabulary, the second at an address that is not a multiple of 16
    for start, end in ((0, half), (half, v)):
        if end > start:
            piece = (logits[:, start:], labels, n, end - start, v, start, scale)
            call(kernels.launch_logprob_update, NUMBERS[dtype], stats, *piece)
    out = torch.empty_like(logits)
    call(kernels.launch_logprob_backward, NUMBERS[dtype], logits, out, labels, stats, g, ge, n, v, v, 0, scale)
    law((*P.finish(stats), out), lambda x: P.logprob_ref(x, labels, scale), (logits,), [g, ge])
    only = torch.empty_like(logits)
    call(kernels.launch_logprob_backward, NUMBERS[dtype], logits, only, labels, stats, None, ge, n, v, v, 0, scale)
    torch.testing.assert_close(only, P.gradient_ref(logits, labels, stats, None, ge, scale, 0), rtol=2e-2, atol=1e-4)
    call(kernels.launch_logprob_backward, NUMBERS[dtype], logits, logits, labels, stats, g, ge, n, v, v, 0, scale)
    assert torch.equal(out, logits)


def test_logprob_extremes(kernels):
    logits = torch.randn(4, 900)
    logits[0, 100:700] = -torch.inf
    logits[1] = torch.nan
    logits[2, 5] = torch.nan
    logits[3] = -torch.inf
    stats = torch.zeros(4, 4)
    stats[0] = -torch.inf
    labels = torch.zeros(4, dtype=torch.long)
    call(kernels.launch_logprob_update, 0, stats, logits, labels, 4, 900, 900, 0, 1.0)
    logp, entropy = P.finish(stats)
    assert logp.isfinite().tolist() == entropy.isfinite().tolist() == [True, False, False, False]
    torch.testing.assert_close(stats[:3, 0], P.stats_ref(logits[:1], labels[:1], 1.0, 0)[:3, 0])
    assert stats[1, 3] == 0  # a shard of padding adds nothing


@pytest.mark.parametrize("lengths", [[5, 0, 1, 40, 32], [64, 33, 100]])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_gae(kernels, lengths, kept):
    torch.manual_seed(0)
    cu_seqlens, total = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    rewards, values, mask = torch.randn(total), torch.randn(total), torch.rand(total) < kept
    values[~mask] = torch.nan
    ours = torch.empty(total), torch.empty(total)
    call(kernels.launch_gae, rewards, values, mask, cu_seqlens, *ours, len(lengths), 0.99, 0.95)
    eager = G.gae_ref(rewards, values, mask, cu_seqlens, 0.99, 0.95)
    exact = G.gae_ref(rewards.double(), values.double(), mask, cu_seqlens, 0.99, 0.95)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_law(a, b, c)


def sanitized(library: Path, what: str) -> subprocess.CompletedProcess:
    """This file's tests on `library` in a process that has the sanitizers' runtime."""
    runtime = [
        subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = os.environ | {
        "EMU_SANITIZE": "1",
        "EMU_LIBRARY": str(library),
        "EMU_SEED": "7",
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", "-k", what, __file__]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.mark.skipif(SANITIZERS is not None, reason="already sanitized")
def test_under_sanitizers_in_shuffled_order(tmp_path):
    result = sanitized(build(tmp_path, *ASAN), "rms_norm or logprob or gae")
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


FAULTS = [
    ("gae_kernel.cu", "const bool here = token >= start", "const bool here = true", "gae", "AddressSanitizer|FAILED"),
    ("rms_norm_kernel.cu", "j < h; j += threads) put(y", "j <= h; j += threads) put(y", "rms_norm", "AddressSanitizer"),
    ("logprob_kernel.cu", "packable(x) ? v / size : 0", "v / size", "logprob", "misaligned"),
    ("logprob_kernel.cu", "if (threadIdx.x != 0) return;\n", "", "logprob", "FAILED"),
]


@pytest.mark.skipif(SANITIZERS is not None, reason="already sanitized")
@pytest.mark.parametrize("file, old, new, what, sign", FAULTS)
def test_a_planted_fault_is_caught(tmp_path, file, old, new, what, sign):
    result = sanitized(build(tmp_path, *ASAN, edit=(file, old, new)), what)
    assert result.returncode != 0
    assert any(word in result.stdout + result.stderr for word in sign.split("|")), result.stdout[-2000:]
