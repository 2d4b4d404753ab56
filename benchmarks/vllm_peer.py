"""Script for an environment with vLLM, started by bench_generate.py (peer.py): generates once for each line it reads.

Job: {"model", "dtype", "device", "prompts": [[token id]], "new_tokens", "threads"}.
"""

# pyright: reportMissingImports=false

import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to standard error
    with open(path) as file:
        job = json.load(file)
    import vllm  # prints

    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    engine = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=max(map(len, job["prompts"])) + job["new_tokens"],
        max_num_seqs=len(prompts),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        # Its default takes nine tenths of the GPU, which it shares here.
        **({"gpu_memory_utilization": 0.4} if job["device"] == "cuda" else {"kv_cache_memory_bytes": 1 << 30}),
    )
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for turn, _ in enumerate(sys.stdin):
        sampling = vllm.SamplingParams(
            temperature=1.0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False, seed=turn
        )
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
