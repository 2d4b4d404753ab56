"""Option tables of the docs against the configs; `python tests/test_docs.py` writes them."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

import pytest
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.engine.config import flatten

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {f"{name}.md": cls for name, cls in SCRIPTS.items()}
BEGIN, END = "<!-- options -->\n", "<!-- /options -->\n"


def docs_of(cls: type) -> dict[str, str]:
    """Field -> the string under it, of a config and its bases."""
    found = {}
    for base in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for field, text in itertools.pairwise(tree.body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


def table(config: Any, prefix: str) -> str:
    """The rows of a section, and of the sections in it."""
    hints, docs, rows = typing.get_type_hints(type(config)), docs_of(type(config)), ""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            rows += table(value, name)
            continue
        default = " ".join(map(str, value)) or "(none)" if isinstance(value, tuple) else str(value) or '""'
        text = " ".join(docs[field.name].split()).replace("|", "\\|")  # a row of a Markdown table is one line
        if typing.get_origin(hints[field.name]) is typing.Literal:
            text += f" ({', '.join(f'`{choice}`' for choice in typing.get_args(hints[field.name]))})"
        rows += f"| `{name}` | `{default}` | {text} |\n"
    return rows


def tables(cls: type) -> str:
    """Tables of a config's sections; for a section that is another script's config, a link to its page."""
    config, parts = cls(), []
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        about = (inspect.getdoc(type(section)) or "").splitlines()[0]
        if page := next((page for page, other in PAGES.items() if other is type(section)), None):
            rows = f"Options of [{page}]({page}), prefixed with `{field.name}.`\n"
        else:
            rows = f"| option | default | |\n|---|---|---|\n{table(section, field.name)}"
        parts.append(f"### {field.name}\n\n{about}\n\n{rows}")
    return "\n".join(parts)


def with_tables(name: str) -> str:
    """A page with the tables of its config between the markers."""
    head, _, rest = (DOCS / name).read_text().partition(BEGIN)
    return f"{head}{BEGIN}\n{tables(PAGES[name])}\n{END}{rest.partition(END)[2]}"


@pytest.mark.parametrize("name", PAGES)
def test_options_of_a_page_match_the_config(name):
    page = (DOCS / name).read_text()
    assert page == with_tables(name), f"docs/{name} is out of date: run python tests/test_docs.py"
    sections = "|".join(field.name for field in dataclasses.fields(PAGES[name]))
    named = set(re.findall(rf"`((?:{sections})\.\w+)`", page.partition(BEGIN)[0]))
    assert named and named <= set(re.findall(r"^\| `([\w.]+)`", tables(PAGES[name]), re.M))


def test_options_in_commands_exist():
    options = {script: set(flatten(cls())) for script, cls in SCRIPTS.items()}
    unknown = []
    for path in (*DOCS.glob("*.md"), *DOCS.parent.glob("README*.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, arguments in re.findall(r"launch/(\w+)\.py ([^`\n]*--[^`\n]*)", text):
            used = set(re.findall(r"--(\w+\.[\w.]+)", arguments))
            unknown += [f"{path.name}: {script}.py --{name}" for name in used - options.get(script, used)]
    assert not unknown


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(with_tables(name))
