"""flash-attn, apex and Transformer Engine: ours serve without them, theirs are called where they fit, and our calls fit
what they publish: bound to the signatures in their own packages, and by their rules equal to our references."""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.kernels import adamw, attention, dispatch, linear
from trialign.kernels.backends.libraries import LIBRARIES
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config

PACKAGES = {"flash-attn": "flash_attn", "transformer-engine": "transformer_engine"}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """published(package, file) -> text of a file in the package as PyPI has it; skips where it cannot be had."""
    got: dict[str, Path | str] = {}

    def fetch(package: str) -> Path | str:
        folder = tmp_path_factory.mktemp(package)
        command = [sys.executable, "-m", "pip", "--timeout", "10", "--retries", "0", "download", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--dest", str(folder), package]
        env = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "MAX_JOBS": "1"}
        try:
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            return f"{package} could not be downloaded within 90 s"
        files = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
        return files[0] if result.returncode == 0 and files else f"{package} could not be had: {result.stderr[-200:]}"

    def text(package: str, file: str) -> str:
        archive = got.setdefault(package, got.get(package) or fetch(package))
        if isinstance(archive, str):
            pytest.skip(archive)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(file).decode()
        with tarfile.open(archive) as sdist:
            member = sdist.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{file}")
            assert member is not None
            return member.read().decode()

    return text


def signature(text: str, *path: str) -> inspect.Signature:
    """The signature of a function, or of a class's method without its self, in Python source that is not imported."""
    nodes = ast.parse(text).body
    for name in path[:-1]:
        nodes = next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name).body
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == path[-1]]
    arguments = found[-1].args
    plain, kind = [*arguments.posonlyargs, *arguments.args], inspect.Parameter
    first = len(plain) - len(arguments.defaults)
    parameters = [
        kind(
            a.arg,
            kind.POSITIONAL_OR_KEYWORD,
            default=kind.empty if i < first else ast.unparse(arguments.defaults[i - first]),
        )
        for i, a in enumerate(plain)
    ][len(path) - 1 :]
    parameters += [
        kind(a.arg, kind.KEYWORD_ONLY, default=kind.empty if d is None else ast.unparse(d))
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return inspect.Signature(parameters)


def attention_case(window, slopes, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if slopes else None
    return q, k, v, torch.tensor([0, 5, 5, 12]), 7, 0.3, alibi, window


FLASH_FILE = "flash_attn/flash_attn_interface.py"


@pytest.mark.parametrize("window, slopes", [(None, False), (3, True), (1, False)])
def test_flash_attention_is_called_as_it_is_published(published, window, slopes):
    row, case = LIBRARIES["attention"], attention_case(window, slopes)
    positional, named = row.call(*case)
    bound = signature(published("flash-attn", FLASH_FILE), row.function).bind(*positional, **named).arguments
    assert "from flash_attn.flash_attn_interface import" in published("flash-attn", "flash_attn/__init__.py")
    assert row.function in published("flash-attn", "flash_attn/__init__.py")
    exact = attention.packed_attention_ref(*case)
    assert torch.allclose(flash_rules(bound), exact, rtol=1e-12, atol=1e-12)


def flash_rules(a: dict) -> torch.Tensor:
    """What flash-attn's documentation says of these arguments, written out for one document after the other."""
    out = torch.empty_like(a["q"])
    bounds, (left, right) = a["cu_seqlens_q"].tolist(), a["window_size"]
    assert a["cu_seqlens_q"].dtype == torch.int32 and a["causal"] and a["max_seqlen_q"] == a["max_seqlen_k"]
    for start, end in zip(bounds, bounds[1:], strict=False):
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)[None, :]
        seen = (j <= i) & ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
        for head in range(a["q"].shape[1]):
            group = a["q"].shape[1] // a["k"].shape[1]
            q, k, v = a["q"][start:end, head], a["k"][start:end, head // group], a["v"][start:end, head // group]
            scores = q @ k.T * a["softmax_scale"]
            if a["alibi_slopes"] is not None:
                scores = scores - a["alibi_slopes"][head].double() * (i - j).abs()
            out[start:end, head] = scores.masked_fill(~seen, -torch.inf).softmax(1) @ v
    return out


TE = "transformer_engine/pytorch"


def test_fp8_layers_are_called_as_they_are_published(published):
    x, weight = torch.randn(32, 48), torch.randn(64, 48)
    row = LIBRARIES["fp8_linear"]
    linear, package = (published("transformer-engine", f"{TE}/{file}.py") for file in ("module/linear", "__init__"))
    positional, named = row.call(x, weight)
    bound = signature(linear, "Linear", "__init__").bind(*positional, **named).arguments
    assert (bound["in_features"], bound["out_features"], bound["bias"]) == (48, 64, False)
    signature(linear, "Linear", "forward").bind(x)
    assert "register_parameter(\n" in linear and 'self.weight_names = ["weight"]' in linear
    row = LIBRARIES["fp8_region"]
    positional, named = row.call("recipe")
    regions = published("transformer-engine", f"{TE}/quantization.py")
    assert signature(regions, "autocast", "__init__").bind(*positional, **named).arguments["recipe"] == "recipe"
    assert "import Linear\n" in package and "import autocast\n" in package
    recipes = ast.parse(published("transformer-engine", "transformer_engine/common/recipe/__init__.py")).body
    recipe = next(n for n in recipes if isinstance(n, ast.ClassDef) and n.name == LIBRARIES["fp8_recipe"].function)
    assert all(
        field.value is not None for field in recipe.body if isinstance(field, ast.AnnAssign)
    )  # no argument needed


def test_apex_is_called_by_its_rules():
    """NVIDIA's apex is not on PyPI (the name is another project's): its published formula stands for its signature."""
    torch.manual_seed(0)
    buffers = [torch.randn(9, dtype=torch.float64) for _ in range(2)] + [
        torch.rand(9).double(),
        torch.randn(9).double(),
    ]
    hyper = (3e-3, 0.9, 0.95, 1e-8, 0.1, 7)
    (chunk, flag, lists, lr, b1, b2, eps, step, mode, corrected, decay), named = LIBRARIES["adamw"].call(
        *buffers, None, *hyper, 1.0
    )
    assert not named and chunk > 0 and flag.dtype == torch.int32 and (mode, corrected) == (1, 1)
    (g,), (p,), (m,), (v,) = lists
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    p = p - lr * (m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps) + decay * p)
    ours = [t.clone() for t in buffers]
    adamw.adamw_ref_(*ours, None, *hyper)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, (p, m, v), strict=False))


