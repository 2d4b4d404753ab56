"""Every family in transformers: equal logits, gradients and greedy tokens, in several layouts."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import PEERS, SPARSE, peer_class, peer_config, randomize, tiny_family
from family_run import LONG, NEW_TOKENS, PROMPTS, as_trialign, assert_agrees, assert_same, rank_scores, room_for
from harness import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trialign.models.families.registry import read_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peers")
    return {name: tiny_family(root / name, name, seed=2) for name in PEERS}


@cache
def reference(name: str, folder: Path, long: bool = False) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    """transformers' logits [tokens, vocab], gradients of the mean logprob by name on disk, greedy tokens."""
    model: Any = peer_class(name).from_pretrained(folder, dtype=torch.float32).eval()
    prompts = LONG if long else PROMPTS

    def alone(prompt: list[int]) -> Tensor:
        with torch.no_grad():
            model(torch.tensor([[5]]))  # resets dynamic NTK's base, which is that of the longest document so far
        return model(torch.tensor([prompt])).logits[0]

    logits = [alone(prompt) for prompt in prompts]
    pairs = zip(logits, prompts, strict=True)
    losses = [F.cross_entropy(part[:-1], torch.tensor(p[1:]), reduction="sum") for part, p in pairs]
    (torch.stack(losses).sum() / sum(len(p) - 1 for p in prompts)).backward()
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    short = room_for(read_config(folder), prompts)
    tokens = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in short]
    # Saved as weights, so that gradients get the names on disk (fused experts, tied weights).
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder / "gradients")
    return torch.cat(logits).detach(), load_file(folder / "gradients" / "model.safetensors"), tokens


def assert_equal_transformers(folders: dict[str, Path], *layout: int, long: bool = False) -> None:
    for name, got in as_trialign(folders, *layout, prompts=LONG if long else PROMPTS).items():
        logits, gradients, tokens = reference(name, folders[name], long)
        assert_agrees(got, logits, gradients, tokens, name)
        assert len(got["tokens"]) == len(tokens)


# tp=4 exceeds the key/value heads of most: ranks hold fractions of a head. tp=3 divides no head count.
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (3, 1), (4, 1)])
def test_all_families_equal_transformers(folders, tp, pp):
    assert_equal_transformers(folders, tp, pp)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_dynamic_ntk_past_the_trained_length_equals_transformers(folders, tp, pp):
    """Trained on 16 positions; documents of 2 to 40 tokens in one batch, each with its own base."""
    assert_equal_transformers({"llama-dynamic": folders["llama-dynamic"]}, tp, pp, long=True)


def test_expert_parallelism_equals_transformers(folders):
    assert_equal_transformers({name: folders[name] for name in SPARSE}, 3, 1, 2)


def test_score_heads_equal_transformers(tmp_path):
    """Reward models of every class: the score of each prompt's last token; in one process and under tp=2."""
    folders, expected = {}, {}
    for name in ("llama-biases", "mistral", "qwen2", "qwen3", "mixtral", "qwen2-moe", "qwen3-moe"):
        config = peer_config(name)
        config.num_labels = 1
        model = peer_class(name, "ForSequenceClassification")(config).eval()
        randomize(dict(model.named_parameters()), 5)
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
        with torch.no_grad():
            expected[name] = torch.stack([model(torch.tensor([p])).logits[0, 0] for p in PROMPTS])
    for world in (1, 2):
        for found in run_ranks(rank_scores, world, folders):
            for name, scores in found.items():
                assert_same(scores, expected[name], f"{name}, tp={world}")
