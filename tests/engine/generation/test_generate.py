"""The generator against transformers and against full forwards, in one process and over tp and pp."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from safetensors.torch import load_file
from tiny import weight_pieces
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import Completion, Request, SamplingParams
from trialign.engine.generation.lane import sample_key
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.tensor import ParallelLinear
from trialign.kernels.linear import pack
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder, Head
from trialign.models.families.registry import from_hf_dict, read_config

VOCAB, LAYERS = 97, 4
LENGTHS = [1, 7, 3, 16, 2, 17, 5, 1, 9, 4]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]


@cache
def reference() -> LlamaForCausalLM:
    """A random tiny llama with grouped heads, scaled up so that its next tokens are far from ties."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts_of(LENGTHS)


def build(tp: int = 1, pp: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    """The reference's weights in this rank's shards."""
    config = reference().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    return filled(from_hf_dict(config), reference().state_dict(), tp, pp, dtype)


def filled(
    config: ModelConfig, state: dict[str, torch.Tensor], tp: int, pp: int, dtype: torch.dtype = torch.float32
) -> Decoder:
    decoder = Decoder(config, build_mesh(tp=tp, pp=pp), dtype=dtype)
    for name, piece, view in weight_pieces(decoder):
        part = state[name]
        for dim, (start, size) in enumerate(zip(piece.offset, piece.shape, strict=True)):
            part = part.narrow(dim, start, size)
        view.copy_(part)
    return decoder


def greedy_by_hand(prompt: list[int], count: int, banned: int | None = None, ban_for: int = 0) -> list[int]:
    """Greedy tokens by a full forward of transformers' model a token: no cache at all."""
    return list(_greedy(tuple(prompt), count, banned, ban_for))


@cache
@torch.no_grad()
def _greedy(prompt: tuple[int, ...], count: int, banned: int | None, ban_for: int) -> tuple[int, ...]:
    tokens = prompt
    for place in range(count):
        logits = reference()(torch.tensor([tokens])).logits[0, -1]
        if place < ban_for:
            logits[banned] = -torch.inf
        tokens += (int(logits.argmax()),)
    return tokens[len(prompt) :]


@torch.no_grad()
def forward_logprobs(prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-softmax of a full forward at each response token, [response, vocab]."""
    logits = reference()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return F.log_softmax(logits.double() / temperature, -1)


def generate(prompts=PROMPTS, ids=None, tp=1, pp=1, options: dict | None = None, **params) -> list[Completion]:
    decoder = build(tp, pp)
    generator = EmbeddedGenerator(decoder, decoder.mesh, **{"block_size": 4, **(options or {})})
    return generator.generate(prompts, list(range(len(prompts))) if ids is None else ids, SamplingParams(**params))


def rank_generate(rank: int, world: int, tp: int, pp: int, options: dict, params: dict) -> list[Completion]:
    return generate(tp=tp, pp=pp, options=options, **params)


def on_layout(tp: int, pp: int, options: dict, **params) -> list[Completion]:
    """Runs the layout and checks that all its ranks agree to the bit."""
    if tp * pp == 1:
        return generate(options=options, **params)
    results = run_ranks(rank_generate, tp * pp, tp, pp, options, params)
    assert all(result == results[0] for result in results), "ranks disagree"
    return results[0]


@pytest.mark.parametrize("tp, pp", [layout for layout in LAYOUTS if layout != (1, 4)])
@pytest.mark.parametrize("options", [{"max_running": 64}, {"max_running": 3, "prefill_tokens": 10}])
def test_greedy_is_transformers(tp, pp, options):
    result = on_layout(tp, pp, options, temperature=0, max_new_tokens=20)
    for prompt, completion in zip(PROMPTS, result, strict=True):
        expected = greedy_by_hand(prompt, 20)
        assert completion.tokens == expected
        assert completion.finish == "length"
        table = forward_logprobs(prompt, expected)
        got = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, table[range(20), expected], atol=2e-5, rtol=0)


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_samples_do_not_depend_on_the_layout(tp, pp):
    """With stops, waiting prompts and lanes that run empty: the tokens are those of one process."""
    params = {"temperature": 1.0, "max_new_tokens": 12, "stop_ids": (3, 50, 51, 52, 60, 61, 62, 63), "seed": 11}
    alone = [generate([p], [i], **params)[0] for i, p in enumerate(PROMPTS)]
    assert {c.finish for c in alone} == {"stop", "length"}
    result = on_layout(tp, pp, {"max_running": 4}, **params)
    assert [(c.tokens, c.finish) for c in result] == [(c.tokens, c.finish) for c in alone]
    for got, expected in zip(result, alone, strict=True):
        assert got.logprobs == pytest.approx(expected.logprobs, abs=2e-5)


def rank_slice(rank: int, world: int) -> list[list[int]]:
    decoder = build(tp=2)
    mesh = decoder.mesh
    mine = slice(0, 3) if mesh.dp.rank == 0 else slice(3, None)
    completions = EmbeddedGenerator(decoder, mesh).generate(
        PROMPTS[mine], list(range(10))[mine], SamplingParams(max_new_tokens=9, seed=4)
    )
    return [c.tokens for c in completions]


def test_data_parallel_ranks_generate_their_own_slices():
    whole = [c.tokens for c in generate(max_new_tokens=9, seed=4)]
    assert run_ranks(rank_slice, 4) == [whole[:3], whole[:3], whole[3:], whole[3:]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_logprobs_are_the_full_forwards(temperature):
    for prompt, c in zip(PROMPTS, generate(temperature=temperature, max_new_tokens=15, seed=3), strict=True):
        table = forward_logprobs(prompt, c.tokens, temperature)
        got = torch.tensor(c.logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, table[range(15), c.tokens], atol=3e-5, rtol=0)


def test_bf16_logprobs_are_near_the_exact_ones():
    """Decode's cache and products of few rows, against the fp32 model on the bf16 model's own tokens."""
    decoder = build(dtype=torch.bfloat16)
    result = EmbeddedGenerator(decoder, decoder.mesh, block_size=4, max_running=4).generate(
        PROMPTS, list(range(10)), SamplingParams(max_new_tokens=30, seed=3)
    )
    errors = []
    for prompt, c in zip(PROMPTS, result, strict=True):
        exact = forward_logprobs(prompt, c.tokens)[range(30), c.tokens]
        errors.append((torch.tensor(c.logprobs, dtype=torch.float64) - exact).abs())
    assert torch.cat(errors).mean() < 0.03 and torch.cat(errors).max() < 0.2


def test_samples_follow_the_distribution():
    """2,000 samples of one next token: frequencies within 5 standard errors of the model's probabilities."""
    count, prompt = 2000, PROMPTS[3]
    result = generate([prompt] * count, list(range(count)), max_new_tokens=1, options={"prefill_tokens": 3200})
    seen = torch.bincount(torch.tensor([c.tokens[0] for c in result]), minlength=VOCAB).double() / count
    expected = forward_logprobs(prompt, [0])[0].exp()
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((seen - expected).abs() <= 5 * error + 1e-3).all())
    assert len(set(c.tokens[0] for c in result)) > 5


def test_top_k_and_top_p():
    for k, p in ((3, 1.0), (0, 0.6), (5, 0.5)):
        for prompt, c in zip(PROMPTS, generate(top_k=k, top_p=p, max_new_tokens=10, temperature=1.5), strict=True):
            for row, token, logprob in zip(forward_logprobs(prompt, c.tokens, 1.5), c.tokens, c.logprobs, strict=True):
                probability, order = row.exp().sort(descending=True)
                if k:
                    probability[k:] = 0
                before = probability.cumsum(0) - probability
                probability[before >= p * probability.sum()] = 0
                allowed = dict(zip(order.tolist(), (probability / probability.sum()).log().tolist(), strict=True))
                assert allowed[token] == pytest.approx(logprob, abs=1e-4)


def test_seed_and_id_decide_the_sample_and_order_does_not():
    base = generate(max_new_tokens=8, seed=1)
    shuffled = generate(PROMPTS[::-1], list(range(len(PROMPTS)))[::-1], max_new_tokens=8, seed=1)
    assert [c.tokens for c in shuffled[::-1]] == [c.tokens for c in base]
    assert [c.tokens for c in generate(max_new_tokens=8, seed=2)] != [c.tokens for c in base]
    same = generate([PROMPTS[5]] * 3, [4, 9, 4], max_new_tokens=8)
    assert same[0] == same[2] and same[0].tokens != same[1].tokens


def test_keys_fill_64_bits_without_collisions():
    keys = [sample_key(seed, number) for seed in range(-3, 40) for number in range(100)]
    assert len(set(keys)) == len(keys)
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys) and min(keys) < 0 < max(keys)
    ones = sum(bin(key & (1 << 64) - 1).count("1") for key in keys) / (64 * len(keys))
    assert abs(ones - 0.5) < 0.01


