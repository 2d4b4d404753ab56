"""Whether the CUDA C++ of trialign._C serves: decided once, at the first CUDA tensor, by a probe launch."""

from __future__ import annotations

import importlib

import torch


def why_unfit(runtime: str, archs: str, torch_cuda: str | None, capability: tuple[int, int]) -> str | None:
    """Reason why kernels built with CUDA `runtime` for `archs` ("80;90a;100") are not launched beside a torch built
    with `torch_cuda` on a device of compute capability `capability`; None where nothing speaks against it.

    A binary runs on its own major version's later minor ones ("90a": on 9.0 alone); the last architecture is there as
    PTX too, which a driver compiles for whatever is newer.
    """
    if torch_cuda is None:
        return "torch was built without CUDA"
    if runtime.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"built with CUDA {runtime}, torch with CUDA {torch_cuda}"
    major, minor = capability
    for arch in archs.split(";"):
        number = int(arch.rstrip("af"))
        exact = arch[-1] in "af"
        if number // 10 == major and (number % 10 == minor if exact else number % 10 <= minor):
            return None
    last = archs.split(";")[-1]
    if last.isdigit() and capability >= divmod(int(last), 10):
        return None
    return f"built for sm_{', sm_'.join(archs.split(';'))}, the GPU is sm_{major}{minor}"


def cuda_cpp_problem() -> str | None:
    """None if the kernels run on the current device, else the reason: facts first, then the probe launch."""
    module = importlib.import_module("trialign._C")
    if not hasattr(module, "cuda_problem"):
        return "built without nvcc"
    facts = why_unfit(module.cuda_runtime, module.cuda_archs, torch.version.cuda, torch.cuda.get_device_capability())
    return facts or module.cuda_problem()


def register_cuda_cpp() -> None:
    """Registers the CUDA C++ implementations with torch."""
    importlib.import_module("trialign._C").register_cuda()
