"""Laws of the tree: order of imports, no circles, length of files, links in texts that lead somewhere."""

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("kernels", "engine", "models", "algorithms")  # each imports from itself and from those before it
NAMESPACE = [path.stem for path in (ROOT / "csrc").glob("*.py")]  # modules of trialign itself, open to all
SCRIPTS = ("launch", "benchmarks", "tests")  # nothing imports these, except tests their own helpers by bare name
SOURCES = sorted(path for folder in (*PACKAGES, *SCRIPTS) for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", *PACKAGES, *SCRIPTS) for path in (ROOT / folder).rglob("*.md"))]
)


def imports(path: Path, source: str) -> Iterator[tuple[int, str, bool]]:
    """Each import in `source`, the text of the file `path` (from the root): line, absolute name, written relative?"""
    package = ("trialign", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", node.level > 0


def within_launch(path: Path) -> str:
    """Prefix of the names that a module in a folder of launch/ imports by relative names; "" elsewhere."""
    return f"trialign.{'.'.join(path.parent.parts)}." if path.parts[0] == "launch" and len(path.parts) == 3 else ""


def faults(path: Path, source: str) -> list[str]:
    """What `source` imports against the law, as file:line: reason."""
    folder = path.parts[0]
    found = []
    for line, name, relative in imports(path, source):
        root, target = (*name.split("."), "", "")[:2]
        reason = None
        if root in (*PACKAGES, *SCRIPTS):
            reason = f"imports {name}: nothing may import the scripts, and the packages go by trialign.*"
        elif folder in PACKAGES and root == "trialign" and not relative:
            reason = f"imports {name} by its absolute name; inside the packages imports are relative"
        elif folder in PACKAGES and root == "trialign":
            allowed = PACKAGES[: PACKAGES.index(folder) + 1]
            if target not in (*allowed, *NAMESPACE):
                reason = f"imports {name}; {folder}/ may import from {', '.join(allowed)} only"
        elif folder in SCRIPTS and relative and not (within_launch(path) and name.startswith(within_launch(path))):
            reason = f"imports {name} by a relative name; scripts are no package"
        if reason:
            found.append(f"{path}:{line} {reason}")
    return found


def test_imports_follow_the_order_of_the_folders():
    found = [fault for path in SOURCES for fault in faults(path.relative_to(ROOT), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "lawful"),
    [
        ("engine/parallel/tensor.py", "from ...kernels.rope import rope", True),
        ("engine/parallel/tensor.py", "from ..mesh import Mesh", True),
        ("algorithms/ppo.py", "from ..models.decoder import Decoder", True),
        ("launch/ppo.py", "from trialign.engine.mesh import Mesh", True),
        ("tests/kernels/test_rope.py", "from harness import run_ranks", True),
        ("kernels/rope.py", "from ..engine.mesh import Mesh", False),
        ("engine/mesh.py", "def late():\n    from .. import models", False),
        ("models/decoder.py", "import trialign.engine.mesh", False),
        ("models/decoder.py", "from engine.mesh import Mesh", False),
        ("algorithms/ppo.py", "from launch.ppo import main", False),
        ("benchmarks/bench_ppo.py", "import launch.ppo", False),
        ("launch/ppo.py", "from .sft import main", False),
        ("launch/common/online.py", "from .run import Run", True),
        ("launch/common/online.py", "from ..report.curves import plot", False),
        ("launch/ppo.py", "import kernels", False),
    ],
)
def test_the_import_law_tells_right_from_wrong(path: str, source: str, lawful: bool):
    assert (not faults(Path(path), source)) == lawful


def executed(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements outside `if TYPE_CHECKING:`, each with whether it stands in a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, inside
            elif not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
                yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return walk(tree, False)


PRODUCT = {  # dotted name -> file
    ".".join(("trialign", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in SOURCES
    if path.relative_to(ROOT).parts[0] != "tests"
}


def imported_files(module: str, path: Path) -> set[str]:
    """The files of the product that a file imports, at its top or in a function."""
    found, package = set(), module.split(".")[:-1]
    for node in (node for node, _ in executed(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)):
        base = ".".join((*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])))
        base = base if node.level else node.module or ""
        found |= {name if (name := f"{base}.{alias.name}") in PRODUCT else base for alias in node.names}
    return found & PRODUCT.keys()


def test_no_circles_of_imports():
    graph = {module: imported_files(module, path) for module, path in PRODUCT.items()}
    assert graph["trialign.models.hf.source"] >= {"trialign.models.hf.gguf", "trialign.models.hf.table"}
    while free := [module for module in graph if not graph[module] & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"in a circle, or above one: {', '.join(graph)}"


# Files whose imports within functions have no reason beside them yet; none may be added.
WITHOUT_REASONS = {
    *(f"algorithms/data/{name}.py" for name in ("arrow", "chat", "dialogues", "sources")),
    "algorithms/rewards/math/symbolic.py",
}


def unexplained(source: str) -> list[int]:
    """Lines of imports within functions that have no comment on the line or on the one before; a block has one."""
    lines, explained, found = ["", *source.splitlines()], set(), []
    for node, inside in executed(ast.parse(source)):
        comment = any("#" in line for line in lines[node.lineno : (node.end_lineno or 0) + 1])
        if inside and not (comment or "#" in lines[node.lineno - 1] or node.lineno - 1 in explained):
            found.append(node.lineno)
        elif inside:
            explained.add(node.end_lineno)
    return found


def test_imports_within_functions_have_their_reason_beside_them():
    lines = {str(path.relative_to(ROOT)): unexplained(path.read_text()) for path in PRODUCT.values()}
    assert {name for name, found in lines.items() if found} == WITHOUT_REASONS, lines
    assert unexplained("def f():\n    import a  # slow\n    import b\n    x = 1\n    import c\n") == [5]


def test_no_file_passes_500_lines():
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 500}
    assert not long


def test_no_init_files():
    """With one, transformers would import kernels/ as the Hub's package of that name; it ignores PEP 420 folders."""
    init_files = [path.relative_to(ROOT) for path in SOURCES if path.name == "__init__.py"]
    assert not [str(path) for path in init_files if path.parts[0] in PACKAGES]


def test_no_script_is_named_after_a_module():
    """A script's folder comes first on sys.path: launch/profile.py would stand in for the profile module."""
    scripts = [path for path in SOURCES if path.parent.name in ("launch", "benchmarks")]
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() not in {path.parent for path in scripts}]
    assert not [path.name for path in scripts if importlib.machinery.PathFinder.find_spec(path.stem, elsewhere)]


def anchors(text: str) -> set[str]:
    """The names GitHub gives the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_in_the_texts_lead_somewhere():
    broken = []
    for text in TEXTS:
        links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text.read_text())
        for link in (first or second for first, second in links):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (text.parent / name) if name else text
            if not target.exists():
                broken.append(f"{text.relative_to(ROOT)}: {link}")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
                broken.append(f"{text.relative_to(ROOT)}: {link} (no such heading)")
    assert not broken, "\n".join(broken)
