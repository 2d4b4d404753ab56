"""Embedded generator against transformers and full forwards, in one process and over tp and pp."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from tiny import weight_pieces
from transformers import LlamaConfig, LlamaForCausalLM
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import Completion, Request, SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.tensor import ParallelLinear
from trialign.models.decoder import Decoder, Head
from trialign.models.families.registry import from_hf_dict

VOCAB, LAYERS = 97, 4
LENGTHS = [1, 7, 3, 16, 2, 17, 5, 1, 9, 4]
BYTES_PER_TOKEN = 2 * LAYERS * 2 * 8 * 4  # keys and values, layers, kv heads, head_dim, bytes


@cache
def reference() -> LlamaForCausalLM:
    """A random tiny llama with grouped heads and weights so large that its next tokens are far from ties."""
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


PROMPTS = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]


def build(tp: int = 1, pp: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    """The reference's weights in this rank's shards."""
    config = reference().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    decoder = Decoder(from_hf_dict(config), build_mesh(tp=tp, pp=pp), dtype=dtype)
    for name, piece, view in weight_pieces(decoder):
        at = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        view.copy_(reference().state_dict()[name][at])
    return decoder


@cache
@torch.no_grad()
def greedy(number: int, count: int, banned: int | None = None, ban_for: int = 0) -> list[int]:
    """Greedy tokens after a prompt, each by a full forward of transformers' model, without a cache."""
    tokens = list(PROMPTS[number])
    for position in range(count):
        logits = reference()(torch.tensor([tokens])).logits[0, -1]
        if position < ban_for:
            logits[banned] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[-count:]


