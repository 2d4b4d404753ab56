"""Generator as a service: requests are added and aborted and weights change while it runs, in several layouts."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from tiny import VOCAB
from tiny_moe import MIXTRAL, moe_config, moe_decoder, world_of
from trialign.algorithms.micro_batch import contiguous_part
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import Completion, Interrupted, Request, SamplingParams
from trialign.engine.generation.kv_cache import PagedCache
from trialign.engine.mesh import build_mesh
from trialign.engine.profiler import Profiler
from trialign.kernels.attention import packed_attention
from trialign.models.decoder import Decoder
from trialign.models.flops import forward_flops

LAYOUTS: list[dict[str, Any]] = [{}, {"tp": 2, "pp": 2}, {"pp": 2, "dp": 2, "ep": 2}]
OPTIONS: dict[str, Any] = {"block_size": 4, "max_running": 3, "prefill_tokens": 16}
PARAMS = [
    SamplingParams(max_new_tokens=12, stop_ids=tuple(range(3, 10)), temperature=1.2, seed=5),
    SamplingParams(max_new_tokens=3, temperature=0),
    SamplingParams(max_new_tokens=20, min_new_tokens=6, stop_ids=tuple(range(40)), top_k=30, seed=1),
    SamplingParams(max_new_tokens=9, top_p=0.8, temperature=0.7, seed=2),
]
ARRIVALS = [0, 0, 0, 2, 2, 3, 7, 8, 8, 24, 24, 25]  # step before which a request is added
ABORTS = {4: 4, 7: 9, 1: 45, 2: 5}  # request: step before which it is aborted


def request(number: int) -> Request:
    length = 1 + 5 * (number % 4)
    prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    return Request(prompt, 100 + number, PARAMS[number % len(PARAMS)])


def decoder(sizes: dict[str, Any], scale: float = 1.0, moe: bool = False) -> Decoder:
    """A model with experts if `moe`; its logits depend on `scale`."""
    model = moe_decoder(moe_config(MIXTRAL if moe else None), build_mesh(**sizes))
    if model.norm is not None:
        model.norm.weight.data *= scale
    return model


@cache
def alone(moe: bool) -> list[Completion]:
    """Each request by itself in one process."""
    model = decoder({}, moe=moe)
    requests = [request(number) for number in range(len(ARRIVALS))]
    return [EmbeddedGenerator(model, model.mesh).generate([r.prompt], [r.sample_id], r.params)[0] for r in requests]


def run(function: Any, sizes: dict[str, Any], *args: Any) -> list[Any]:
    """Results of all ranks of a layout."""
    return run_ranks(function, world_of(sizes), sizes, *args, timeout=180) if sizes else [function(0, 1, {}, *args)]


def serve(rank: int, world: int, sizes: dict[str, Any], blocks: int, lag: int) -> dict[int, tuple[int, Completion]]:
    """Request -> (step that returned its completion, completion), for the requests of this DP rank."""
    model = decoder(sizes, moe="ep" in sizes)
    size = PagedCache.bytes_per_block(model.kv_shape, 4, model.dtype)
    options = OPTIONS | {"cache_bytes": blocks * size if blocks else None, "lag": lag}
    generator, numbers = EmbeddedGenerator(model, model.mesh, **options), {}
    collected, dp = {}, model.mesh.dp
    for step in range(30 + 20 * model.mesh.pp.size):
        for number, arrival in enumerate(ARRIVALS):
            if arrival == step and number % dp.size == dp.rank:
                numbers[generator.add(request(number))] = number
            if ABORTS.get(number) == step and number % dp.size == dp.rank:
                generator.abort(next(i for i, n in numbers.items() if n == number))
        collected |= {numbers[completion.id]: (step, completion) for completion in generator.step()}
    assert not generator.busy and generator.runner.cache is None
    assert bool(generator.scheduler.preemptions) == bool(blocks) or dp.size > 1
    assert generator.scheduler.idle and generator.scheduler.pool.free_blocks == generator.scheduler.pool.num_blocks
    return collected


@pytest.mark.parametrize(
    ("sizes", "blocks", "lag"),
    [*((sizes, 0, 0) for sizes in LAYOUTS), *((sizes, 9, 0) for sizes in LAYOUTS), ({}, 0, 1), ({"tp": 2}, 9, 1)],
    ids=str,
)
def test_tokens_do_not_depend_on_other_requests(sizes, blocks, lag):
    """Nor on the blocks of the cache, 9 of which hold the longest request, or on steps planned ahead."""
    results = run(serve, sizes, blocks, lag)
    collected = results[0]
    for result in results:
        assert all(collected.setdefault(number, value) == value for number, value in result.items()), "ranks disagree"
    assert collected.keys() == set(range(len(ARRIVALS)))
    for number, expected in enumerate(alone("ep" in sizes)):
        completion = collected[number][1]
        count = len(completion.tokens)
        if completion.finish == "abort":
            assert number in ABORTS and count < len(expected.tokens)
        else:
            assert (count, completion.finish) == (len(expected.tokens), expected.finish)
        assert completion.tokens == expected.tokens[:count] and completion.versions == [0] * count
        assert completion.logprobs == pytest.approx(expected.logprobs[:count], abs=2e-5)
    assert {completion.finish for _, completion in collected.values()} == {"stop", "length", "abort"}


def generate(rank: int, world: int, sizes: dict[str, Any], count: int, options: dict[str, Any]) -> list[Completion]:
    """Completions of this DP rank's part of `count` prompts."""
    model = decoder(sizes, moe=True)
    numbers = list(range(count))[contiguous_part(count, model.mesh.dp)]
    prompts = [request(number).prompt for number in numbers]
    return EmbeddedGenerator(model, model.mesh, block_size=4, **options).generate(prompts, numbers, PARAMS[0])


