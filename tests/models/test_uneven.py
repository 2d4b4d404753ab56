"""Sizes that tp or pp do not divide: their partition, and training, adapters and rollouts in such layouts."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from family_run import as_trialign, assert_agrees
from layouts import Layout, assert_layouts_agree
from peft_case import take_steps
from tiny import tiny_llama
from tiny_moe import moe_config
from trialign.engine.mesh import mesh_as
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.shard import split
from trialign.models.decoder import Heads
from trialign.models.lora import TARGETS

# No tp from 2 to 6 divides the vocabulary or the MLP; 4 and 5 do not divide the heads, 2 not the key/value heads.
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 67}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 3}
SMALL: dict[str, Any] = SIZES | {"vocab_size": 5}


def test_split_is_even_or_in_whole_tiles():
    for ranks, size in product((1, 2, 3, 7, 8), (1, 5, 8, 96, 97, 448, 1000, 1536, 32_001, 49_153, 128_256)):
        parts = split(size, mesh_as(0, tp=ranks, pp=1).tp)
        assert parts.total == size == sum(parts.sizes) and parts.start == 0
        assert min(parts.sizes) > 0 or size < ranks
        if size % ranks == 0:
            assert len(set(parts.sizes)) == 1
        elif size >= 64 * ranks:  # all but the last are whole tiles
            assert all(part % 64 == 0 for part in parts.sizes[:-1])
            assert max(parts.sizes) - min(parts.sizes[:-1], default=0) <= 64
        else:
            assert max(parts.sizes) - min(parts.sizes) == 1


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (14, 2), (32, 8), (12, 1), (6, 3)])
def test_ranks_have_equal_query_groups_per_kv_head(heads, kv_heads):
    config = moe_config(None, num_heads=heads, num_kv_heads=kv_heads)
    for ranks in range(1, min(heads, kv_heads * config.head_dim) + 1):  # as check_layout allows
        seen = []
        for rank in range(ranks):
            queries, kv, used = Heads.of(config, mesh_as(rank, tp=ranks, pp=1).tp)
            own = range(queries.start, queries.start + queries.size)
            assert queries.size % len(used) == 0 and {head // (heads // kv_heads) for head in own} == set(used)
            assert kv.total == kv_heads * config.head_dim and kv.size > 0
            if kv_heads >= ranks:
                assert (kv.start, kv.size) == (used.start * config.head_dim, len(used) * config.head_dim)
            seen += own
        assert seen == list(range(heads))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("uneven"), tied=request.param, **SIZES)


def test_lora_layouts_agree(folder):
    """All targets, the head too."""
    layouts = [Layout(tp=2, pp=2), Layout(tp=5)]
    assert_layouts_agree(take_steps, layouts, folder, LoRA(4, 8.0, ("all",)), tolerance=2e-5)


def test_qlora_layouts_agree(tmp_path):
    """Four heads of 64 over three ranks, and four tiles of the MLP: whole blocks of NF4 on each."""
    folder = tiny_llama(tmp_path, vocab_size=97, hidden_size=128, intermediate_size=256, head_dim=64)
    lora = LoRA(4, 8.0, TARGETS, quantize=True)
    assert_layouts_agree(take_steps, [Layout(tp=3)], folder, lora, tolerance=2e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_vocabulary_smaller_than_tp(tied, tmp_path):
    """Five tokens over six ranks, the first of which has none."""
    folder = tiny_llama(tmp_path, tied=tied, **SMALL)
    prompts = [[3, 4, 1, 2], [4], [0, 3, 3, 1, 4, 2, 3]]
    alone, got = (as_trialign({"small": folder}, tp, 1, prompts=prompts)["small"] for tp in (1, 6))
    assert_agrees(got, name="small", **alone)
    assert_layouts_agree(take_steps, [Layout(tp=6)], folder, None)
