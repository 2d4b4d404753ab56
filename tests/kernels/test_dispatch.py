"""Choice of implementation by device, dtype and TRIALIGN_KERNELS; missing and stale extensions."""

import os
import subprocess
import sys

import pytest
import torch
from trialign.kernels import dispatch
from trialign.kernels.backends import extension
from trialign.kernels.backends.schemas import SCHEMAS

PRINT = "import trialign.kernels.dispatch as d, torch; print(d.choose('gae', torch.zeros(1)))"


def run(mode: str | None, script: str = PRINT, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRIALIGN_KERNELS"}
    env |= ({"TRIALIGN_KERNELS": mode} if mode else {}) | environment
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)


def test_choice_by_device_and_dtype():
    built = dispatch.has_op("gae")
    assert dispatch.choose("gae", torch.zeros(1)) == ("cpp" if built else "reference")
    assert dispatch.choose("gae", torch.zeros(1, dtype=torch.float64)) == "reference"
    assert dispatch.choose("gae", torch.zeros(1, device="meta")) == ("cpp" if built else "triton")
    assert dispatch.choose("no_such_op", torch.zeros(1)) == "reference"


def test_environment_variable_chooses_the_references_and_is_checked():
    result = run("reference")
    assert result.stdout == "reference\n" and result.stderr == ""
    result = run("fast")
    assert result.returncode != 0 and "TRIALIGN_KERNELS='fast'" in result.stderr
    assert ", ".join(dispatch.MODES) in result.stderr


needs_extension = pytest.mark.skipif(not dispatch.EXTENSION, reason="trialign._C is not built")
needs_triton = pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed")


@needs_extension
@pytest.mark.parametrize("level, allowed", [("baseline", ["baseline"]), ("avx2", ["avx2", "baseline"])])
def test_lower_simd_level_is_used(level, allowed):
    """A machine below the requested level uses its own."""
    script = "import trialign.kernels.dispatch, trialign._C as c; print(c.simd_level)"
    assert run(level, script).stdout.strip() in allowed


HIDE = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "trialign._C" else find(name, *rest)
"""


def test_missing_extension_warns_once_on_one_rank():
    result = run(None, HIDE + PRINT + "; import trialign.kernels.gae, trialign.kernels.logprob")
    assert result.stdout == "reference\n" and result.stderr.count("trialign._C is not built") == 1
    assert run(None, HIDE + PRINT, RANK="3").stderr == ""


ALL_OPS = """
import importlib, pathlib, torch, trialign.kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels import dispatch
from trialign.kernels.backends.schemas import SCHEMAS
for folder in trialign.kernels.__path__:
    for path in pathlib.Path(folder).glob("*.py"):
        importlib.import_module(f"trialign.kernels.{path.stem}")
with FakeTensorMode():
    on = lambda *shape, **kind: torch.empty(*shape, device="cuda", **kind)
    print([op for op in SCHEMAS if dispatch.choose(op, on(2)) != "triton"])
    from trialign.kernels.moe import permute, route, sort_by_expert, unpermute
    weights, experts = route(on(6, 5, dtype=torch.float16), 2)
    order, offsets = sort_by_expert(experts, 5)
    out = unpermute(permute(on(6, 8), order, 2), order, weights)
    print(out.shape, out.device, offsets.shape)
print(dispatch.choose("gae", torch.zeros(1)), dispatch.EXTENSION)
"""


@needs_triton
def test_triton_runs_on_cuda_without_the_extension():
    result = run(None, HIDE + ALL_OPS)
    assert result.stdout == "[]\ntorch.Size([6, 8]) cuda:0 torch.Size([6])\nreference False\n", result.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("mode, expected", [("auto", "triton"), ("reference", "reference")])
def test_interpreted_triton_takes_cpu_tensors(mode, expected):
    assert run(mode, "import trialign.kernels.gae\n" + PRINT, TRITON_INTERPRET="1").stdout == f"{expected}\n"


@needs_extension
def test_schemas_equal_those_of_the_extension():
    for op, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.trialign, op).default._schema) == f"trialign::{op}{schema}"


@needs_extension
def test_stale_extension_does_not_register_its_ops():
    stale = "import trialign.source_hash as s; s.source_hash = lambda folder: 'other'\n"
    script = "import trialign.kernels.dispatch as d, torch, sys; print(d.EXTENSION, 'trialign._C' in sys.modules)"
    result = run(None, stale + script)
    assert result.stdout == "False False\n" and "other sources" in result.stderr


def test_stale_sources_and_another_torch_are_reported(tmp_path):
    def reason(built, version=str(torch.__version__)):
        return extension.why_unusable(built, version, tmp_path)

    assert reason("any") is None  # an installed wheel, without sources
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "op.cpp").write_text("int one;")
    built = extension.source_hash(tmp_path)
    assert reason(built) is None and "torch 2.1.0" in str(reason(built, "2.1.0"))
    (tmp_path / "cpu" / "op.cpp").write_text("int two;")
    assert "other sources" in str(reason(built))
