"""Tokens per second of the embedded generator beside Hugging Face's generate, in one process, taking turns.

    python benchmarks/bench_generate.py --model DIR --batch 32 --prompt-tokens 16 --new-tokens 64 --dtype bfloat16

With --vllm PYTHON, the interpreter of an environment with vLLM, a process of its own takes turns too.
Random prompts, sampled at temperature 1, no early stop. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peer import Peer
from ranks import refuse_ranks
from transformers import AutoModelForCausalLM, GenerationConfig
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.load import load_hf


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a causal language model")
    parser.add_argument("--batch", type=int, default=32, help="prompts, all running at once")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, after one warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face's generate out")
    parser.add_argument("--vllm", default="", help="Python of an environment with vLLM (default: leave vLLM out)")
    return parser.parse_args()


def embedded(args: argparse.Namespace, prompts: torch.Tensor) -> Callable[[int], None]:
    mesh = build_mesh(device=args.device)
    model = Decoder(read_config(args.model), mesh, dtype=getattr(torch, args.dtype))
    load_hf(model, args.model)
    generator = EmbeddedGenerator(model, mesh, max_running=args.batch)
    rows = prompts.tolist()

    def run(seed: int) -> None:
        params = SamplingParams(temperature=1.0, max_new_tokens=args.new_tokens, seed=seed)
        completions = generator.generate(rows, list(range(len(rows))), params)
        assert all(len(c.tokens) == args.new_tokens for c in completions)

    return run


def hugging_face(args: argparse.Namespace, prompts: torch.Tensor) -> Callable[[int], None]:
    model: Any = AutoModelForCausalLM.from_pretrained(str(args.model), dtype=getattr(torch, args.dtype)).to(args.device)
    # Not the folder's config, which may set top-p or other processors that slow it down.
    model.generation_config = GenerationConfig(pad_token_id=0)
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.new_tokens, pad_token_id=0)
    ids = prompts.to(args.device)

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert out.shape[1] == args.prompt_tokens + args.new_tokens

    return run


def vllm(args: argparse.Namespace, prompts: torch.Tensor, stack: ExitStack) -> Callable[[int], None]:
    job = {"model": str(args.model), "dtype": args.dtype, "device": args.device, "new_tokens": args.new_tokens}
    job |= {"prompts": prompts.tolist(), "threads": torch.get_num_threads()}
    folder = Path(stack.enter_context(TemporaryDirectory()))
    peer = Peer(args.vllm, Path(__file__).with_name("vllm_peer.py"), job, folder)
    stack.callback(peer.close)
    print(f"vLLM {peer.read()['version']}", flush=True)

    def run(seed: int) -> None:
        assert peer.turn()["tokens"] == prompts.shape[0] * args.new_tokens

    return run


def main() -> None:
    args = arguments()
    refuse_ranks("bench_generate.py")
    vocab = read_config(args.model).vocab_size
    prompts = torch.randint(vocab, (args.batch, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        runs = {"trialign": embedded(args, prompts)} | ({} if args.no_peer else {"hf": hugging_face(args, prompts)})
        runs |= {"vllm": vllm(args, prompts, stack)} if args.vllm else {}
        for repeat in range(args.repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run(repeat)
                rate = args.batch * args.new_tokens / (time.perf_counter() - start)
                if repeat:
                    rates.setdefault(name, []).append(rate)
                    print(f"run {repeat}  {name:8}  {rate:7.1f} tokens/s", flush=True)
    result = {name: statistics.median(values) for name, values in rates.items()}
    report = {"tokens_per_s": round(result["trialign"], 1)}
    if "hf" in result:
        report |= {"hf_tokens_per_s": round(result["hf"], 1), "ratio": round(result["trialign"] / result["hf"], 3)}
    if "vllm" in result:
        report |= {"vllm_tokens_per_s": round(result["vllm"], 1)}
        report |= {"vllm_ratio": round(result["trialign"] / result["vllm"], 3)}
    keys = ("batch", "prompt_tokens", "new_tokens", "dtype", "repeats")
    report |= {key: getattr(args, key) for key in keys} | {"threads": torch.get_num_threads()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
