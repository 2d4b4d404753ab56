"""The loops of launch/ppo.py and launch/grpo.py: one line a phase, the same phases in both."""

import ast
import re

import pytest
from conftest import ROOT

PHASES = ["next", "score", "with_advantages", "update", "sync", "end_step"]


@pytest.mark.parametrize("script", ["ppo", "grpo"])
def test_the_loop_has_a_line_for_each_phase(script):
    source = (ROOT / "launch" / f"{script}.py").read_text()
    (train,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "train")
    (loop,) = (node for node in train.body if isinstance(node, ast.For))
    assert sum(isinstance(node, ast.stmt) for statement in loop.body for node in ast.walk(statement)) <= 12
    assert (loop.end_lineno or 99) - loop.lineno <= 12
    assert [name for name in re.findall(r"(\w+)\(", ast.unparse(loop)) if name in PHASES] == PHASES
