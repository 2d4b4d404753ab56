"""Calls that the product must not make: sums in the order in which a GPU's atomics arrive, so that no two runs agree.

Sums over samples go through losses/aggregation.py (`Segments`), others through sorted rows. Each exception has its
reason. tests/algorithms/test_order_of_sums.py looks at the operators that training losses run, gradients included.
"""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT
from test_imports import SOURCES

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
    "models/moe.py": (("bincount", "scatter_add_"), "counts, integers"),
    "csrc/cuda/moe_kernel.cu": (("atomicAdd",), "counts, integers"),
}


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
