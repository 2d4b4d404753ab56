"""Script for vLLM's environment, started by test_vllm.py: serves folders and writes vLLM's greedy tokens.

    python -P vllm_side.py JOBS.json RESULTS.json

JOBS: {name: {"folder", "prompts": [[token id]], "tokens": new ones per prompt, "adapter": PEFT folder or absent}}.
RESULTS: {name: [[token id] per prompt], or a traceback}.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import traceback

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")


def generate(job: dict) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=job["folder"],
        dtype="float32",
        max_model_len=max(map(len, job["prompts"])) + job["tokens"],
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        **({"enable_lora": True, "max_lora_rank": 16, "max_loras": 1} if "adapter" in job else {}),
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    adapter = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = engine.generate(prompts, greedy, use_tqdm=False, lora_request=adapter)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(jobs: str, target: str) -> None:
    results: dict[str, list[list[int]] | str] = {}
    with open(jobs) as file:
        todo = json.load(file)
    for name, job in todo.items():
        try:
            results[name] = generate(job)
        except Exception:  # asserted by the job's test; the others continue
            results[name] = traceback.format_exc()
    with open(target, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
