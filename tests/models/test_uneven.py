"""Sizes that tp or pp do not divide: how they are shared, and training, adapters and rollouts over such shares."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_run import as_trialign, assert_same
from harness import run_ranks
from layouts import assert_close
from peft_case import two_steps
from tiny import tiny_llama
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import Completion, SamplingParams
from trialign.engine.mesh import build_mesh, mesh_as
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.shard import split
from trialign.models.decoder import Decoder, Heads
from trialign.models.families.registry import from_hf_dict, read_config
from trialign.models.hf.load import load_hf
from trialign.models.lora import TARGETS

# No tp from 2 to 6 divides the vocabulary or the MLP; 4 and 5 do not divide the heads, 2 not the key/value heads.
SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 67},
    **{"num_attention_heads": 6, "num_key_value_heads": 3},
}


SMALL: dict[str, Any] = SIZES | {"vocab_size": 5}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
def test_shares(ranks):
    tp = mesh_as(0, tp=ranks, pp=1).tp
    for size in (1, 5, 8, 96, 97, 448, 1000, 1536, 32_001, 49_153, 128_256):
        shares = split(size, tp)
        assert shares.total == size == sum(shares.sizes) and shares.start == 0
        assert min(shares.sizes) > 0 or size < ranks
        if size % ranks == 0:
            assert len(set(shares.sizes)) == 1
        elif size >= 64 * ranks:  # all but the last are whole tiles
            assert all(share % 64 == 0 for share in shares.sizes[:-1])
            assert max(shares.sizes) - min(shares.sizes[:-1], default=0) <= 64
        else:
            assert max(shares.sizes) - min(shares.sizes) == 1
    assert split(32_001, mesh_as(0, tp=2, pp=1).tp).sizes == [16_000, 16_001]


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (14, 2), (32, 8), (12, 1), (6, 3)])
def test_every_rank_has_queries_of_its_key_value_heads_in_equal_groups(heads, kv_heads):
    config = from_hf_dict(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8 * heads, "vocab_size": 9}
        | {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads, "rms_norm_eps": 1e-5}
        | {"num_key_value_heads": kv_heads, "max_position_embeddings": 64}
    )
    group = heads // kv_heads
    for ranks in range(1, min(heads, kv_heads * config.head_dim) + 1):  # what check_layout allows
        seen = []
        for rank in range(ranks):
            queries, kv, used = Heads.of(config, mesh_as(rank, tp=ranks, pp=1).tp)
            mine = range(queries.start, queries.start + queries.size)
            assert queries.size % len(used) == 0 and {head // group for head in mine} == set(used)
            assert kv.total == kv_heads * config.head_dim and kv.size > 0
            if kv_heads >= ranks:
                assert (kv.start, kv.size) == (used.start * config.head_dim, len(used) * config.head_dim)
            seen += mine
        assert seen == list(range(heads))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("uneven"), tied=request.param, **SIZES)


def test_adapters_equal_one_process(folder):
    """Gradients, moments and weights of adapters in every linear, the head's too. B begins at 0, so that its rounding
    is relative to two small steps."""
    lora = LoRA(4, 8.0, ("all",))
    alone = two_steps(0, 1, folder, lora, None, (1, 1, 1))
    for layout in ((2, 2, 1), (5, 1, 1)):
        for got in run_ranks(two_steps, math.prod(layout), folder, lora, None, layout):
            assert_close(got, alone, 2e-5)


def test_qlora_equals_one_process(tmp_path):
    """Four heads of 64 over three ranks, and four tiles of the MLP: whole blocks of NF4 on each."""
    folder = tiny_llama(tmp_path, vocab_size=97, hidden_size=128, intermediate_size=256, head_dim=64)
    lora = LoRA(4, 8.0, TARGETS, quantize=True)
    alone = two_steps(0, 1, folder, lora, None, (1, 1, 1))
    for got in run_ranks(two_steps, 3, folder, lora, None, (3, 1, 1)):
        assert_close(got, alone, 2e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_vocabulary_smaller_than_tp(tied, tmp_path):
    """Five tokens over six ranks: the first has none, and takes part."""
    folder = tiny_llama(tmp_path, tied=tied, **SMALL)
    prompts = [[3, 4, 1, 2], [4], [0, 3, 3, 1, 4, 2, 3]]
    alone = as_trialign({"small": folder}, 1, 1, prompts=prompts)["small"]
    got = as_trialign({"small": folder}, 6, 1, prompts=prompts)["small"]
    assert got["tokens"] == alone["tokens"]
    assert_same(got["logits"], alone["logits"], "logits")
    for name, gradient in alone["gradients"].items():
        assert_same(got["gradients"][name], gradient, name)
    trained = two_steps(0, 1, folder, None, None, (1, 1, 1))
    for ours in run_ranks(two_steps, 6, folder, None, None, (6, 1, 1)):
        assert_close(ours, trained)


def sampled(rank: int, world: int, folder: Path, tp: int, pp: int) -> list[Completion]:
    """With a cache of few blocks, of which ranks with more heads need more bytes."""
    mesh = build_mesh(tp=tp, pp=pp)
    model = Decoder(read_config(folder), mesh, dtype=torch.float32)
    load_hf(model, folder)
    params = SamplingParams(max_new_tokens=12, min_new_tokens=3, stop_ids=(2, 50, 96), top_p=0.95, seed=5)
    generator = EmbeddedGenerator(model, mesh, block_size=4, max_running=3, cache_bytes=40_000)
    prompts = [[5, 96, 7], [9], [95, 96] * 6, [1, 2, 3, 4, 5]]
    return generator.generate(prompts, list(range(len(prompts))), params)


def test_samples_are_those_of_one_process(folder):
    alone = sampled(0, 1, folder, 1, 1)
    assert {c.finish for c in alone} == {"stop", "length"}
    for tp, pp in ((2, 1), (2, 2), (4, 1), (1, 3)):
        for got in run_ranks(sampled, tp * pp, folder, tp, pp):
            assert [(c.tokens, c.finish) for c in got] == [(c.tokens, c.finish) for c in alone]
            for one, other in zip(got, alone, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