@pytest.mark.parametrize(
    ("sizes", "count"),
    [({"ep": 2}, 0), ({"dp": 4, "ep": 2}, 7), ({"tp": 2, "ep": 2}, 7), ({"pp": 2, "ep": 2}, 1)],
    ids=str,
)
def test_uneven_prompts_of_ep_ranks(sizes, count):
    """Ranks of an ep group with different numbers of prompts, or none."""
    expected = generate(0, 1, {}, count, {})
    tp, pp = sizes.get("tp", 1), sizes.get("pp", 1)
    results = run(generate, sizes, count, {"max_running": 2, "prefill_tokens": 8})
    dp = len(results) // (tp * pp)
    for stage in range(pp):
        for place in range(tp):
            got = [c for d in range(dp) for c in results[(stage * dp + d) * tp + place]]
            assert [(c.tokens, c.finish) for c in got] == [(c.tokens, c.finish) for c in expected]
            for found, alone in zip(got, expected, strict=True):
                assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@torch.no_grad()
def forward_logprobs(model: Decoder, prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
    """Logprobs of the response tokens by a full forward in one process."""
    text = torch.tensor(prompt + tokens)
    starts = torch.tensor([0, len(text)])

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(q, k, v, starts, len(text), **model.attention_options(layer))

    logits = model.logits(model(text, torch.arange(len(text)), attend))[len(prompt) - 1 : -1]
    return F.log_softmax(logits.double() / temperature, -1)[range(len(tokens)), tokens].tolist()


def reload(rank: int, world: int, sizes: dict[str, Any], in_place: bool) -> list[Completion]:
    """Three requests of which two run and one waits when the weights change."""
    model = decoder(sizes, moe="ep" in sizes)
    options: dict[str, Any] = OPTIONS | {"max_running": 2, "version": 7}
    generator = EmbeddedGenerator(model, model.mesh, **options)
    params = SamplingParams(max_new_tokens=14, seed=3)
    ids = [generator.add(Request(request(number).prompt, number, params)) for number in (3, 1, 2)]
    done = [completion for _ in range(9) for completion in generator.step()]
    if in_place:
        generator.pause()
        before = generator.scheduler.done
        assert not generator.step() and not generator.step() and generator.scheduler.done == before
        if model.norm is not None:
            model.norm.weight.data *= 1.5
        generator.load(model, 8)
        assert not generator.step() and generator.scheduler.done == before, "not resumed yet"
        generator.resume()
    else:
        generator.load(decoder(sizes, 1.5, "ep" in sizes), 8)
    for _ in range(40 * model.mesh.pp.size):
        done += generator.step()
    assert not generator.busy
    return sorted(done, key=lambda completion: ids.index(completion.id))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "pp": 2}, {"dp": 2, "ep": 2}], ids=str)