@torch.no_grad()
def forward_logprobs(prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-softmax of a full forward at each response token, [response, vocab]."""
    logits = reference()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return F.log_softmax(logits.double() / temperature, -1)


def generate(prompts=PROMPTS, ids=None, tp=1, pp=1, options: dict | None = None, **params) -> list[Completion]:
    decoder = build(tp, pp)
    generator = EmbeddedGenerator(decoder, decoder.mesh, **{"block_size": 4, **(options or {})})
    return generator.generate(prompts, list(range(len(prompts))) if ids is None else ids, SamplingParams(**params))


def rank_greedy(rank: int, world: int, tp: int, pp: int, options: dict) -> list[Completion]:
    return generate(tp=tp, pp=pp, options=options, temperature=0, max_new_tokens=20)


@pytest.mark.parametrize(
    "tp, pp, options",
    [
        (2, 2, {"max_running": 64}),
        (1, 2, {"max_running": 3, "prefill_tokens": 10}),
        (1, 1, {"block_size": 3, "cache_bytes": 12 * BYTES_PER_TOKEN * 3}),  # one sequence at a time fits
    ],
)
def test_greedy_tokens_equal_transformers(tp, pp, options):
    result, *others = run_ranks(rank_greedy, tp * pp, tp, pp, options)
    assert all(other == result for other in others), "ranks differ"
    for number, completion in enumerate(result):
        expected = greedy(number, 20)
        assert (completion.tokens, completion.finish) == (expected, "length")
        logprobs = forward_logprobs(PROMPTS[number], expected)[range(20), expected]
        assert completion.logprobs == pytest.approx(logprobs.tolist(), abs=2e-5)


def test_bf16_logprobs_are_close_to_fp32():
    """On the bf16 model's own tokens."""
    decoder = build(dtype=torch.bfloat16)
    result = EmbeddedGenerator(decoder, decoder.mesh, block_size=4, max_running=4).generate(
        PROMPTS, list(range(10)), SamplingParams(max_new_tokens=30, seed=3)
    )
    errors = []
    for prompt, c in zip(PROMPTS, result, strict=True):
        exact = forward_logprobs(prompt, c.tokens)[range(30), c.tokens]
        errors.append((torch.tensor(c.logprobs, dtype=torch.float64) - exact).abs())
    assert torch.cat(errors).mean() < 0.03 and torch.cat(errors).max() < 0.2


def test_top_k_and_top_p_restrict_and_renormalize():
    """And logprobs are those of a full forward."""
    for k, p in ((0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5)):
        for prompt, c in zip(PROMPTS, generate(top_k=k, top_p=p, max_new_tokens=10, temperature=1.5), strict=True):
            for row, token, logprob in zip(forward_logprobs(prompt, c.tokens, 1.5), c.tokens, c.logprobs, strict=True):
                probability, order = row.exp().sort(descending=True)
                if k:
                    probability[k:] = 0
                before = probability.cumsum(0) - probability
                probability[before >= p * probability.sum()] = 0
                allowed = dict(zip(order.tolist(), (probability / probability.sum()).log().tolist(), strict=True))
                assert allowed[token] == pytest.approx(logprob, abs=1e-4)


def test_samples_depend_on_seed_and_id_not_order():
    base = generate(max_new_tokens=8, seed=1)
    shuffled = generate(PROMPTS[::-1], list(range(len(PROMPTS)))[::-1], max_new_tokens=8, seed=1)
    assert [c.tokens for c in shuffled[::-1]] == [c.tokens for c in base]
    assert [c.tokens for c in generate(max_new_tokens=8, seed=2)] != [c.tokens for c in base]
    same = generate([PROMPTS[5]] * 3, [4, 9, 4], max_new_tokens=8)
    assert same[0].tokens == same[2].tokens and same[0].tokens != same[1].tokens
    assert same[0].logprobs == pytest.approx(same[2].logprobs, abs=2e-5)


def test_stop_ids_end_a_response_after_min_new_tokens():
    prompt = PROMPTS[1]
    free = greedy(1, 10)
    stop, cut = free[4], free.index(free[4]) + 1
    stopped = generate([prompt], temperature=0, max_new_tokens=10, stop_ids=(stop,))[0]
    assert (stopped.tokens, stopped.finish, len(stopped.logprobs)) == (free[:cut], "stop", cut)
    banned = generate([prompt], temperature=0, max_new_tokens=10, min_new_tokens=7, stop_ids=(stop,))[0]
    assert stop not in banned.tokens[:7]
    assert banned.tokens == greedy(1, 10, stop, 7)[: len(banned.tokens)]
    assert len(banned.tokens) == 10 or banned.tokens[-1] == stop


def test_weights_are_frozen_while_requests_run():
    """qkv, output, gate_up and down of each layer, and the head."""
    decoder = build(dtype=torch.bfloat16)
    linears = [module for module in decoder.modules() if isinstance(module, ParallelLinear | Head)]
    generator = EmbeddedGenerator(decoder, decoder.mesh)
    generator.add(Request([1, 2], 0, SamplingParams(max_new_tokens=64)))
    generator.step()
    assert sum(linear.frozen for linear in linears) == 4 * LAYERS + 1
    while generator.busy:
        generator.step()
    assert not any(linear.frozen for linear in linears)


def test_bfloat16_tokens_do_not_depend_on_threads():
    prompts, threads = [[1, 2, 3], [4], [5, 6]], torch.get_num_threads()
    params = SamplingParams(max_new_tokens=20, seed=3)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            decoder = build(dtype=torch.bfloat16)
            results.append(EmbeddedGenerator(decoder, decoder.mesh).generate(prompts, [0, 1, 2], params))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    "kwargs, parts",
    [
        ({"prompts": [[1], []]}, ("sample 1", "empty")),
        ({"prompts": [[1, VOCAB]]}, ("sample 0", "97")),
        ({"prompts": [[1]], "ids": [1, 2]}, ("1 prompts", "2 sample ids")),
        ({"prompts": [[1] * 100], "max_new_tokens": 29}, ("100 tokens", "max_new_tokens=29", "128")),
        ({"stop_ids": (VOCAB,)}, ("stop id 97",)),
        ({"options": {"cache_bytes": 2000}}, ("sample 0", "max_new_tokens=8", "cache_bytes=2000")),
        ({"options": {"max_running": 0}}, ("max_running=0",)),
        ({"options": {"block_size": 0}}, ("block_size=0",)),
        ({"temperature": float("nan")}, ("temperature=nan",)),
        ({"top_k": -1}, ("top_k=-1",)),
        ({"top_p": 0.0}, ("top_p=0.0",)),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, ("min_new_tokens=5", "max_new_tokens=4")),
    ],
)
def test_invalid_values_are_refused(kwargs, parts):
    with pytest.raises(ValueError) as error:
        generate(**{"max_new_tokens": 8, **kwargs})
    assert all(part in str(error.value) for part in parts)
