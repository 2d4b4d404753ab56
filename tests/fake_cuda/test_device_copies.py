"""Files of tensors on a device: copied in parts through pinned memory, none of which is read before it has arrived."""

import re
from pathlib import Path

import torch
from fake_ledger import LEDGER
from safetensors.torch import load_file
from trialign.engine.storage import safetensors_io
from trialign.engine.transfer import HostCopy

SHAPES = [(3, 7), (64,), (1,), (0, 4), (5, 33)]


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in SHAPES]


def written(path: Path, waits: bool) -> list[str]:
    """Writes tensors of the fake device in parts of 64 bytes; how the host waited for the device."""
    safetensors_io.PART = 64
    if not waits:
        HostCopy.numpy = lambda self: self._copy.numpy()
    own = [tensor.cuda() for tensor in tensors()]
    LEDGER.clear()
    described = {str(i): (tensor.dtype, tuple(tensor.shape)) for i, tensor in enumerate(own)}
    digest = safetensors_io.write_stream(path, described, own)
    assert digest == safetensors_io.sha256(path)
    return [kind for _, kind, _ in LEDGER.syncs]


def test_tensors_of_a_device_are_written_through_pinned_memory(fake, tmp_path):
    for waits in (True, False):
        (kinds,) = fake.call(written, tmp_path / "file", waits)
        found = load_file(tmp_path / "file")
        equal = [torch.equal(found[str(i)], tensor) for i, tensor in enumerate(tensors())]
        assert all(equal) == waits, "a copy is read before the host has waited for it"
        assert not [kind for kind in kinds if re.search("copy|cpu", kind)], kinds
