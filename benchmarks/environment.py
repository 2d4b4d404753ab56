"""Versions, device and the implementation of every op, as one JSON object in the last line.

    python benchmarks/environment.py --device cuda

Exit code 1, with the reason, where torch does not see the device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import platform
import re
import subprocess
from dataclasses import dataclass
from typing import Any, Literal

import torch
import trialign.kernels
import tyro
from trialign.engine.memory import gibibytes, usage_of
from trialign.kernels import dispatch

PACKAGES = ("triton", "transformers", "flash_attn", "flash_attn_3", "apex", "transformer_engine", "vllm", "numpy")


@dataclass(frozen=True)
class Environment:
    device: Literal["cuda", "cpu"] = "cuda"


def implementations(key: str) -> dict[str, str]:
    """Op -> where its implementation for a dispatch key comes from."""
    for module in pkgutil.iter_modules(trialign.kernels.__path__):
        importlib.import_module(f"trialign.kernels.{module.name}")
    found = {}
    for op in sorted(name for name in dir(torch.ops.trialign) if not name.startswith("_") and name != "name"):
        text = torch._C._dispatch_dump(f"trialign::{op}")
        place = re.search(rf"^{key}: registered at (\S+?):\d+", text, re.M)
        found[op] = "torch reference" if place is None else "Triton" if place[1].endswith(".py") else "trialign._C"
    return found


def versions() -> dict[str, str]:
    """Installed packages of those that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """Version of NVIDIA's driver; empty without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def main(given: Environment) -> None:
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"error: device=cuda: torch {torch.__version__} sees no CUDA device; allowed here: cpu")
    device = torch.device(given.device)
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, **versions()}
    facts |= {"threads": torch.get_num_threads(), "trialign._C": dispatch.PROBLEM or "usable"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}
        facts |= {"multiprocessors": properties.multi_processor_count, "devices": torch.cuda.device_count()}
        facts |= {"cuda": torch.version.cuda, "driver": driver(), "torch_architectures": torch.cuda.get_arch_list()}
        facts["allocator"] = torch._C._accelerator_getAllocatorSettings()
    else:
        facts["device"] = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    usage = usage_of(device)
    facts["memory"] = f"{gibibytes(usage.free)} free of {gibibytes(usage.total)}"
    print(json.dumps(facts | {"implementations": implementations(device.type.upper())}))


if __name__ == "__main__":
    main(tyro.cli(Environment, description=__doc__))
