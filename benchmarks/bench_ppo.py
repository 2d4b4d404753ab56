"""Whole PPO iterations with all four roles on random prompts: seconds, samples/s, tokens/s, seconds by phase.

    python benchmarks/bench_ppo.py --model DIR --prompts 16 --prompt-tokens 32 --new-tokens 48 --iters 4
    torchrun --nproc-per-node N benchmarks/bench_ppo.py --model DIR --tp 2

The reward is a model with a scalar head (the given model's body, a random head); no early stop; one epoch of
one minibatch. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from trialign.algorithms.batch import Prompt, from_rollouts
from trialign.algorithms.config.common import ParallelConfig, RolloutConfig
from trialign.algorithms.config.online import OnlineRunConfig
from trialign.algorithms.config.ppo import PPOConfig, PPOData, PPOModels, PPOOptions
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.ppo import update, with_forward_passes, with_rewards
from trialign.algorithms.roles.build import build_ppo_roles, read_shapes
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.sync import sample, sampling_params
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.mesh import build_mesh, check_layout
from trialign.engine.precision import sum_products_in_fp32
from trialign.engine.profiler import Profiler, data_sheet_peak, matmul_peak
from trialign.models.decoder import Decoder
from trialign.models.hf.load import load_hf


@dataclass(frozen=True)
class Bench:
    model: str
    """folder in Hugging Face format"""
    prompts: int = 16
    """prompts of an iteration"""
    prompt_tokens: int = 32
    """random tokens of a prompt"""
    new_tokens: int = 48
    """tokens of a response"""
    iters: int = 4
    """iterations; the first is left out of the median"""
    micro: int = 16
    """samples of a micro-batch"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype; master weights are float32"""
    tp: int = 1
    """tensor-parallel size"""
    pp: int = 1
    """pipeline stages"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(bench: Bench) -> None:
    try:
        dp = check_layout(int(os.environ.get("WORLD_SIZE", "1")), tp=bench.tp, pp=bench.pp)
        if bench.prompts % dp:
            raise ValueError(f"prompts={bench.prompts} do not divide by dp={dp}")
    except ValueError as error:  # the same error on every rank
        raise SystemExit(f"error: {error}") from None
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if bench.device == "cuda" else "gloo")
    config = PPOConfig(
        model=PPOModels(path=bench.model, dtype=bench.dtype),
        data=PPOData(max_prompt_tokens=bench.prompt_tokens),
        rollout=RolloutConfig(max_new_tokens=bench.new_tokens),
        parallel=ParallelConfig(tp=bench.tp, pp=bench.pp),
        ppo=PPOOptions(micro_batch_size=bench.micro),
        run=OnlineRunConfig(steps=bench.iters, prompts_per_step=bench.prompts),
    )
    sum_products_in_fp32()  # as launch/common/env.py
    mesh = build_mesh(tp=bench.tp, pp=bench.pp, device=bench.device)
    shapes = read_shapes(config)
    shape = shapes[bench.model]
    phases = Profiler(mesh)
    roles = build_ppo_roles(config, shapes, mesh, phases)
    dtype = roles.actor.model.dtype
    phases.peak = matmul_peak(dtype, mesh.device)
    if mesh.device.type == "cuda":
        phases.data_sheet = data_sheet_peak(dtype, torch.cuda.get_device_name(mesh.device))
    reward = Decoder(shape, mesh, dtype=dtype, head="score").requires_grad_(False)
    load_hf(reward, bench.model, new_head="normal")
    roles.rewards.append(Role(reward, sizes=config.ppo, profiler=phases))
    generator = EmbeddedGenerator(roles.actor.model, mesh, profiler=phases)
    params = sampling_params(config.rollout, stop_ids=(), seed=config.run.seed)  # no early stop
    random = torch.Generator().manual_seed(0)
    history = []
    for step in range(bench.iters):
        tokens = torch.randint(shape.vocab_size, (bench.prompts, bench.prompt_tokens), generator=random).tolist()
        prompts = [Prompt(step * bench.prompts + i, row, "") for i, row in enumerate(tokens)]
        with phases("rollout"):
            batch = from_rollouts(sample(generator, prompts, params)).to(mesh.device)
            batch = batch.with_(minibatches=draw_minibatches(len(batch), config.ppo, seed=step))
        with phases("score"):
            scores = roles.rewards[0].scores(batch)
            batch = with_forward_passes(batch, roles, config)
            batch, metrics = with_rewards(batch, scores, config, config.ppo.kl_coef)
        metrics |= update(roles, batch, config)  # opens its own phase
        with phases("sync"):
            generator.load(roles.actor.model, step + 1)
        history.append(phases.take())
        if mesh.is_main:
            print(f"iteration {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in history[-1].items() if "mem" not in k))
    if mesh.is_main:
        medians = {name: statistics.median(h[name] for h in history[1:] or history) for name in history[0]}
        seconds = medians["seconds/step"]
        result = {
            "s_per_iter": round(seconds, 3),
            "samples_per_s": round(bench.prompts / seconds, 3),
            "tokens_per_s": round(bench.prompts * (bench.prompt_tokens + bench.new_tokens) / seconds, 1),
            "phases": {name: round(medians[f"seconds/{name}"], 3) for name in ("rollout", "score", "update", "sync")},
            "mfu": round(medians["mfu/step"], 3),
        }
        if phases.data_sheet is not None:
            result["mfu_data_sheet"] = round(medians["mfu_data_sheet/step"], 3)
        print(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
