"""Rules of the tree: order of imports, late imports, file length, script names, docstrings and identifiers, links."""

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

PACKAGES = ("kernels", "engine", "models", "algorithms")  # each imports from itself and from those before it
NAMESPACE = [path.stem for path in (ROOT / "csrc").glob("*.py")]  # modules of trialign itself, open to all
SCRIPTS = ("launch", "benchmarks", "tests")  # imported by nothing; tests import their helpers by bare name
SOURCES = {
    path.relative_to(ROOT): path.read_text()
    for folder in (*PACKAGES, *SCRIPTS, "csrc", "vllm_plugin")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
MODULES = {".".join(("trialign", *path.with_suffix("").parts)): path for path in SOURCES if path.parts[0] != "tests"}
TEXTS = [
    *ROOT.glob("*.md"),
    *(text for folder in ("docs", *PACKAGES, *SCRIPTS) for text in ROOT.glob(f"{folder}/**/*.md")),
]


class Import(NamedTuple):
    """A name that a file imports."""

    node: ast.Import | ast.ImportFrom
    name: str  # absolute
    relative: bool
    late: bool  # inside a function
    typing: bool  # under TYPE_CHECKING


def imports(path: Path, source: str) -> Iterator[Import]:
    """Imports of a file; `path` is relative to the root."""
    package = ("trialign", *path.parent.parts)

    def walk(node: ast.AST, late: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                level, module = getattr(child, "level", 0), getattr(child, "module", None)
                prefix = (*(package[: len(package) + 1 - level] if level else ()), *([module] if module else ()))
                for alias in child.names:
                    yield Import(child, ".".join((*prefix, alias.name)), level > 0, late, typing)
            checking = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, late or inside, typing or checking)

    return walk(ast.parse(source), False, False)


def violation(path: Path, imported: Import) -> str | None:
    """The reason why a file may not import a name, or None."""
    folder, name = path.parts[0], imported.name
    root, target = (*name.split("."), "")[:2]
    if root in (*PACKAGES, *SCRIPTS):
        return "scripts are imported by nothing, packages as trialign.*"
    if folder in PACKAGES and root == "trialign":
        allowed = PACKAGES[: PACKAGES.index(folder) + 1]
        if not imported.relative:
            return "imports inside the packages are relative"
        return None if target in (*allowed, *NAMESPACE) else f"{folder}/ imports from {', '.join(allowed)} only"
    own = ".".join(("trialign", *path.parent.parts, ""))  # a folder of launch/ is a package
    if imported.relative and not (len(path.parts) == 3 and folder == "launch" and name.startswith(own)):
        return "scripts are no package"
    return None


def test_imports_follow_the_order_of_the_folders():
    found = {
        f"{path}:{imported.node.lineno} {imported.name}: {reason}"
        for path, source in SOURCES.items()
        for imported in imports(path, source)
        if (reason := violation(path, imported))
    }
    assert not found, "\n".join(sorted(found))
    for file, source in {
        "kernels/rope.py": "from ..engine.mesh import Mesh",
        "engine/mesh.py": "def late():\n    from .. import models",
        "models/decoder.py": "import trialign.engine.mesh",
        "algorithms/ppo.py": "from launch.ppo import main",
        "launch/ppo.py": "from .sft import main",
        "launch/common/online.py": "from ..report.curves import plot",
    }.items():
        assert all(violation(Path(file), imported) for imported in imports(Path(file), source)), source


def test_no_circular_imports():
    def files(module: str) -> set[str]:
        path = MODULES[module]
        names = [imported.name for imported in imports(path, SOURCES[path]) if not imported.typing]
        return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()

    graph = {module: files(module) for module in MODULES}
    assert graph["trialign.models.hf.source"] >= {"trialign.models.hf.gguf", "trialign.models.hf.table"}
    while free := [module for module in graph if not graph[module] & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"in a circle, or importing one: {', '.join(graph)}"


def without_reason(path: Path, source: str) -> list[int]:
    """Lines of late imports without a comment on or before them; one comment covers a block of imports."""
    lines, explained, found = ["", *source.splitlines()], set(), []
    for node in (imported.node for imported in imports(path, source) if imported.late and not imported.typing):
        comment = any("#" in line for line in lines[node.lineno - 1 : (node.end_lineno or 0) + 1])
        if comment or node.lineno in explained or node.lineno - 1 in explained:
            explained.add(node.end_lineno)
        else:
            found.append(node.lineno)
    return found


def test_late_imports_have_their_reason_beside_them():
    found = {str(path): lines for path in MODULES.values() if (lines := without_reason(path, SOURCES[path]))}
    assert not found
    source = "def f():\n    import a  # slow\n    import b\n    x = 1\n    import c\n"
    assert without_reason(Path("a.py"), source) == [5]


def test_file_lengths_and_names():
    """With an __init__.py, transformers would import kernels/ as the Hub's package of that name. A script's folder is
    first on sys.path: launch/profile.py would stand in for the profile module."""
    assert not {str(path): count for path, source in SOURCES.items() if (count := len(source.splitlines())) > 500}
    assert not [path for path in SOURCES if path.name == "__init__.py" and path.parts[0] in PACKAGES]
    scripts = [path for path in SOURCES if str(path.parent) in ("launch", "benchmarks")]
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT / "launch", ROOT / "benchmarks")]
    assert not [path for path in scripts if importlib.machinery.PathFinder.find_spec(path.stem, elsewhere)]


QUESTIONS = {"what", "who", "which", "whose", "whom"}
WORDS = {"told", "knob", "knobs", "said", "says", "nobody", "spoilt", "theirs", "ours", "whom"}


def wording(source: str) -> Iterator[str]:
    """Docstrings that begin with a question word, and identifiers with a word of `WORDS`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = re.findall(r"\w+", ast.get_docstring(node) or "")
            if words and words[0].lower() in QUESTIONS:
                yield " ".join(words[:6])
        for key in ("name", "arg", "id"):  # not attributes, which may be of other libraries
            name = getattr(node, key, None)
            if isinstance(name, str) and WORDS & {word.lower() for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", name)}:
                yield name


def test_docstrings_and_identifiers_are_in_the_fields_words():
    found = {str(path): sorted(set(own)) for path, source in SOURCES.items() if (own := [*wording(source)])}
    assert not found
    assert [*wording('def f(told):\n    "Which of them."\n    return ours.x')] == ["Which of them", "told", "ours"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(text: Path):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text.read_text())
    for link in (first or second for first, second in links):
        name, _, anchor = link.partition("#")
        target = (text.parent / name) if name else text
        if not re.match(r"[a-z]+:", link):
            assert target.exists(), link
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if target.suffix == ".md" else []
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or target.suffix != ".md" or anchor in anchors, link