@pytest.mark.parametrize("blocks", [6, 7, 30])
def test_a_small_pool_changes_nothing_but_time(blocks):
    """Room for one to a few sequences at once: 17 + 7 tokens take all of 6 blocks of 4."""
    per_block = 2 * LAYERS * 4 * 2 * 8 * 4  # keys and values, layers, block, kv heads, head_dim, bytes
    limited = generate(temperature=0, max_new_tokens=8, options={"cache_bytes": blocks * per_block + 5})
    assert [c.tokens for c in limited] == [greedy_by_hand(prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_sizes(block_size):
    result = generate(temperature=0, max_new_tokens=8, options={"block_size": block_size})
    assert [c.tokens for c in result] == [greedy_by_hand(prompt, 8) for prompt in PROMPTS]


def test_stop_ends_a_response_and_min_new_tokens_bans_it():
    prompt = PROMPTS[1]
    free = greedy_by_hand(prompt, 10)
    stop = free[4]
    cut = free.index(stop) + 1
    stopped = generate([prompt], temperature=0, max_new_tokens=10, stop_ids=(stop,))[0]
    assert (stopped.tokens, stopped.finish, len(stopped.logprobs)) == (free[:cut], "stop", cut)
    banned = generate([prompt], temperature=0, max_new_tokens=10, min_new_tokens=7, stop_ids=(stop,))[0]
    expected = greedy_by_hand(prompt, 10, stop, 7)
    assert stop not in banned.tokens[:7]
    assert banned.tokens == expected[: len(banned.tokens)]
    assert len(banned.tokens) == 10 or banned.tokens[-1] == stop


def test_weights_are_read_afresh_in_every_call():
    """The embedded generator runs the policy's own parameters: an update is in the next call without any sync."""
    decoder = build()
    generator = EmbeddedGenerator(decoder, decoder.mesh)
    params = SamplingParams(temperature=0, max_new_tokens=6)
    before = generator.generate(PROMPTS, list(range(10)), params)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = generator.generate(PROMPTS, list(range(10)), params)
    fresh = EmbeddedGenerator(decoder, decoder.mesh).generate(PROMPTS, list(range(10)), params)
    assert after == fresh and after != before
    assert all(p.requires_grad and not p.is_inference() for p in decoder.parameters())


@pytest.mark.skipif(pack(torch.zeros(8, 8).bfloat16()) is None, reason="this processor has no bf16 in oneDNN")
@pytest.mark.parametrize("tokens, packed", [(64, 4 * LAYERS + 1), (2, 0)])
def test_packed_copies_live_as_long_as_requests_run(tokens, packed):
    """Of qkv, output, gate_up and down of each layer, and the head; two tokens do not pay for packing."""
    decoder = build(dtype=torch.bfloat16)
    linears = [module for module in decoder.modules() if isinstance(module, ParallelLinear | Head)]
    generator = EmbeddedGenerator(decoder, decoder.mesh)
    generator.add(Request([1, 2], 0, SamplingParams(max_new_tokens=tokens)))
    generator.step()
    assert sum(linear.packed is not None for linear in linears) == packed
    while generator.busy:
        generator.step()
    assert not any(linear.packed is not None for linear in linears)


def test_no_prompts_no_completions():
    assert generate([]) == []


@pytest.mark.parametrize(
    "kwargs, parts",
    [
        ({"prompts": [[1], []]}, ("sample 1", "empty")),
        ({"prompts": [[1, VOCAB]]}, ("sample 0", "vocabulary of 97")),
        ({"prompts": [[-1]]}, ("sample 0", "vocabulary of 97")),
        ({"prompts": [[1]], "ids": [1, 2]}, ("1 prompts", "2 sample ids")),
        ({"prompts": [[1] * 100], "max_new_tokens": 29}, ("100 tokens", "max_new_tokens=29", "128 positions")),
        ({"stop_ids": (VOCAB,)}, ("stop id 97", "vocabulary of 97")),
        ({"options": {"cache_bytes": 2000}}, ("sample 0", "max_new_tokens=8", "2 cache blocks", "cache_bytes=2000")),
        ({"options": {"max_running": 0}}, ("max_running=0",)),
        ({"options": {"block_size": 0}}, ("block_size=0",)),
        ({"temperature": -0.1}, ("temperature=-0.1",)),
        ({"temperature": float("nan")}, ("temperature=nan",)),
        ({"top_k": -1}, ("top_k=-1",)),
        ({"top_p": 0.0}, ("top_p=0.0",)),
        ({"top_p": 1.1}, ("top_p=1.1",)),
        ({"max_new_tokens": 0}, ("max_new_tokens=0",)),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, ("min_new_tokens=5", "max_new_tokens=4")),
    ],
)
def test_refusals(kwargs, parts):
    with pytest.raises(ValueError) as error:
        generate(**{"max_new_tokens": 8, **kwargs})
    assert all(part in str(error.value) for part in parts)


SMOLLM2 = Path(os.environ.get("TRIALIGN_SMOLLM2", "models_hf/SmolLM2-135M-Instruct")).absolute()
QUESTIONS = ["What is the capital of France?", "Write a haiku about rain.", "Why is the sky blue?", "2 + 2 ="]


def rank_smollm2(rank: int, world: int, tp: int, pp: int, prompts: list[list[int]]) -> list[list[int]]:
    decoder = filled(read_config(SMOLLM2), load_file(SMOLLM2 / "model.safetensors"), tp, pp)
    generator = EmbeddedGenerator(decoder, decoder.mesh, max_running=3)
    params = SamplingParams(temperature=0, max_new_tokens=64)
    return [c.tokens for c in generator.generate(prompts, list(range(len(prompts))), params)]


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no SmolLM2-135M-Instruct folder (make ppo makes it)")
def test_smollm2_greedy_is_transformers():
    """The real weights in fp32: the same 64 greedy tokens in one process, over tp=2 (9 heads, 3 for keys) and pp=2."""
    tokenizer = AutoTokenizer.from_pretrained(str(SMOLLM2))
    prompts = [tokenizer(question).input_ids for question in QUESTIONS]
    peer: Any = AutoModelForCausalLM.from_pretrained(str(SMOLLM2), dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None  # both run on past the end of the answer
    settings = GenerationConfig(do_sample=False, max_new_tokens=64)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        expected.append(out[0, len(prompt) :].tolist())
    del peer
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        for result in run_ranks(rank_smollm2, tp * pp, tp, pp, prompts, timeout=180):
            assert result == expected, f"tp={tp} pp={pp}"
