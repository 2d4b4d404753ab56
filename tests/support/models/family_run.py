"""Logits, gradients and greedy tokens of model folders by trialign, in any layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import run_ranks
from peft_case import build
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.roles.role import shapes, stage_forward
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.collectives import all_gather
from trialign.engine.parallel.shard import shard_of
from trialign.engine.parallel.tensor import parallel_logprob
from trialign.engine.pipeline.runner import run_schedule
from trialign.engine.pipeline.schedule import forward_only, one_f_one_b
from trialign.engine.pipeline.stage import Chunk
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.table import hf_name, parts_by_tensor

NEW_TOKENS = 12
_generator = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 96, (n,), generator=_generator).tolist() for n in (7, 20, 2, 13)]
LONG = [torch.randint(3, 96, (n,), generator=_generator).tolist() for n in (7, 40, 16, 17, 33, 2)]


def room_for(config: ModelConfig, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The prompts with room for NEW_TOKENS."""
    return [prompt for prompt in prompts if len(prompt) + NEW_TOKENS <= config.longest_rollout]


def whole_logits(model: Decoder, batch: Batch) -> Tensor | None:
    """[total, vocab] on the last stage, None elsewhere. Collective."""
    mesh = model.mesh

    def forward(chunk: Chunk, _: int, x: Tensor | None) -> Tensor:
        hidden = stage_forward(model, batch, x, chunk=chunk)
        return all_gather(model.logits(hidden), mesh.tp, 1, model.vocab.sizes) if chunk.has_head else hidden

    results = run_schedule(forward_only, model.stage, mesh, shapes(model, [batch]), model.dtype, forward)
    return results[0] if results else None


def run_folder(folder: Path, prompts: list[list[int]], tp: int, pp: int, ep: int) -> dict[str, Any]:
    """This rank's logits (last stage), tokens, and pieces of the gradient of the mean logprob."""
    mesh = build_mesh(tp=tp, pp=pp, ep=ep)
    model = build(folder, mesh)
    batch = pack(prompts, [[False] + [True] * (len(prompt) - 1) for prompt in prompts])

    def loss(chunk: Chunk, _: int, x: Tensor | None) -> Tensor:
        hidden = stage_forward(model, batch, x, chunk=chunk)
        if not chunk.has_head:
            return hidden
        rows = hidden[batch.response - 1]
        return -parallel_logprob(rows, model.head_weight(), batch.labels, model.vocab)[0].mean()

    logits, short = whole_logits(model, batch), room_for(model.config, prompts)
    greedy = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    generator = EmbeddedGenerator(model, mesh, block_size=4, max_running=3)
    completions = generator.generate(short, list(range(len(short))), greedy)
    run_schedule(one_f_one_b, model.stage, mesh, shapes(model, [batch]), model.dtype, loss)
    gradients = []
    for name, parameter in model.named_parameters():
        begin, shard = 0, shard_of(parameter)
        # Every DP rank runs the whole batch here; an expert receives tokens from all EP ranks.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient / ep if shard.experts else gradient
        for piece in shard.pieces:
            rows = gradient[begin : begin + piece.shape[0]].clone()
            gradients.append((name, piece, rows))
            begin += piece.shape[0]
    return {"logits": logits, "tokens": [c.tokens for c in completions], "gradients": gradients}


def rank_runs(
    rank: int, world: int, folders: Mapping[str, Path], prompts: list[list[int]], tp: int, pp: int, ep: int
) -> dict[str, Any]:
    return {name: run_folder(folder, prompts, tp, pp, ep) for name, folder in folders.items()}


def as_trialign(
    folders: Mapping[str, Path], tp: int, pp: int, ep: int = 1, prompts: list[list[int]] = PROMPTS
) -> dict[str, dict[str, Any]]:
    """By folder: logits [tokens, vocab], gradients by Hugging Face's names, greedy tokens of `room_for` prompts; all
    ranks must agree."""
    results = run_ranks(rank_runs, tp * pp * ep, dict(folders), prompts, tp, pp, ep, timeout=180)
    return {name: merge_ranks([result[name] for result in results], folder) for name, folder in folders.items()}


def merge_ranks(ranks: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    merged: dict[tuple[str, str], Tensor] = {}
    for name, piece, rows in (entry for rank in ranks for entry in rank["gradients"]):
        full = merged.setdefault((name, piece.part), torch.full(piece.global_shape, torch.nan))
        place = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        present = ~full[place].isnan()
        torch.testing.assert_close(rows[present], full[place][present], rtol=1e-5, atol=1e-6)
        full[place] = rows
    parts: dict[str, Tensor] = {}
    for (name, part), full in merged.items():
        assert not full.isnan().any(), f"{name} {part}: elements that no rank has a gradient of"
        tensor = hf_name(name, part, config)
        parts[tensor] = parts[tensor] + full if tensor in parts else full  # both copies of a tied embedding
    assert all(rank["tokens"] == ranks[0]["tokens"] for rank in ranks), "ranks sampled different tokens"
    logits = next(rank["logits"] for rank in ranks if rank["logits"] is not None)
    return {
        "logits": logits,
        "gradients": {n: torch.cat([parts[p] for p in ps]) for n, ps in parts_by_tensor(parts, config).items()},
        "tokens": ranks[0]["tokens"],
    }


def assert_same(got: Tensor, expected: Tensor, name: str) -> None:
    """Within 1e-5 of the largest element; or of 0.02, for tensors of sums that nearly cancel."""
    error = (got.double() - expected.double()).abs().max().item()
    assert got.shape == expected.shape and error <= 1e-5 * max(0.02, expected.abs().max().item()), f"{name}: {error}"


def assert_agrees(got: dict[str, Any], logits: Tensor, gradients: Mapping[str, Tensor], tokens: Any, name: str) -> None:
    """`as_trialign`'s result has a reference's logits, gradients and first greedy tokens."""
    assert_same(got["logits"], logits, f"{name}: logits")
    assert got["gradients"].keys() == gradients.keys()
    for tensor, gradient in gradients.items():
        assert_same(got["gradients"][tensor], gradient, f"{name}: gradient of {tensor}")
    assert got["tokens"][: len(tokens)] == tokens, name


def rank_scores(rank: int, world: int, folders: dict[str, Path]) -> dict[str, Tensor]:
    """Scores of the prompts' last tokens by each folder's model with a score head, under tp=world."""
    found = {}
    for name, folder in folders.items():
        model, batch = build(folder, build_mesh(tp=world), head="score"), pack(PROMPTS)
        with torch.no_grad():
            found[name] = model.scores(stage_forward(model, batch, None)[batch.last])
    return found
