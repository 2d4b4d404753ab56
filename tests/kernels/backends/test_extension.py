"""Building trialign._C: every SIMD level obeys the law; a machine without a compiler installs pure Python."""

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
LAWS = ["rms_norm", "rope", "swiglu", "logprob", "linear_logprob", "ppo_loss", "moe"]
WHOLE = ["gae", "attention", "paged_attention", "sampling", "adamw"]


def build(tmp_path: Path, **environment) -> tuple[subprocess.CompletedProcess, list[str]]:
    """`setup.py build_ext` in a copy of the checkout: what it says, and the modules it made."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=sources, dirs_exist_ok=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | environment
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    return result, [path.name for path in (tmp_path / "csrc").glob("*.so")]


def test_without_a_compiler_it_installs_pure_python(tmp_path):
    result, modules = build(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0 and modules == []
    assert "no C++ compiler here, installing without trialign._C" in result.stderr


def test_a_compiler_that_fails_costs_the_extension_only(tmp_path):
    result, modules = build(tmp_path, CXX="false")
    assert result.returncode == 0 and modules == []
    assert "does not compile" in result.stderr + result.stdout


def test_objects_of_another_command_or_torch_are_not_taken_for_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    job = runpy.run_path(str(ROOT / "setup.py"))["job"]
    source, command = tmp_path / "a.cpp", ["g++", "-O3"]
    ours = job(tmp_path, "2.13.0", command, source)
    assert ours == job(tmp_path, "2.13.0", command, source)
    others = [("2.14.0", command), ("2.13.0", ["clang++", "-O3"]), ("2.13.0", [*command, "-mavx2"])]
    assert ours[2] not in [job(tmp_path, *other, source)[2] for other in others]


@pytest.mark.skipif(not dispatch.EXTENSION, reason="trialign._C is not built")
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_simd_level_passes_the_kernel_tests(level):
    """The law alone of LAWS, whose tests have that name, and all of WHOLE but what takes long and tests no numbers."""
    files = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in (*LAWS, *WHOLE)]
    wanted = " or ".join(["law", *(f"test_{name}.py" for name in WHOLE)])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", f"({wanted}) and not opcheck and not past_2_to_the_31 and not gradients"]
    env = os.environ | {"TRIALIGN_KERNELS": level}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:]
