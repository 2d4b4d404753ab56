"""Building trialign._C and trialign._host: accurate at every SIMD level; without a working compiler, pure Python."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from trialign.kernels import dispatch

ROOT = Path(__file__).resolve().parents[3]
# Ops whose accuracy tests alone run at every SIMD level; those of WHOLE run all their tests of values.
ACCURACY = ["rms_norm", "rope", "swiglu", "logprob", "linear_logprob", "ppo_loss", "moe"]
WHOLE = ["gae", "attention", "paged_attention", "sampling", "adamw", "linear"]


def build(tmp_path: Path, **environment) -> str:
    """Output of `setup.py build_ext` in a copy of the checkout, which succeeds and builds no module."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=sources, dirs_exist_ok=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | environment
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and not list((tmp_path / "csrc").glob("*.so"))
    return result.stderr + result.stdout


def test_missing_or_failing_compiler_installs_pure_python(tmp_path):
    printed = build(tmp_path, PATH=str(tmp_path))
    assert all(f"no C++ compiler here, installing without trialign.{name}" in printed for name in ("_C", "_host"))
    assert "does not compile" in build(tmp_path, CXX="false")


def test_objects_are_kept_apart_by_command_and_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    job = runpy.run_path(str(ROOT / "setup.py"))["job"]
    source, command = tmp_path / "a.cpp", ["g++", "-O3"]
    first = job(tmp_path, "2.13.0", command, source)
    assert first == job(tmp_path, "2.13.0", command, source)
    others = [("2.14.0", command), ("2.13.0", ["clang++", "-O3"]), ("2.13.0", [*command, "-mavx2"])]
    assert first[2] not in [job(tmp_path, *other, source)[2] for other in others]


@pytest.mark.skipif(not dispatch.EXTENSION, reason="trialign._C is not built")
@pytest.mark.parametrize(
    "level, ops", [("baseline", ACCURACY + WHOLE), ("avx2", ACCURACY + WHOLE), ("avx512", ["linear"])]
)
def test_every_simd_level_passes_the_kernel_tests(level, ops):
    """Between AVX-512 with and without products of bf16 only `linear` differs."""
    files = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in ops]
    wanted = " or ".join(["error_against_float64", *(f"test_{name}.py" for name in WHOLE)])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", f"({wanted}) and not past_2_to_the_31"]
    env = os.environ | {"TRIALIGN_KERNELS": level}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:]
