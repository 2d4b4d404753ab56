"""Prints, as Markdown, what the compilers make of every Triton kernel: `python tests/aot/kernel_report.py`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from aot_compile import TARGETS, compile_kernel
from kernel_table import configs, specs


def cell(job) -> str:
    """registers / spilled / shared KB of the config that takes most registers."""
    spec, arch = job
    reports = [compile_kernel(spec, config, arch) for config in configs(spec, arch)]
    worst = max(reports, key=lambda r: r.registers)
    return f"{worst.registers} / {max(r.spilled for r in reports)} / {max(r.shared for r in reports) / 1024:.0f}"


def main() -> None:
    """One row a kernel, one column an architecture."""
    table = list(specs())
    print("Registers a thread / spilled / shared memory in KB, the largest of the kernel's configs.\n")
    print("| kernel | configs |", " | ".join(TARGETS), "| traffic |")
    print("| --- " * (len(TARGETS) + 3) + "|")
    with ThreadPoolExecutor(2) as pool:
        cells = pool.map(cell, [(spec, arch) for _, spec in table for arch in TARGETS])
        for name, spec in table:
            row = [next(cells) for _ in TARGETS]
            print(f"| {name} | {len(spec.configs)} |", " | ".join(row), f"| {spec.traffic} |", flush=True)


if __name__ == "__main__":
    main()
