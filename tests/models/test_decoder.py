"""Logits of the real SmolLM2 against transformers, alone and under tp, pp (random models: families/)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from harness import run_ranks
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import shapes, stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.collectives import all_gather
from trialign.engine.pipeline.runner import run_schedule
from trialign.engine.pipeline.schedule import forward_only
from trialign.engine.pipeline.stage import Chunk
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.load import load_hf

SMOLLM2 = Path(os.environ.get("TRIALIGN_SMOLLM2", "models_hf/SmolLM2-135M-Instruct")).absolute()


def rank_logits(rank: int, world: int, folder: Path, prompts: list[list[int]], tp: int, pp: int, dtype: torch.dtype):
    """[total, vocab] fp32 logits of the packed prompts, on the last stage (None elsewhere)."""
    mesh = build_mesh(tp=tp, pp=pp)
    model = Decoder(read_config(folder), mesh, dtype=dtype)
    load_hf(model, folder)
    batch = pack(prompts)

    def forward(chunk: Chunk, _: int, x: Tensor | None) -> Tensor:
        hidden = stage_forward(model, batch, x, chunk=chunk)
        return model.logits(hidden) if chunk.has_head else hidden

    results = run_schedule(forward_only, model.stage, mesh, shapes(model, [batch]), dtype, forward)
    return all_gather(results[0], mesh.tp, 1, model.vocab.sizes).float() if results else None


def peer_logits(folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> Tensor:
    """The same by transformers, a prompt at a time."""
    from transformers import AutoModelForCausalLM

    peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return torch.cat([peer(torch.tensor([prompt])).logits[0].float() for prompt in prompts])


def last_stage(results: list[Tensor | None]) -> Tensor:
    return next(result for result in results if result is not None)


@pytest.fixture(scope="module")
def questions() -> list[list[int]]:
    """The first eight prompts of the demo, as its config puts them to the model."""
    if not SMOLLM2.is_dir():
        pytest.skip("no SmolLM2-135M-Instruct folder (make test makes it)")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    with open(ROOT / "launch" / "examples" / "prompts.jsonl", encoding="utf-8") as file:
        prompts = [json.loads(next(file))["prompt"] for _ in range(8)]
    system = {"role": "system", "content": "Answer briefly."}
    chats = [[system, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def exact(questions) -> Tensor:
    return peer_logits(SMOLLM2, questions, torch.float32)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_smollm2_logits_are_transformers(questions, exact, tp, pp):
    got = last_stage(run_ranks(rank_logits, tp * pp, SMOLLM2, questions, tp, pp, torch.float32, timeout=180))
    assert (got - exact).abs().max().item() < 1e-4


def test_smollm2_in_bf16_is_as_near_as_transformers_is(questions, exact):
    """The error against fp32 is at most 1.5 times that of transformers in bf16, in the mean and at the worst."""
    ours = (last_stage(run_ranks(rank_logits, 1, SMOLLM2, questions, 1, 1, torch.bfloat16)) - exact).abs()
    theirs = (peer_logits(SMOLLM2, questions, torch.bfloat16) - exact).abs()
    assert ours.mean() <= 1.5 * theirs.mean()
    assert ours.max() <= 1.5 * theirs.max()
