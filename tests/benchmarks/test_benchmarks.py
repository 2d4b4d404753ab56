"""Benchmarks as programs: refused arguments, and a small vocabulary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ENVIRONMENT
from tiny import tiny_llama, tiny_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(path, vocab_size=259, max_position_embeddings=512)
    tiny_tokenizer(path)
    return str(path)


def bench(name: str, *arguments: object, world: int = 1) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"WORLD_SIZE": str(world)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", ["generate", "kernels", "preference"])
def test_several_ranks_are_refused(name, folder):
    arguments = {"generate": ["--model", folder], "kernels": [], "preference": ["--model", folder, "--trl", ""]}[name]
    if name == "preference":
        arguments += ["--algorithm", "sft"]
    result = bench(name, *arguments, world=2)
    assert result.returncode == 1 and "WORLD_SIZE=2" in result.stderr and "Traceback" not in result.stderr


def test_ppo_runs_with_a_vocabulary_below_1000(folder):
    sizes = ["--prompts", 2, "--prompt-tokens", 4, "--new-tokens", 3, "--iters", 1, "--dtype", "float32"]
    result = bench("ppo", "--model", folder, *sizes)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["samples_per_s"] > 0


@pytest.mark.parametrize(("arguments", "message"), [(["--prompts", 3], "prompts=3"), (["--tp", 4], "world size 2")])
def test_sizes_that_do_not_divide_are_refused(arguments, message, folder):
    result = bench("ppo", "--model", folder, *arguments, world=2)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