def test_tokens_carry_the_version_of_their_weights(sizes, in_place):
    """Logprobs are those of a full forward with that version, in requests that run across the change too."""
    results = run(reload, sizes, in_place)
    assert all(result == results[0] for result in results)
    models = {version: decoder({}, scale, "ep" in sizes) for version, scale in ((7, 1.0), (8, 1.5))}
    for number, completion in zip((3, 1, 2), results[0], strict=True):
        by_version = {v: forward_logprobs(m, request(number).prompt, completion.tokens, 1.0) for v, m in models.items()}
        expected = [by_version[version][place] for place, version in enumerate(completion.versions)]
        assert completion.logprobs == pytest.approx(expected, abs=2e-5)
        assert completion.versions == sorted(completion.versions) and len(completion.tokens) == 14
    assert [set(completion.versions) for completion in results[0]] == [{7, 8}, {7, 8}, {8}]


def interrupt(rank: int, world: int, sizes: dict[str, Any]) -> tuple[list[Completion], float, float]:
    """Completions after an interrupted call, and the tokens and FLOPs that the profiler counted."""
    model = decoder(sizes)
    mesh, calls = model.mesh, iter(range(100))
    profiler = Profiler(mesh, peak=1.0)
    generator = EmbeddedGenerator(model, mesh, **OPTIONS, profiler=profiler)
    generator.interrupted = lambda: mesh.tp.rank == 0 and next(calls) == 5
    prompts, numbers, params = [request(number).prompt for number in range(5)], list(range(5)), PARAMS[0]
    with pytest.raises(Interrupted):
        generator.generate(prompts, numbers, params)
    assert not generator.busy and generator.runner.cache is None
    with pytest.raises(ValueError, match="request id 99"):
        generator.abort(99)
    other = generator.add(request(1))
    with profiler("rollout"):
        completions = generator.generate(prompts[: 5 - mesh.dp.rank], numbers[: 5 - mesh.dp.rank], params)
    assert [(c.id, c.tokens) for c in generator.step()] == [(other, alone(False)[1].tokens)]
    metrics = profiler.take()
    seconds = metrics["seconds/rollout"]
    return completions, metrics["tokens_per_s/rollout"] * seconds, metrics["mfu/rollout"] * seconds * world


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "pp": 2}, {"dp": 2}], ids=str)
def test_interrupted_generator_works_again_and_reports(sizes):
    """One rank sees the interruption; a request that `generate` did not add is collected by `step`."""
    results = run(interrupt, sizes)
    expected, tokens, flops = results[0][0], 0, 0.0
    for rank in range(sizes.get("dp", 1)):
        numbers, completions = [*range(5 - rank), 1], [*expected[: 5 - rank], alone(False)[1]]
        lengths = [len(request(n).prompt) + len(c.tokens) for n, c in zip(numbers, completions, strict=True)]
        sampled = sum(len(c.tokens) for c in completions)
        tokens, flops = tokens + sampled, flops + forward_flops(moe_config(None), lengths, sampled)
    for completions, counted_tokens, counted_flops in results:
        assert completions == expected[: len(completions)]
        assert (counted_tokens, counted_flops) == pytest.approx((tokens, flops))