def test_signature_of_apex():
    """Where it is installed: no package index has its source, the apex on PyPI is another project's."""
    row = LIBRARIES["rms_norm"]
    found = importlib.util.find_spec("apex")
    file = Path((found and found.origin) or "").parent / "normalization" / "fused_layer_norm.py"
    if not file.is_file():
        pytest.skip("NVIDIA's apex is not installed, and no package index has it")
    positional, named = row.call(torch.ones(2, 8), torch.ones(8), 1e-5)
    assert signature(file.read_text(), row.function).bind(*positional, **named).arguments["eps"] == 1e-5


AMP_C = """
calls = []
def multi_tensor_adam(chunk, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay):
    calls.append(chunk)
    for g, p, m, v in zip(*tensor_lists):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
        update = (m / first) / ((v / second).sqrt() + epsilon)
        p.sub_(lr * (update + decay * p if mode == 1 else update))
"""
APEX = """
calls = []
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(normalized_shape) == tuple(weight.shape)
    calls.append(eps)
    return weight * input * (input.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
"""
ASK_APEX = """
import sys, torch
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels.backends.libraries import LIBRARIES
from trialign.kernels.adamw import adamw_, adamw_ref_
from trialign.kernels.rms_norm import rms_norm, rms_norm_ref
HYPER = (3e-3, 0.9, 0.95, 1e-8, 0.1, 7)
def calls(name):
    return len(sys.modules[name].calls) if name in sys.modules else 0
with FakeTensorMode():
    buffers = [torch.empty(9, device="cuda") for _ in range(4)]
    adamw_(*buffers, None, *HYPER)
    adamw_(*buffers, torch.empty(9, dtype=torch.bfloat16, device="cuda"), *HYPER)  # a copy-out it has not
    adamw_(*buffers, None, *HYPER, 0.5)  # a clip scale it has not
    x, weight = (torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in ((3, 8), (8,)))
    assert rms_norm(x, weight, 1e-5).shape == x.shape
    rms_norm(x, weight.float(), 1e-5)  # of two types
names = "amp_C", "apex.normalization.fused_layer_norm"
print([calls(name) for name in names])
for op in ("adamw", "rms_norm"):  # the numbers, on the CPU
    LIBRARIES[op] = replace(LIBRARIES[op], fits=lambda *_: True)
torch.manual_seed(0)
theirs = [torch.randn(50), torch.randn(50), torch.rand(50), torch.randn(50)]
ours = [t.clone() for t in theirs]
adamw_(*theirs, None, *HYPER)
adamw_ref_(*ours, None, *HYPER)
torch.testing.assert_close(theirs, ours)
x, weight = torch.randn(3, 8), torch.randn(8)
torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))
print([calls(name) for name in names])
"""


