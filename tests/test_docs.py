"""Option tables of the docs against the configs; `python tests/test_docs.py` writes them."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from pathlib import Path

import pytest
from trialign.algorithms.config.conditional import ConditionalConfig
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.preference import DPOConfig, KTOConfig, RewardModelConfig
from trialign.algorithms.config.pretrain import PretrainConfig
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.config.rlhf import RLHFConfig
from trialign.algorithms.config.sft import SFTConfig
from trialign.engine.config import flatten

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {
    "reward.md": RewardModelConfig,
    "dpo.md": DPOConfig,
    "kto.md": KTOConfig,
    "grpo.md": GRPOConfig,
    "ppo.md": PPOConfig,
    "sft.md": SFTConfig,
    "pretrain.md": PretrainConfig,
    "evaluate.md": EvaluateConfig,
    "rejection.md": RejectionConfig,
    "conditional.md": ConditionalConfig,
    "rlhf.md": RLHFConfig,
}
BEGIN, END = "<!-- options -->\n", "<!-- /options -->\n"


def docs_of(cls: type) -> dict[str, str]:
    """Field -> the string under it; a field without one is a KeyError in `table`."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for base in (base for base in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(base)):
        found |= docs_of(base)
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = ast.literal_eval(text.value)
    return found


def argument_of(value: object) -> str:
    """A value as a command-line argument."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return (
        {"": '""', True: "True", False: "False"}.get(value, str(value)) if isinstance(value, str | bool) else f"{value}"
    )


def table(config: object, prefix: str) -> str:
    """The rows of a section, and of the sections in it."""
    hints, docs = typing.get_type_hints(type(config)), docs_of(type(config))
    rows = ""
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value, name = getattr(config, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            rows += table(value, name)
            continue
        default = argument_of(value)
        choices = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        text = " ".join(docs[field.name].split()).replace("|", "\\|")  # a row of a Markdown table is one line
        if choices:
            text += f" ({', '.join(f'`{choice}`' for choice in choices)})"
        rows += f"| `{name}` | `{default}` | {text} |\n"
    return rows


def tables(cls: type) -> str:
    """Tables of a config's sections; for a section that is another script's config, a link to its page."""
    config, parts = cls(), []
    pages = {config: page for page, config in PAGES.items()}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        about = (inspect.getdoc(type(section)) or "").splitlines()[0]
        if page := pages.get(type(section)):
            rows = f"Options of [{page}]({page}), prefixed with `{field.name}.`\n"
        else:
            rows = f"| option | default | |\n|---|---|---|\n{table(section, field.name)}"
        parts.append(f"### {field.name}\n\n{about}\n\n{rows}")
    return "\n".join(parts)


def with_tables(page: str, cls: type) -> str:
    """`page` with the tables of a config between the markers."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{tables(cls)}\n{END}{rest.partition(END)[2]}"


@pytest.mark.parametrize("name", PAGES)
def test_option_tables_match_the_configs(name):
    page = (DOCS / name).read_text()
    assert page == with_tables(page, PAGES[name]), f"docs/{name} is out of date: run python tests/test_docs.py"


@pytest.mark.parametrize("name", PAGES)
def test_options_named_in_the_text_exist(name):
    page = (DOCS / name).read_text().partition(BEGIN)[0]
    sections = "|".join(field.name for field in dataclasses.fields(PAGES[name]))
    named = set(re.findall(rf"`((?:{sections})\.\w+)`", page))
    known = set(re.findall(r"^\| `([\w.]+)`", tables(PAGES[name]), re.M))
    assert named and named <= known, named - known


def test_options_in_commands_exist():
    options = {page.removesuffix(".md"): set(flatten(cls())) for page, cls in PAGES.items()}
    unknown = []
    for path in (*DOCS.glob("*.md"), *DOCS.parent.glob("README*.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, arguments in re.findall(r"launch/(\w+)\.py ([^`\n]*--[^`\n]*)", text):
            used = set(re.findall(r"--(\w+\.[\w.]+)", arguments))
            unknown += [f"{path.name}: {script}.py --{name}" for name in used - options.get(script, used)]
    assert not unknown


if __name__ == "__main__":
    for name, cls in PAGES.items():
        (DOCS / name).write_text(with_tables((DOCS / name).read_text(), cls))
