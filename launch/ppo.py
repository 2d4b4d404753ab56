"""Aligns a language model with rewards by PPO, on any number of ranks.

    python launch/ppo.py --config launch/configs/ppo_smollm2.toml
    torchrun --nproc-per-node 8 launch/ppo.py --config my.toml --parallel.tp 2 --parallel.pp 2 --actor.optimizer.lr 1e-6
    torchrun ... launch/ppo.py --resume runs/ppo

`train` is the algorithm, one line a phase: prompt -> rollout -> score -> advantage -> update -> weight sync.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from report import completion_table, plot
from trialign.algorithms.batch import Rollout, from_rollouts
from trialign.algorithms.build import build_roles, load_tokenizer, read_shapes, trained_entries
from trialign.algorithms.config import PPOConfig, check
from trialign.algorithms.data import PromptDataset, TextDataset
from trialign.algorithms.kl import KLController
from trialign.algorithms.ppo import Roles, plan, score, update, with_rewards
from trialign.algorithms.rewards import RewardShaper, combine
from trialign.algorithms.rollout import Scorer, my_part, sample, sampling_params
from trialign.engine import checkpoint
from trialign.engine.config import flatten, parse
from trialign.engine.config import save as save_config
from trialign.engine.logging import MetricLog, Progress
from trialign.engine.mesh import Mesh
from trialign.engine.phases import Phases, forward_flops, matmul_peak
from trialign.engine.rollout.generate import Generator
from trialign.models.config import ModelConfig
from trialign.models.export import assets, export_checkpoint
from trialign.models.hf import stop_ids
from world import is_main, mesh_of, rank_prefix, world_size


class Run:
    """Everything of a run that outlives a step, and how it is saved and taken up again."""

    def __init__(self, config: PPOConfig, mesh: Mesh, shapes: dict[str, ModelConfig], tokenizer):
        self.config, self.mesh, self.tokenizer = config, mesh, tokenizer
        self.folder = Path(config.run.folder)
        self.shape = shapes[config.model.path]
        self.dataset = PromptDataset(config.data, tokenizer, config.run.seed)
        place = self.dataset.state()
        self.shown = self.dataset.next(config.run.show)  # the same before and after, and after a resume
        self.dataset.load_state(place)
        self.text = None
        if config.actor.ptx_coef:
            data = config.data
            self.text = TextDataset(data.ptx_source, data.ptx_key, tokenizer, data.ptx_tokens, config.run.seed)
        self.scorer = Scorer(config.reward, tokenizer, mesh)
        self.roles: Roles = build_roles(config, shapes, mesh)
        self.shaper = RewardShaper(config.reward)
        self.kl = KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
        self.generator = Generator(
            self.roles.actor.model, mesh, block_size=config.rollout.kv_block, max_running=config.rollout.max_running
        )
        self.sampling = sampling_params(config, stop_ids(config.model.path, self.shape))
        self.step = 0

    def save(self) -> None:
        """Writes a checkpoint of this step. Collective."""
        streams = {"data": self.dataset.state(), "text": self.text.state() if self.text else None}
        state = {
            "step": self.step,
            "kl_coef": self.kl.coef,
            "reward": self.shaper.state(),
            "optimizer_steps": [self.roles.actor.optimizer.steps, self.roles.critic.optimizer.steps],
            **streams,
        }
        sources = {"actor": self.config.model.path, "critic": self.config.model.critic or self.config.model.path}
        files = {name: path for role, source in sources.items() for name, path in assets(source, f"{role}/").items()}
        root, keep = self.folder / "checkpoints", self.config.run.keep
        checkpoint.save(root, self.step, trained_entries(self.roles), state, self.mesh, keep=keep, assets=files)

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, written in any layout. Collective."""
        path = checkpoint.latest(self.folder / "checkpoints", self.mesh)
        state = checkpoint.load(path, trained_entries(self.roles), self.mesh)
        self.step, self.kl.coef = state["step"], state["kl_coef"]
        self.shaper.load_state(state["reward"])
        self.dataset.load_state(state["data"])
        if self.text and not state["text"]:
            raise ValueError(f"{path}: saved without a pretraining mix; set actor.ptx_coef to 0 to resume it")
        if self.text:
            self.text.load_state(state["text"])
        for learner, steps in zip((self.roles.actor, self.roles.critic), state["optimizer_steps"], strict=True):
            learner.optimizer.loaded(steps)

    def answer_shown(self) -> list[tuple[str, str, float]]:
        """(prompt, greedy answer, score) for the first `run.show` prompts of the data. Collective."""
        prompts = self.shown
        if not prompts:
            return []
        greedy = replace(self.sampling, temperature=0.0, top_k=0, top_p=1.0)
        rollouts = sample(self.generator, prompts, greedy)
        batch = from_rollouts(rollouts).to(self.mesh.device)
        mine = list(range(len(batch))[my_part(len(batch), self.mesh.dp)])
        scores = self.scorer(rollouts, batch, self.roles.rewards, [mine] if mine else [])
        combined = combine(scores, self.config.reward.weights)
        texts = self.tokenizer.batch_decode([r.tokens for r in rollouts], skip_special_tokens=True)
        return [(prompt.text, text, s) for prompt, text, s in zip(prompts, texts, combined, strict=True)]


