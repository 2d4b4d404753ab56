"""The choice of implementation: by device, dtype and the switch; what is said of a missing or stale extension."""

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


def test_by_device_and_dtype():
    built = dispatch.has_op("gae")
    assert dispatch.choose("gae", torch.zeros(1)) == ("cpp" if built else "reference")
    assert dispatch.choose("gae", torch.zeros(1, dtype=torch.float64)) == "reference"
    assert dispatch.choose("gae", torch.zeros(1, device="meta")) == ("cpp" if built else "triton")  # its fake serves
    assert dispatch.choose("no_such_op", torch.zeros(1)) == "reference"


def test_the_switch():
    result = run("reference")
    assert result.stdout == "reference\n" and result.stderr == ""


def test_an_unknown_mode_is_refused():
    result = run("fast")
    assert result.returncode != 0
    assert "TRIALIGN_KERNELS='fast': allowed are auto, own, fp8, reference, avx2, baseline" in result.stderr


@pytest.mark.skipif(not dispatch.EXTENSION, reason="trialign._C is not built")
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_a_lesser_simd_level_can_be_asked_for(level):
    result = run(level, "import trialign.kernels.dispatch, trialign._C as c; print(c.simd_level)")
    # A machine below the level asked for gives what it has.
    assert result.stdout.strip() in {"baseline": ["baseline"], "avx2": ["avx2", "baseline"]}[level]


HIDE = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "trialign._C" else find(name, *rest)
"""


def test_a_missing_extension_is_said_once_and_the_references_serve():
    result = run(None, HIDE + PRINT + "; import trialign.kernels.gae, trialign.kernels.logprob")
    assert result.stdout == "reference\n"
    assert result.stderr.count("trialign._C is not built: plain torch serves instead") == 1
    assert run(None, HIDE + PRINT, RANK="3").stderr == ""  # one rank says it


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


@pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed")
def test_triton_serves_cuda_without_the_extension():
    result = run(None, HIDE + ALL_OPS)
    assert result.stdout == "[]\ntorch.Size([6, 8]) cuda:0 torch.Size([6])\nreference False\n", result.stderr[-2000:]


@pytest.mark.skipif(not dispatch.EXTENSION, reason="trialign._C is not built")
def test_the_schemas_are_those_of_the_extension():
    for op, schema in SCHEMAS.items():
        compiled = str(getattr(torch.ops.trialign, op).default._schema)
        assert compiled == f"trialign::{op}{schema}"


@pytest.mark.skipif(not dispatch.EXTENSION, reason="trialign._C is not built")
def test_a_stale_extension_does_not_register_its_ops():
    stale = "import trialign.source_hash as s; s.source_hash = lambda folder: 'other'\n"
    asked = "import trialign.kernels.dispatch as d, torch, sys; print(d.EXTENSION, 'trialign._C' in sys.modules)"
    result = run(None, stale + asked)
    assert result.stdout == "False False\n" and "was built from other sources" in result.stderr


def test_a_stale_extension_is_told(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "op.cpp").write_text("int one;")
    built = extension.source_hash(tmp_path)
    assert extension.why_unusable(built, torch.__version__, tmp_path) is None
    assert (
        extension.why_unusable(built, "2.1.0", tmp_path)
        == f"was built for torch 2.1.0, this is torch {torch.__version__}"
    )
    (tmp_path / "cpu" / "op.cpp").write_text("int two;")
    assert (
        extension.why_unusable(built, torch.__version__, tmp_path) == "was built from other sources than those in csrc/"
    )


def test_an_installed_wheel_has_no_sources_to_compare(tmp_path):
    assert extension.why_unusable("any", torch.__version__, tmp_path) is None
