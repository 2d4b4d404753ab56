"""Calls that the product must not make: sums in no order, and tensors without a device.

Atomics add in the order in which they arrive, so no two runs on a GPU agree: sums over samples go through
losses/aggregation.py (`Segments`), others through sorted rows. tests/algorithms/test_order_of_sums.py looks at the
operators that training losses run, gradients included. A tensor without a device is on the CPU and does not meet those
of the model. Each exception has its reason.
"""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT
from test_imports import PACKAGES, SOURCES

PRODUCT = ("kernels", "engine", "models", "algorithms", "launch", "vllm_plugin")
ADDS = "adds by float atomics on CUDA"
BANNED = {
    **dict.fromkeys(("index_add", "scatter_add", "scatter_reduce", "index_reduce", "embedding_bag"), ADDS),
    **dict.fromkeys(("bincount", "histc"), "adds weights by float atomics, and waits for the device"),
    **dict.fromkeys(("put_", "index_put", "_unsafe_index_put"), f"with accumulate {ADDS} or, on the CPU, by threads"),
    **dict.fromkeys(("atomic_add", "atomic_xchg", "atomic_cas"), "is one of Triton's atomics"),
    **dict.fromkeys(("nll_loss2d", "ctc_loss", "interpolate", "grid_sample"), "has a gradient that " + ADDS),
}
ALLOWED = {  # file -> functions, and the reason
    "kernels/logprob.py": (("scatter_add_",), "one term a row"),
    "kernels/moe.py": (("scatter_add_",), "counts, integers"),
    "models/moe.py": (("scatter_add_",), "counts, integers"),
    "csrc/cuda/moe_kernel.cu": (("atomicAdd",), "counts, integers"),
}
CREATORS = {"zeros", "ones", "empty", "full", "eye", "arange", "linspace", "tensor", "as_tensor", "scalar_tensor"}
CREATORS |= {"rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "from_numpy", "frombuffer"}
ON_THE_CPU = {  # file or folder -> the reason why tensors without a device are on the CPU there
    "algorithms/batch.py": "a batch is packed on the CPU, and its indices are moved to its device",
    "algorithms/kto.py": "rows are packed on the CPU",
    "algorithms/reward_model.py": "rows are packed on the CPU",
    "algorithms/data/": "rows of files",
    "algorithms/rollout/": "a batch is packed on the CPU",
    "algorithms/micro_batch.py": "sample ids",
    "algorithms/policy_step.py": "lengths, which Segments moves",
    "algorithms/ppo.py": "scores, which without_unscored moves",
    "algorithms/roles/nonfinite.py": "culprits are named on the CPU",
    "engine/mesh.py": "ranks",
    "engine/transfer.py": "pinned memory",
    "engine/parallel/lora.py": "sizes",
    "engine/parallel/nf4.py": "places of scales, moved to the device of the codes",
    "kernels/nf4.py": "a table, moved to the device of the codes",
    "models/hf/": "weights of files, copied into parameters",
    "models/lora.py": "initial weights, copied into parameters",
    "models/rope.py": "tables, moved by the decoder",
}


def without_device(source: str) -> Iterator[str]:
    """Calls of torch that create a tensor and do not say where."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in CREATORS and not any(k.arg in ("device", None) for k in node.keywords):
                yield f"{node.lineno}: {ast.unparse(node)}"


def python_calls(source: str) -> Iterator[str]:
    """Names of banned functions that a file uses, called or handed on; Triton's atomics among them."""
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, key, None) for key in ("attr", "id", "value")]  # x.index_add, index_add, "index_add"
        names += [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
        for name in (name for name in names if isinstance(name, str)):
            if name in BANNED or name.removesuffix("_") in BANNED:
                yield name


def cuda_calls(source: str) -> Iterator[str]:
    """Names of atomic functions that a CUDA source calls outside comments and strings."""
    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', " ", source, flags=re.S)
    yield from re.findall(r"\b(atomic\w+|red(?:ux)?_\w+)\s*\(", code)


def test_no_sum_depends_on_the_order_of_atomics():
    product = {path: text for path, text in SOURCES.items() if path.parts[0] in PRODUCT}
    found = {(str(path), name) for path, text in product.items() for name in python_calls(text)}
    for path in (ROOT / "csrc").rglob("*.cu*"):
        found |= {(str(path.relative_to(ROOT)), name) for name in cuda_calls(path.read_text())}
    reason = lambda name: BANNED.get(name) or BANNED.get(name.removesuffix("_"), ADDS)  # noqa: E731
    allowed = {(path, name) for path, (names, _) in ALLOWED.items() for name in names}
    banned = [f"{path}: {name} {reason(name)}" for path, name in found - allowed]
    assert not banned, "\n".join(sorted(banned))
    assert ALLOWED.keys() == {path for path, _ in found}, "exceptions that nothing needs"


def test_tensors_are_created_on_a_device():
    """In launch/ scripts read results on the CPU."""
    packages = {str(path): text for path, text in SOURCES.items() if path.parts[0] in PACKAGES}
    found = {path: calls for path, text in packages.items() if (calls := list(without_device(text)))}
    other = {path: calls for path, calls in found.items() if not path.startswith(tuple(ON_THE_CPU))}
    assert not [f"{path}:{call}" for path, calls in other.items() for call in calls]
    source = "torch.zeros(2)\ntorch.zeros(2, device=x.device)\nx.new_zeros(2)\ntorch.arange(3, **options)"
    assert list(without_device(source)) == ["1: torch.zeros(2)"]


@pytest.mark.parametrize(
    "line, names",
    [
        ("y = torch.zeros(3).index_add(0, i, x)", ["index_add"]),
        ("y.scatter_add_(0, i, x)", ["scatter_add_"]),
        ("f = torch.ops.aten.scatter_reduce.two", ["scatter_reduce"]),
        ("from torch import bincount", ["bincount"]),
        ("getattr(y, 'index_put_')((i,), x, accumulate=True)", ["index_put_"]),
        ("tl.atomic_add(out + i, x)", ["atomic_add"]),
        ("y.index_copy(0, i, x); y.scatter_(0, i, x); y[i] = x; put(x)", []),
        ("'''Not index_add: its order is that of the atomics.'''", []),
    ],
)
def test_banned_python_calls_are_found(line, names):
    assert list(python_calls(line)) == names


def test_banned_cuda_calls_are_found():
    source = 'atomicAdd(&x, 1.f); /* atomicMax(&x, 2) */ check("atomicCAS(");\n// atomicSub(&x, 1)\nunsafeAtomic(x);'
    assert list(cuda_calls(source)) == ["atomicAdd"]