def train(run: Run, phases: Phases, log: MetricLog, progress: Progress) -> None:
    """PPO from the run's step to its last."""
    config, roles = run.config, run.roles
    while run.step < config.run.steps:
        prompts = run.dataset.next(config.run.prompts_per_step)

        with phases("rollout") as phase:  # prompt -> rollout
            rollouts = sample(run.generator, prompts, run.sampling, config.rollout.samples_per_prompt)
            batch = from_rollouts(rollouts).to(run.mesh.device)
            epochs = plan(batch, config, run.mesh, seed=(config.run.seed << 32) + run.step)
            shares = [share for minibatch in epochs[0] for share in minibatch.shares]
            phase.tokens = len(batch.response)
            phase.flops = forward = forward_flops(run.shape, batch.lengths, len(batch.response))

        with phases("score") as phase:  # rollout -> rewards, reference logprobs, values
            scores = run.scorer(rollouts, batch, roles.rewards, shares)
            combined = combine(scores, config.reward.weights)
            rewards = run.shaper(combined, [rollout.finish == "stop" for rollout in rollouts])
            batch = score(batch, roles, config, shares)
            body = forward_flops(run.shape, batch.lengths)
            phase.tokens = len(batch.tokens)
            passes = 1 + (batch.logprobs is not None), len(roles.rewards) + (batch.values is not None)
            phase.flops = forward * passes[0] + body * passes[1]

        with phases("update") as phase:  # rewards -> advantages -> new weights
            batch, metrics = with_rewards(batch, torch.tensor(rewards), config, run.kl.coef)
            text = run.text.next(config.batch_size // config.ppo.minibatches).tolist() if run.text else ()
            train_actor = run.step >= config.critic.warmup_steps
            metrics |= update(roles, batch, epochs, config, train_actor=train_actor, ptx=text)
            run.kl.update(metrics["kl"], len(batch))
            phase.tokens = len(batch.tokens) * config.ppo.epochs
            phase.flops = 3 * config.ppo.epochs * (body + forward * train_actor)

        with phases("sync"):  # weights -> generator
            run.generator.load(roles.actor.model)

        run.step += 1
        metrics |= summary(rollouts, scores, combined, rewards) | phases.take()
        metrics["tokens_per_s"] = len(batch.tokens) / metrics["seconds/step"]
        log(run.step - 1, metrics)
        progress.update(run.step, metrics)
        if run.step == config.run.steps or (config.run.save_every and run.step % config.run.save_every == 0):
            run.save()


def summary(
    rollouts: list[Rollout], scores: dict[str, list[float]], combined: list[float], rewards: list[float]
) -> dict[str, float]:
    """What the answers were like: reward before and after shaping, each reward by name, lengths."""
    count = len(rollouts)
    lengths = [len(rollout.tokens) for rollout in rollouts]
    return {
        "reward": sum(combined) / count,
        "reward_shaped": sum(rewards) / count,
        **{f"reward/{Path(name).name}": sum(values) / count for name, values in scores.items()},
        "response_length": sum(lengths) / count,
        "response_length_max": max(lengths),
        "finished": sum(rollout.finish == "stop" for rollout in rollouts) / count,
    }


def main(argv: list[str]) -> None:
    config = parse(PPOConfig, argv, prog="ppo.py", quiet=not is_main())
    try:
        check(config, world_size())
        shapes = read_shapes(config)
        tokenizer = load_tokenizer(config.model.path, shapes[config.model.path])
        execute(config, shapes, tokenizer)
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"{rank_prefix()}error: {error}")


