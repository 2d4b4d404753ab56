"""Logits of the real SmolLM2 against transformers, in one process, tp and pp; FLOPs against torch's counter."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from families import peer_class, peer_config, values_of
from family_run import whole_logits
from harness import run_ranks
from layouts import ALONE, TWO_RANKS, Layout
from peft_case import build, peer_logits
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from trialign.algorithms.batch import pack
from trialign.models.families.registry import from_hf_dict
from trialign.models.flops import forward_flops


def rank_logits(rank: int, world: int, layout: Layout, folder: Path, prompts: list[list[int]], dtype: torch.dtype):
    return whole_logits(build(folder, layout.mesh(), dtype=dtype), pack(prompts))


def test_smollm2_logits_equal_transformers(smollm2):
    """In bf16 the error against fp32 is at most 1.5 times that of transformers, in the mean and at the maximum."""
    with open(ROOT / "launch" / "examples" / "prompts.jsonl", encoding="utf-8") as file:
        chats = [[{"role": "user", "content": json.loads(next(file))["prompt"]}] for _ in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    peers = (AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    exact, rounded = (peer_logits(peer, prompts) for peer in peers)
    for layout in (ALONE, *TWO_RANKS[:2]):
        results = run_ranks(rank_logits, layout.world, layout, smollm2, prompts, torch.float32, timeout=180)
        got = next(result for result in results if result is not None)
        assert (got - exact).abs().max().item() < 1e-4, layout
    got = rank_logits(0, 1, ALONE, smollm2, prompts, torch.bfloat16)
    assert got is not None
    error, peer_error = (got - exact).abs(), (rounded - exact).abs()
    assert error.mean() <= 1.5 * peer_error.mean() and error.max() <= 1.5 * peer_error.max()


@pytest.mark.parametrize("name", ["llama", "qwen2-moe"])
def test_flops_equal_torchs_count(name):
    """Of an MoE model those of the experts that a token takes."""
    config = peer_config(name)
    config._attn_implementation = config._experts_implementation = "eager"
    shape, n = from_hf_dict(values_of(name)), 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer_class(name)(config)(torch.arange(n)[None])
    masked = n * n - n * (n + 1) // 2  # pairs that eager attention computes too
    counted = counter.get_total_flops() - shape.num_layers * 4.0 * shape.num_heads * shape.head_dim * masked
    assert forward_flops(shape, [n], logits=n) == counted
    assert forward_flops(shape, [n, n]) == 2 * (counted - 2 * shape.hidden_size * shape.vocab_size * n)
