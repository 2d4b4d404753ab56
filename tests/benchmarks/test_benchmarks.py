"""Benchmarks as programs: refused options, and sizes that once broke them."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from scripts import ENVIRONMENT
from tiny import tiny_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_chat_model(tmp_path_factory.mktemp("model"), vocab_size=259, max_position_embeddings=512))


def bench(name: str, *arguments: object, world: int = 1) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"WORLD_SIZE": str(world)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_ppo_runs_with_a_vocabulary_below_1000(folder):
    sizes = ["--prompts", 2, "--prompt-tokens", 4, "--new-tokens", 3, "--iters", 1, "--dtype", "float32"]
    done = bench("ppo", "--model", folder, *sizes)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["samples_per_s"] > 0
