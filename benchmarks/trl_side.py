"""TRL's side of bench_preference.py: started by peer.py in TRL's environment, runs turns of whole steps on request.

    python -P trl_side.py JOB.json

JOB: the fields of bench_preference.py, and "rows", in the order of the steps: for sft input_ids and labels, for reward
chosen_ids and rejected_ids, for dpo prompt_ids, chosen_ids and rejected_ids, for kto prompt_ids, completion_ids and
label, for grpo prompts as text. Before the turns each of TRL's settings that can matter on a CPU runs two steps, and
the one with the fastest second step is used: bf16 weights or float32 ones under bf16 autocast; rows of a micro-batch
(small ones hold less padding); for SFT batches flattened to one sequence without padding; for GRPO transformers'
continuous batching. Gradient checkpointing, logging and saving are off. There is no liger-kernel for CPUs.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
from itertools import product

JSON = dict


def variety(prompts: list[str], completions: list[str], **fields: list) -> list[float]:
    """Reward of both sides: the fraction of a response's words that are distinct."""
    words = [completion.split() for completion in completions]
    return [len(set(found)) / max(1, len(found)) for found in words]


def variants(job: JSON) -> list[JSON]:
    """All settings to try."""
    least = {"kto": 2, "grpo": 1}.get(job["algorithm"], 1)  # KTO's partners come from its micro-batch
    sizes = sorted({max(least, job["batch"] // parts) for parts in (1, 2, 4, 8) if not job["batch"] % parts})
    weights = ("bfloat16", "float32") if job["dtype"] == "bfloat16" else ("float32",)
    settings = [{"weights": kind, "micro": size} for kind, size in product(weights, sizes)]
    if job["algorithm"] == "sft":
        settings += [{"weights": kind, "micro": job["batch"], "padding_free": True} for kind in weights]
    if job["algorithm"] == "grpo":
        settings += [{"weights": kind, "micro": job["batch"], "continuous": True} for kind in weights]
    return settings


def ends(model: str, tokenizer) -> list[int]:
    """Stop tokens of TRL's generation."""
    files = [os.path.join(model, name) for name in ("config.json", "generation_config.json")]
    found = {tokenizer.eos_token_id}
    for file in filter(os.path.isfile, files):
        with open(file) as text:
            named = json.load(text).get("eos_token_id") or []
        found.update([named] if isinstance(named, int) else named)
    return sorted(found)


def trainer_of(job: JSON, settings: JSON, rows: list[JSON], steps: int):
    """TRL's trainer over these rows in their order."""
    import trl  # in functions: bench_preference.py's reward and the tests import this file without TRL
    from datasets import Dataset
    from transformers import AutoTokenizer

    algorithm, micro = job["algorithm"], settings["micro"]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    options = {
        "output_dir": os.path.join(job["folder"], "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job["batch"] // micro,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": job["dtype"] == "bfloat16" and settings["weights"] == "float32",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": job["seed"],
        "model_init_kwargs": {"dtype": settings["weights"]},
    }
    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO"}[algorithm]
    Trainer, Config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    more = {}
    if algorithm == "grpo":
        options |= {
            "num_generations": job["group"],
            "max_completion_length": job["new_tokens"],
            # No early stop; continuous batching has no min_new_tokens.
            "generation_kwargs": {"suppress_tokens": ends(job["model"], tokenizer)},
            "temperature": 1.0,
            "shuffle_dataset": False,
            "beta": 0.0,
        }
        more["reward_funcs"] = variety
        if settings.get("continuous", False):  # by default its cache takes all memory
            longest = job["max_tokens"] + job["new_tokens"]
            pages = {"page_size": 16, "num_blocks": job["batch"] * -(-longest // 16)}
            options["use_transformers_continuous_batching"] = True
            options["transformers_continuous_batching_config"] = pages | {"max_batch_tokens": 4 * longest}
    else:
        free = settings.get("padding_free", False)
        options |= {"train_sampling_strategy": "sequential", "max_length": None if free else job["max_tokens"]}
        if free:
            options["padding_free"] = True
    if algorithm in ("dpo", "kto"):
        options["precompute_ref_log_probs"] = True

        class Tokenized(Trainer):
            """Rows of token ids need no preparation."""

            def _prepare_dataset(self, dataset, *args, **kwargs):
                return dataset

        Trainer = Tokenized
    if algorithm == "kto":  # as TRL pairs them: each prompt with the previous response of its micro-batch
        parts = [rows[i : i + micro] for i in range(0, len(rows), micro)]
        rows = [
            row | {"KL_completion_ids": part[i - 1]["completion_ids"]} for part in parts for i, row in enumerate(part)
        ]
    return Trainer(
        model=job["model"],
        args=Config(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )


def tokens_of(trainer) -> int:
    """Tokens trained on so far, as TRL counts them."""
    return int(getattr(trainer, "_total_train_tokens", 0) or trainer.state.num_input_tokens_seen)


def try_out(job: JSON, settings: JSON) -> float:
    """Seconds of a second step."""
    from transformers import TrainerCallback  # only in TRL's environment

    stamps = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(time.process_time() if job["threads"] == 1 else time.perf_counter())

    rows = job["rows"][: 2 * job["batch"] // (job["group"] if job["algorithm"] == "grpo" else 1)]
    trainer = trainer_of(job, settings, rows, 2)
    trainer.add_callback(Clock())
    trainer.train()
    return stamps[1] - stamps[0]


def main(path: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to standard error

    def reply(**fields) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    with open(path) as file:
        job = json.load(file)
    import torch  # only in TRL's environment
    import transformers
    import trl
    from transformers import TrainerCallback

    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    settings = job["settings"]
    if settings is None:
        seconds = []
        for each in variants(job):
            seconds.append(try_out(job, each))
            reply(settings=each, seconds=seconds[-1])
        settings = variants(job)[seconds.index(min(seconds))]
    size = job["batch"] // (job["group"] if job["algorithm"] == "grpo" else 1)
    trainer = trainer_of(job, settings, job["rows"], len(job["rows"]) // size)

    class Turns(TrainerCallback):
        """Waits for a request before a turn, and replies with its times and tokens."""

        start, cpu, tokens = 0.0, 0.0, 0

        def wait(self, control) -> None:
            if not sys.stdin.readline():
                control.should_training_stop = True
            self.start, self.cpu = time.perf_counter(), time.process_time()

        def on_train_begin(self, args, state, control, **kwargs):
            self.wait(control)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % job["steps"] == 0:
                seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
                tokens = tokens_of(trainer)
                reply(seconds=seconds, cpu_seconds=cpu, tokens=tokens - self.tokens)
                self.tokens = tokens
                self.wait(control)

    trainer.add_callback(Turns())
    versions = f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    reply(settings=settings, versions=versions)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
