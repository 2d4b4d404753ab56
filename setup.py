"""Maps the four folders to trialign.* and builds trialign._C out of csrc/ where a C++ compiler and torch are at hand.

An environment without them gets pure Python: the torch references serve, and kernels/dispatch.py says so once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDERS = ("kernels", "engine", "models", "algorithms")
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# The order is also the link order, and it matters: of an inline function that several levels emit, the linker keeps the
# first, so a lower level never runs into a higher level's instructions.
LEVELS = {
    "baseline": [],
    **({"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]} if X86 else {}),
}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
ABI = "0x020d000000000000"  # torch 2.13, the oldest this extension loads into


def torch_paths() -> tuple[str, Path] | None:
    """(version, folder) of the torch to build against, without importing it; None where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return importlib.metadata.version("torch"), Path(spec.origin).parent


class Build(build_ext):
    """csrc/*.cpp once, csrc/cpu/*.cpp once per SIMD level, linked into one abi3 module."""

    def build_extension(self, ext: Extension) -> None:
        found, compiler = torch_paths(), os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if found is None or compiler is None:
            missing = "torch" if found is None else "C++ compiler"
            print(f"trialign: no {missing} here, installing without trialign._C", file=sys.stderr)
            return
        version, torch = found
        build = Path(self.build_temp).resolve()
        defines = {
            "TORCH_TARGET_VERSION": ABI,
            "TORCH_STABLE_ONLY": None,
            "Py_LIMITED_API": "0x030b0000",
            "TRIALIGN_TORCH": f'"{version}"',
        }
        include = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        common = [compiler, *FLAGS, *(f"-D{k}" + (f"={v}" if v else "") for k, v in defines.items())]
        common += [f"-I{path}" for path in include]
        source_hash = runpy.run_path(str(CSRC / "source_hash.py"))["source_hash"](CSRC)
        headers = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), Path(__file__)])
        jobs: list[tuple[list[str], Path, Path]] = []
        for source in sorted(CSRC.glob("*.cpp")):
            jobs.append(
                (
                    [*common, f'-DTRIALIGN_SOURCES="{source_hash}"'],
                    source,
                    build / f"{source.stem}.{source_hash[:12]}.o",
                )
            )
        for number, (level, flags) in enumerate(LEVELS.items()):
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                jobs.append(
                    ([*common, *flags, f"-DTRIALIGN_LEVEL={number}"], source, build / level / f"{source.stem}.o")
                )

        def compile_one(job: tuple[list[str], Path, Path]) -> None:
            command, source, target = job
            if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime, headers):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            run = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
            sys.stderr.write(run.stderr)
            if run.returncode:
                target.unlink(missing_ok=True)
                raise CompileError(f"{source.name} does not compile: {run.stderr[-2000:]}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked aside and renamed: a process that has the old module open keeps it, and none sees half a file.
        fresh = target.with_suffix(".new")
        link = [
            compiler,
            "-shared",
            "-o",
            str(fresh),
            *(str(job[2]) for job in jobs),
            f"-L{torch / 'lib'}",
            "-ltorch_cpu",
        ]
        subprocess.run(link, check=True)
        os.replace(fresh, target)


packages = find_namespace_packages(include=[pattern for f in FOLDERS for pattern in (f, f"{f}.*")])
setup(
    packages=["trialign", *(f"trialign.{package}" for package in packages)],
    # The namespace's root holds only _C, beside its sources.
    package_dir={"trialign": "csrc", **{f"trialign.{f}": f for f in FOLDERS}},
    include_package_data=False,
    # optional: a compiler that fails (no Python.h, too old) costs the extension, not the installation.
    ext_modules=[Extension("trialign._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
