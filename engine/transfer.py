"""Copies from the host to the device that do not wait for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The numbers on `device`: on CUDA copied from pinned memory, in stream order; on the CPU shared."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """A tensor's copy on the host, started without waiting for the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._done = tensor, None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def numpy(self) -> np.ndarray:
        """The numbers, once the copy has ended."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.numpy()