@pytest.mark.skipif(not (dispatch.has_triton() and dispatch.EXTENSION), reason="needs Triton and trialign._C")
@pytest.mark.parametrize("mode, served", [("auto", ["[1, 1]", "[2, 2]"]), ("own", ["[0, 0]", "[0, 0]"])])
def test_apex_serves_what_fits_it_and_gives_our_numbers(mode, served, tmp_path):
    """Modules of its names that keep to its published rules."""
    (tmp_path / "apex" / "normalization").mkdir(parents=True)
    for name in ("apex/__init__.py", "apex/normalization/__init__.py", "fused_layer_norm_cuda.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "amp_C.py").write_text(AMP_C)
    (tmp_path / "apex" / "normalization" / "fused_layer_norm.py").write_text(APEX)
    assert run(ASK_APEX, tmp_path, TRIALIGN_KERNELS=mode).splitlines()[:2] == served


NOTE = """
import torch
calls = []
def flash_attn_varlen_func(q, k, v, **named):
    calls.append(named)
    return torch.empty_like(q)
"""
FAKE = """
import importlib.util, sys, torch, warnings
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels.attention import packed_attention
def serve(dtype, d, window=None, alibi=False):
    with FakeTensorMode():
        q, k, v = (torch.empty(12, heads, d, dtype=dtype, device="cuda") for heads in (4, 2, 2))
        cu = torch.empty(4, dtype=torch.int64, device="cuda")
        slopes = torch.empty(4, device="cuda") if alibi else None
        out = packed_attention(q, k, v, cu, 7, 0.5, slopes, window)
        assert out.shape == q.shape and out.device.type == "cuda"
    return len(sys.modules["flash_attn"].calls) if "flash_attn" in sys.modules else 0
"""


def run(script: str, path: Path | None = None, **environment) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("TRIALIGN_KERNELS", "TRITON_INTERPRET")} | environment
    env |= {"PYTHONPATH": str(path)} if path else {}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


ASK = (
    FAKE
    + "print([serve(torch.bfloat16, 64), serve(torch.float16, 256, window=3), serve(torch.float32, 64),"
    + ("serve(torch.bfloat16, 20), serve(torch.bfloat16, 96, alibi=True)])")
)


@pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("mode, served", [("auto", [1, 2, 2, 2, 3]), ("own", [0] * 5), ("fp8", [1, 2, 2, 2, 3])])
def test_an_installed_library_serves_what_fits_it_unless_forbidden(tmp_path, mode, served):
    (tmp_path / "flash_attn.py").write_text(NOTE)
    assert run(ASK, tmp_path, TRIALIGN_KERNELS=mode).splitlines()[0] == str(served)


@pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed")
def test_without_the_library_ours_serves_in_silence():
    said = run(ASK)
    assert said.startswith("[0, 0, 0, 0, 0]\n") and "flash_attn" not in said


@pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed")
def test_a_library_that_does_not_load_is_said_once_and_ours_serves(tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    said = run(ASK, tmp_path)
    assert said.startswith("[0, 0, 0, 0, 0]")
    assert said.count("flash_attn.flash_attn_varlen_func cannot be used (undefined symbol): our own serves") == 1


TRANSFORMER_ENGINE = """
import contextlib, torch
regions = []
class Linear(torch.nn.Linear):
    def __init__(self, i, o, bias, params_dtype, device):
        super().__init__(i, o, bias=bias, dtype=params_dtype, device=device)
    def forward(self, inp):
        assert regions and inp.dim() == 2 and inp.shape[0] % 32 == 0
        return super().forward(inp)
@contextlib.contextmanager
def autocast(enabled, recipe):
    regions.append(recipe)
    yield
"""
LINEAR = """
import torch, sys
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels.linear import layer_linear, linear
torch.cuda.get_device_capability = lambda device=None: (9, 0)
with FakeTensorMode():
    x, weight, odd = (torch.empty(*s, 48, dtype=torch.bfloat16, device="cuda") for s in ((3, 5), (64,), (15,)))
    assert layer_linear(x, weight).shape == (3, 5, 64) and layer_linear(x, odd).shape == (3, 5, 15)
    linear(x, weight)  # the head's: never in FP8
print(len(sys.modules["transformer_engine.pytorch"].regions) if "transformer_engine" in sys.modules else 0)
"""


@pytest.mark.parametrize("mode, served", [("fp8", "1"), ("auto", "0")])
def test_fp8_is_multiplied_only_when_asked_for(tmp_path, mode, served):
    (tmp_path / "transformer_engine" / "common").mkdir(parents=True)
    for name in ("__init__.py", "common/__init__.py"):
        (tmp_path / "transformer_engine" / name).write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text(TRANSFORMER_ENGINE)
    (tmp_path / "transformer_engine" / "common" / "recipe.py").write_text("class Float8CurrentScaling: pass")
    assert run(LINEAR, tmp_path, TRIALIGN_KERNELS=mode).splitlines()[0] == served


def test_the_head_is_never_multiplied_in_fp8(tmp_path, monkeypatch):
    """The sampler's head and the one training recomputes logprobs by must be one: every other matrix may be FP8."""
    model = Decoder(read_config(tiny_llama(tmp_path, tied=False)), build_mesh(), dtype=torch.float32)
    multiplied = set()
    monkeypatch.setattr(linear, "MODE", "fp8")
    monkeypatch.setattr(linear, "_fp8_linear", lambda x, w: multiplied.add(w.data_ptr()) or x @ w.T)
    model.logits(stage_forward(model, pack([[1, 2, 3]]), None))
    layers = {p.data_ptr() for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2}
    assert multiplied == layers and model.head is not None and model.head.weight.data_ptr() not in layers
