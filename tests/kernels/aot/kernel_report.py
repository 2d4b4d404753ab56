"""Registers, spills and traffic of every kernel, as Markdown: `make kernel-report`; --write updates docs/kernels.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import trialign.kernels
import triton

SUPPORT = Path(__file__).resolve().parents[2] / "support" / "kernels"
sys.path.append(str(SUPPORT))

from aot_compile import compile_kernel  # noqa: E402
from launches import ARCHITECTURES, label, specs, variants  # noqa: E402

PAGE = SUPPORT.parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- report -->\n", "<!-- /report -->\n"


def cell(job) -> str:
    """registers / spilled / shared KB, and the matrix instruction where there is a dot."""
    spec, config, arch = job
    report = compile_kernel(spec, config, arch)
    figures = f"{report.registers} / {report.spilled} / {report.shared / 1024:.0f}"
    return f"{figures} {report.matrix}".rstrip() if spec.dot else figures


def triton_report() -> str:
    """A table of every config on every architecture."""
    rows = [(name, *variant) for name, spec in specs() for variant in variants(spec)]
    head = " | ".join(ARCHITECTURES)
    lines = [f"| kernel | config | {head} |", "| --- " * (2 + len(ARCHITECTURES)) + "|"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [(spec, configs[arch], arch) for _, spec, configs in rows for arch in ARCHITECTURES]
        cells = pool.map(cell, jobs)
        for name, spec, configs in rows:
            kind = "" if "*bf16" in spec.signature.values() or not spec.dot else "fp32: "
            figures = " | ".join(next(cells) for _ in ARCHITECTURES)
            lines.append(f"| {name} | {kind}{label(configs)} | {figures} |")
    return "\n".join(lines)


def traffic_report() -> str:
    """Table of tests/support/kernels/traffic.py, from a process of its own, as the interpreter needs."""
    command = [sys.executable, str(SUPPORT / "traffic.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def cuda_report() -> str:
    """Registers, stack and static shared memory of the CUDA C++ kernels in this checkout's trialign._C."""
    found = [path for folder in trialign.__path__ for path in Path(folder).glob("_C*.so")]
    if not found:
        return "trialign._C is not built here."
    listing = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(found[0])], capture_output=True, text=True
    ).stdout
    kernels: dict[str, dict[str, str]] = {}
    arch = ""
    for line in listing.splitlines():
        arch = next(iter(re.findall(r"^arch = (\S+)", line)), arch)
        if name := re.search(r"Function (\S+):", line):
            current = name[1]
        if usage := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernels.setdefault(current, {})[arch] = " / ".join(usage.groups())
    if not kernels:
        return "trialign._C was built without nvcc here."
    names = list(kernels)
    if filt := shutil.which("c++filt"):
        names = subprocess.run([filt, *kernels], capture_output=True, text=True).stdout.splitlines()
    archs = sorted({arch for usages in kernels.values() for arch in usages}, key=lambda a: (len(a.rstrip("a")), a))
    lines = [f"| kernel | {' | '.join(archs)} |", "| --- " * (1 + len(archs)) + "|"]
    short = [
        f"{re.findall(r'_([a-z_]+)_kernel_cu_', mangled)[-1].lstrip('_')}: "
        + re.sub(r"\(anonymous namespace\)::|\(.*$|^void ", "", name)
        for mangled, name in zip(kernels, names, strict=True)
    ]
    for name, usages in sorted(zip(short, kernels.values(), strict=True), key=lambda pair: pair[0]):
        lines.append(f"| {name} | {' | '.join(usages.get(arch, '-') for arch in archs)} |")
    return "\n".join(lines)


def report() -> str:
    """The whole report."""
    return (
        "Bytes per element, counted under the interpreter: what programs load and store (lanes of one load that share\n"
        "an address count once), caches left out of account; and the same with each\n"
        "address loaded once and stored once.\n\n"
        f"{traffic_report()}\n\n"
        f"By Triton {triton.__version__}: registers a thread / bytes spilled / KB of shared memory, and the matrix\n"
        "instruction where there is a dot.\n\n"
        f"{triton_report()}\n\n"
        "CUDA C++, out of the built `trialign._C`: registers a thread / bytes of stack, where spills would be /\n"
        f"bytes of static shared memory.\n\n{cuda_report()}\n"
    )


if __name__ == "__main__":
    text = report()
    print(text)
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text()
        head, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
