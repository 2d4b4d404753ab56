"""Maps the four folders to trialign.*; builds trialign._C and trialign._host out of csrc/ where compiler and torch are.

Where nvcc is found (on PATH or as NVCC) the CUDA kernels of csrc/cuda go into the same module, beside a CPU torch too;
TRIALIGN_CUDA_ARCHS changes the architectures, TRIALIGN_CUDA=0 leaves them out.

Without compiler or torch it installs pure Python: the torch references run, and kernels/dispatch.py warns once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDERS = ("kernels", "engine", "models", "algorithms")
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
# The order is also the link order, and it matters: of an inline function that several levels emit, the linker keeps the
# first, so a lower level never runs into a higher level's instructions.
LEVELS = {
    "baseline": [],
    **({"avx2": ["-march=x86-64-v3"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]} if X86 else {}),
}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
ABI = "0x020d000000000000"  # torch 2.13, the oldest this extension loads into


def torch_paths() -> tuple[str, Path] | None:
    """(version, folder) of the torch to build against, without importing it; None where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return importlib.metadata.version("torch"), Path(spec.origin).parent


class Cuda:
    """The nvcc at hand and how to use it."""

    def __init__(self, nvcc: str):
        self.nvcc = nvcc
        # nvcc itself knows where its toolkit is; a wrapper script on PATH does not show it.
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        found = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
        self.home = Path(found[1]).resolve() if found else Path(nvcc).resolve().parent.parent
        release = re.search(
            r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        )
        self.version = release[1] if release else ""
        self.archs = os.environ.get("TRIALIGN_CUDA_ARCHS", "80;90a;100")

    @classmethod
    def find(cls) -> Cuda | None:
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        return cls(nvcc) if nvcc and os.environ.get("TRIALIGN_CUDA", "1") != "0" else None

    def compile_command(self) -> list[str]:
        archs = self.archs.split(";")
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        # A kernel that spills registers fails the build.
        return [self.nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-warn-spills,-Werror", *targets]

    def link_flags(self, torch_cuda: str) -> list[str]:
        """torch's own runtime, loaded before trialign._C, where it has nvcc's major version; else a static one, which
        kernels/backends/cuda_cpp.py refuses to use beside a torch of another."""
        folders = [f"-L{self.home / 'lib64'}", f"-L{self.home / 'lib'}"]
        shared = any((self.home / lib / "libcudart.so").exists() for lib in ("lib64", "lib"))
        if shared and torch_cuda.partition(".")[0] == self.version.partition(".")[0]:
            return [*folders, "-lcudart"]
        return [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def torch_cuda(torch: Path) -> str:
    """The CUDA version that torch was built with, from its version.py; empty for its CPU build."""
    found = re.search(r"^cuda[^=]*= '([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else ""


Job = tuple[list[str], Path, Path]
"""(compiler and flags, source, object)."""


def job(build: Path, torch_version: str, command: list[str], source: Path) -> Job:
    """The object lies in a folder of its own for every command and torch, so that no other's is taken for it."""
    key = hashlib.sha256("\0".join([torch_version, *command]).encode()).hexdigest()[:12]
    return command, source, build / key / f"{source.stem}.o"


def compile_all(jobs: list[Job]) -> list[Path]:
    """Compiles what is older than its source or any header, all cores at once. Returns the objects; CompileError."""
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), ROOT / "setup.py"]
    newest = max(path.stat().st_mtime for path in headers)

    def compile_one(one: Job) -> Path:
        command, source, target = one
        if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime, newest):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        run = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        sys.stderr.write(run.stderr)
        if run.returncode:
            target.unlink(missing_ok=True)
            raise CompileError(f"{source.name} does not compile: {run.stderr[-2000:]}")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


class Build(build_ext):
    """_C: csrc/*.cpp once, csrc/cpu/*.cpp once per SIMD level, csrc/cuda/*.cu by nvcc, linked into one abi3 module.
    _host: csrc/host/*.cpp, by the pybind11 in torch."""

    def build_extension(self, ext: Extension) -> None:
        found, compiler = torch_paths(), os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if found is None or compiler is None:
            missing = "torch" if found is None else "C++ compiler"
            print(f"trialign: no {missing} here, installing without {ext.name}", file=sys.stderr)
            return
        version, torch = found
        build = Path(self.build_temp).resolve()
        include = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        common = [compiler, *FLAGS, *(f"-I{path}" for path in include)]
        source_hash = runpy.run_path(str(CSRC / "source_hash.py"))["source_hash"](CSRC)
        facts = [f'-DTRIALIGN_SOURCES="{source_hash}"', f'-DTRIALIGN_TORCH="{version}"']
        if ext.name == "trialign._host":
            sources = sorted((CSRC / "host").glob("*.cpp"))
            self.link(ext, compiler, compile_all([job(build, version, [*common, *facts], cpp) for cpp in sources]))
            return
        cuda, kernels = Cuda.find(), []
        if cuda:
            sources = sorted((CSRC / "cuda").glob("*.cu"))
            try:
                kernels = compile_all([job(build, version, cuda.compile_command(), cu) for cu in sources])
            except CompileError as error:  # an nvcc too old for an architecture, say
                print(f"trialign: no CUDA kernels in trialign._C: {error}", file=sys.stderr)
                cuda = None
        common += [f"-DTORCH_TARGET_VERSION={ABI}", "-DTORCH_STABLE_ONLY"]
        facts += ["-DPy_LIMITED_API=0x030b0000"]
        if cuda:
            facts += [
                "-DTRIALIGN_CUDA",
                f'-DTRIALIGN_CUDA_RUNTIME="{cuda.version}"',
                f'-DTRIALIGN_CUDA_ARCHS="{cuda.archs}"',
            ]
        jobs: list[Job] = [job(build, version, [*common, *facts], source) for source in CSRC.glob("*.cpp")]
        for number, flags in enumerate(LEVELS.values()):
            command = [*common, *flags, f"-DTRIALIGN_LEVEL={number}"]
            jobs += [job(build, version, command, cpp) for cpp in sorted((CSRC / "cpu").glob("*.cpp"))]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", *(cuda.link_flags(torch_cuda(torch)) if cuda else [])]
        self.link(ext, compiler, [*compile_all(jobs), *kernels], libraries)

    def link(self, ext: Extension, compiler: str, objects: list[Path], libraries: Sequence[str] = ()) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked aside and renamed: a process that has the old module open keeps it, and none sees half a file.
        fresh = target.with_suffix(".new")
        subprocess.run([compiler, "-shared", "-o", str(fresh), *map(str, objects), *libraries], check=True)
        os.replace(fresh, target)


packages = find_namespace_packages(include=[pattern for f in FOLDERS for pattern in (f, f"{f}.*")])
setup(
    packages=["trialign", *(f"trialign.{package}" for package in packages)],
    # The namespace's root holds only _C and _host, beside their sources.
    package_dir={"trialign": "csrc", **{f"trialign.{f}": f for f in FOLDERS}},
    include_package_data=False,
    # optional: a compiler that fails (no Python.h, too old) costs the extension, not the installation.
    ext_modules=[
        Extension("trialign._C", sources=[], py_limited_api=True, optional=True),
        Extension("trialign._host", sources=[], optional=True),  # of one Python version: pybind11 has no stable ABI
    ],
    cmdclass={"build_ext": Build},
)