def execute(config: PPOConfig, shapes: dict[str, ModelConfig], tokenizer) -> None:
    """Sets up, trains, and leaves the exported model, the plot and the table of answers in the run's folder."""
    folder = Path(config.run.folder)
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(config.parallel))
        run = Run(config, mesh, shapes, tokenizer)
        stack.callback(run.scorer.close)
        if config.run.resume:
            run.resume()
        if mesh.is_main:
            prepare(folder, config)
        phases = Phases(mesh.device, mesh.world.size, peak=matmul_peak(run.roles.actor.model.dtype, mesh.device))
        log = stack.enter_context(
            MetricLog(
                folder, backends=config.run.log, start_step=run.step, config=flatten(config), enabled=mesh.is_main
            )
        )
        progress = stack.enter_context(Progress(config.run.steps, done=run.step, enabled=mesh.is_main))
        progress.say(f"{folder}: {run.dataset}; {mesh}; {config.model.dtype}; from step {run.step}")
        before = remember(folder / "before.json", run)
        train(run, phases, log, progress)
        after = run.answer_shown()
        progress.close()
        if mesh.is_main:
            exported = export(run)
            picture = plot(folder / "metrics.jsonl", folder / "ppo.png")
            progress.say(completion_table(before, after))
            progress.say(f"model: {exported}\nplot:  {picture}")


def prepare(folder: Path, config: PPOConfig) -> None:
    """Makes the run's folder and writes the config that a resume starts from.

    A new run in a used folder sets the old run's checkpoints aside, so that no resume takes them for its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    used = folder / "checkpoints"
    if not config.run.resume and used.exists():
        shutil.rmtree(folder / "checkpoints_of_the_run_before", ignore_errors=True)
        used.rename(folder / "checkpoints_of_the_run_before")
    save_config(replace(config, run=replace(config.run, output=str(folder), resume="")), folder / "config.toml")


def export(run: Run) -> Path:
    """The last checkpoint's actor as a Hugging Face folder, its average beside it; written whole, then swapped."""
    checkpoint_ = run.folder / "checkpoints" / f"step_{run.step}"
    dtype = getattr(torch, run.config.model.dtype)
    exported = run.folder / "model"
    for weights in ("master", "ema") if run.config.actor.ema_decay else ("master",):
        folder = exported if weights == "master" else run.folder / "model_ema"
        aside = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        export_checkpoint(checkpoint_, aside, weights=weights, dtype=dtype)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    return exported


def remember(path: Path, run: Run) -> list[tuple[str, str, float]]:
    """The shown answers of the model as it was before the first step; a resumed run finds them in its folder."""
    if run.step and path.exists():
        rows = [tuple(row) for row in json.loads(path.read_text(encoding="utf-8"))]
        run.shown = run.shown[: len(rows)]
        return rows[: len(run.shown)]
    answers = run.answer_shown()
    if run.mesh.is_main:
        path.write_text(json.dumps(answers, indent=1), encoding="utf-8")
    return answers


if __name__ == "__main__":
    main(sys.argv[1:])
