"""Logits of the real SmolLM2 against transformers, in one process, tp and pp; FLOPs against torch's counter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT
from harness import run_ranks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import shapes, stage_forward
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.collectives import all_gather
from trialign.engine.pipeline.runner import run_schedule
from trialign.engine.pipeline.schedule import forward_only
from trialign.engine.pipeline.stage import Chunk
from trialign.models.decoder import Decoder
from trialign.models.families.registry import from_hf_dict, read_config
from trialign.models.flops import forward_flops
from trialign.models.hf.load import load_hf


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
    from transformers import AutoModelForCausalLM

    peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return torch.cat([peer(torch.tensor([prompt])).logits[0].float() for prompt in prompts])


def test_smollm2_logits_equal_transformers(smollm2):
    """In bf16 the error against fp32 is at most 1.5 times that of transformers, in the mean and at the maximum."""
    from transformers import AutoTokenizer

    with open(ROOT / "launch" / "examples" / "prompts.jsonl", encoding="utf-8") as file:
        chats = [[{"role": "user", "content": json.loads(next(file))["prompt"]}] for _ in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    exact = peer_logits(smollm2, prompts, torch.float32)
    for tp, pp, dtype in ((1, 1, torch.float32), (2, 1, torch.float32), (1, 2, torch.float32), (1, 1, torch.bfloat16)):
        results = run_ranks(rank_logits, tp * pp, smollm2, prompts, tp, pp, dtype, timeout=180)
        error = (next(result for result in results if result is not None) - exact).abs()
        if dtype == torch.float32:
            assert error.max().item() < 1e-4, (tp, pp)
        else:
            peer_error = (peer_logits(smollm2, prompts, dtype) - exact).abs()
            assert error.mean() <= 1.5 * peer_error.mean() and error.max() <= 1.5 * peer_error.max()


DENSE: dict[str, Any] = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 3, "head_dim": 16}
DENSE |= {"intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
MOE = DENSE | {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False, "moe_intermediate_size": 24}
MOE |= {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]}


@pytest.mark.parametrize(("family", "sizes"), [("Llama", DENSE), ("Qwen2Moe", MOE)])
def test_flops_equal_torchs_count(family, sizes):
    """Of an MoE model those of the experts that a token takes."""
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = config._experts_implementation = "eager"
    shape = from_hf_dict({**config.to_dict(), "architectures": [f"{family}ForCausalLM"]})
    n = 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(transformers, f"{family}ForCausalLM")(config)(torch.arange(n)[None])
    masked = 3 * 4.0 * shape.num_heads * shape.head_dim * (n * n - n * (n + 1) // 2)  # computed by eager attention
    counted = counter.get_total_flops() - masked
    assert forward_flops(shape, [n], logits=n) == counted
    assert forward_flops(shape, [n, n]) == 2 * (counted - 2 * 48 * 128 * n)
