"""trialign's side of bench_preference.py: rows of each algorithm, and a step on them as in its script in launch/."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from trialign.algorithms.batch import Batch, from_rollouts
from trialign.algorithms.config.common import ModelPaths, OptimizerConfig, ParallelConfig, RolloutConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.online import OnlineRunConfig
from trialign.algorithms.config.preference import DPOLoss, KTOLoss, PairData
from trialign.algorithms.config.reward import PolicyReward
from trialign.algorithms.config.sft import SFTData, SFTRun
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import DialogueDataset, Sample, joined, pack_samples
from trialign.algorithms.data.preferences import Pair, PairStream, mismatched
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.data.sources import read_rows
from trialign.algorithms.dpo import dpo_step, reference_sums, with_reference
from trialign.algorithms.grpo import update, with_advantages, with_forward_passes
from trialign.algorithms.kto import kto_step, pack_labeled, reference_point
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.reward_model import pack_pairs, pair_step
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import build_decoder, build_grpo_roles, build_learner, load_tokenizer, read_shape
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.rollout.groups import make_groups
from trialign.algorithms.rollout.sync import sample, sampling_params
from trialign.algorithms.sft import sft_step
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.mesh import Mesh, build_mesh
from trialign.models.config import HeadKind, ModelConfig
from trialign.models.hf.tokenizer import stop_ids

Algorithm = Literal["sft", "reward", "dpo", "kto", "grpo"]
SHIPPED = Path(__file__).resolve().parent.parent / "launch" / "examples"
OPTIMIZER = OptimizerConfig(lr=1e-6, betas=(0.9, 0.999), schedule="constant", warmup_ratio=0.0)


@dataclass(frozen=True)
class Task:
    """The work of one step, the same for both sides."""

    algorithm: Algorithm
    """algorithm to time"""
    model: str
    """folder in Hugging Face format"""
    data: str = ""
    """JSONL file: dialogues or prompts with responses for sft, pairs for reward, dpo and kto (one response of each
    pair), prompts for grpo ("": those of launch/examples)"""
    prompt_key: str = "prompt"
    """column that holds the prompt"""
    response_key: str = "response"
    """column that holds the response, for sft"""
    max_tokens: int = 256
    """rows (for grpo prompts) with more tokens are left out"""
    batch: int = 8
    """rows of a step; responses for grpo"""
    group: int = 4
    """responses to a prompt, for grpo"""
    new_tokens: int = 48
    """tokens of a response, for grpo"""
    steps: int = 2
    """optimizer steps of a turn"""
    micro_tokens: int = 2048
    """tokens of a micro-batch of trialign"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype; master weights are float32 in trialign, by its settings in TRL"""
    seed: int = 0
    """shuffles the rows"""

    def __post_init__(self) -> None:
        for name in ("batch", "group", "new_tokens", "steps", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.algorithm == "grpo" and self.batch % self.group:
            raise ValueError(f"batch={self.batch}: responses must divide into groups of {self.group}")
        if self.algorithm == "kto" and self.batch < 2:
            raise ValueError("batch=1: KTO pairs prompts with other rows' responses, at least 2 rows")
        if not Path(self.model, "config.json").is_file():
            raise ValueError(f"model={self.model}: no folder in Hugging Face format")

    @property
    def update(self) -> UpdateConfig:
        """Batch and micro-batch sizes of a step."""
        longest = max(self.micro_tokens, 2 * self.max_tokens)  # a pair stays in one micro-batch
        return UpdateConfig(batch_size=self.batch, micro_batch_tokens=longest)


class Side(NamedTuple):
    """One algorithm, ready to be timed."""

    rows: list[dict[str, Any]]  # of all steps in order, as TRL takes them (trl_side.py)
    tokens: list[int]  # of each step, the same for both sides
    step: Callable[[int], object]
    close: Callable[[], None] = lambda: None


class Base:
    """Model, tokenizer and mesh of a task."""

    def __init__(self, task: Task, head: HeadKind = "lm"):
        self.task = task
        self.head: HeadKind = head
        self.mesh: Mesh = build_mesh(device="cpu")
        kind = "lm" if head == "lm" else None
        self.shape: ModelConfig = read_shape(task.model, ParallelConfig(), SFTRun(), kind)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(task.model, self.shape)
        self.ends = stop_ids(task.model, self.shape, self.tokenizer)

    def learner(self, steps: int) -> Learner:
        """The model with its optimizer, as the scripts build it."""
        model = build_decoder(self.task.model, self.shape, self.mesh, self.task.dtype, head=self.head, trained=True)
        return build_learner(model, OPTIMIZER, steps, sizes=self.task.update)

    def pairs(self, count: int, folder: Path) -> list[Pair]:
        """The first pairs of the stream."""
        task = self.task
        data = PairData(sources=(task.data or pairs_file(folder),), max_tokens=task.max_tokens)
        return PairStream(data, self.tokenizer, self.ends, task.seed).next(count)


def pairs_file(folder: Path) -> str:
    """Pairs from the example dialogues: a response against that of another dialogue."""
    messages = [row["messages"] for _, row in read_rows(str(SHIPPED / "dialogues.jsonl"))]
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, dialogue in enumerate(messages):
            responses = {
                "chosen": dialogue[-1]["content"],
                "rejected": messages[(i + 7) % len(messages)][-1]["content"],
            }
            file.write(json.dumps({"prompt": dialogue[0]["content"]} | responses) + "\n")
    return str(path)


def prompt_and_response(one: Sample) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the response."""
    cut = one.mask.index(1)
    return one.tokens[:cut].tolist(), one.tokens[cut:].tolist()


def cut(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The rows of each step."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def sft_side(task: Task, steps: int, folder: Path) -> Side:
    """Supervised fine-tuning: loss on the assistant's tokens."""
    base = Base(task)
    data = SFTData(
        sources=(task.data or str(SHIPPED / "dialogues.jsonl"),),
        max_tokens=task.max_tokens,
        prompt_key=task.prompt_key,
        response_key=task.response_key,
    )
    samples = joined(DialogueDataset(data, base.tokenizer, base.ends, task.seed).next(steps * task.batch))
    learner, batches = base.learner(steps), cut(samples, task.batch)

    def step(number: int) -> dict[str, float]:
        return sft_step(learner, pack_samples(batches[number]))

    labels = [[t if learned else -100 for t, learned in zip(one.tokens, one.mask, strict=True)] for one in samples]
    rows = [{"input_ids": one.tokens.tolist(), "labels": each} for one, each in zip(samples, labels, strict=True)]
    return Side(rows, [sum(len(one.tokens) for one in part) for part in batches], step)


def reward_side(task: Task, steps: int, folder: Path) -> Side:
    """A reward model: a scalar head, Bradley-Terry over pairs."""
    base = Base(task, "score")
    pairs = base.pairs(steps * task.batch, folder)
    learner, batches = base.learner(steps), cut(pairs, task.batch)

    def step(number: int) -> dict[str, float]:
        return pair_step(learner, pack_pairs(batches[number]), 0.0)

    rows = [{"chosen_ids": p.chosen.tokens.tolist(), "rejected_ids": p.rejected.tokens.tolist()} for p in pairs]
    return Side(rows, [sum(sum(pair.lengths) for pair in part) for part in batches], step)


def dpo_side(task: Task, steps: int, folder: Path) -> Side:
    """DPO with the reference's log-probabilities computed before."""
    base, loss = Base(task), DPOLoss()
    pairs = base.pairs(steps * task.batch, folder)
    learner, batches = base.learner(steps), cut(pairs, task.batch)
    references = reference_sums(learner, pairs, task.batch).split(2 * task.batch)

    def step(number: int) -> dict[str, float]:
        batch = with_reference(pack_pairs(batches[number]), references[number])
        return dpo_step(learner, batch, loss)

    rows = []
    for pair in pairs:
        prompt, chosen = prompt_and_response(pair.chosen)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": prompt_and_response(pair.rejected)[1]})
    return Side(rows, [sum(sum(pair.lengths) for pair in part) for part in batches], step)


def kto_side(task: Task, steps: int, folder: Path) -> Side:
    """KTO on one response of each pair, chosen and rejected in turn; mismatched responses are scored in each step."""
    base, loss = Base(task), KTOLoss()
    pairs = base.pairs(steps * task.batch, folder)
    samples = [pair.rejected if i % 2 else pair.chosen for i, pair in enumerate(pairs)]
    labels = [i % 2 == 0 for i in range(len(pairs))]
    batches = cut(samples, task.batch)
    others = [
        [mismatched(one, part[(i + 1) % len(part)], task.max_tokens) for i, one in enumerate(part)] for part in batches
    ]
    learner = base.learner(steps)
    references = [reference_sums(learner, part, task.batch, pack_samples) for part in batches]
    other_references = [reference_sums(learner, part, task.batch, pack_samples) for part in others]

    def step(number: int) -> dict[str, float]:
        z = reference_point(learner, others[number], other_references[number], task.batch)
        wanted = cut(labels, task.batch)[number]
        batch = with_reference(pack_labeled(batches[number], wanted), references[number])
        return kto_step(learner, batch, loss, z)

    rows = []
    for one, label in zip(samples, labels, strict=True):
        prompt, response = prompt_and_response(one)
        rows.append({"prompt_ids": prompt, "completion_ids": response, "label": label})
    return Side(rows, [sum(len(one.tokens) for one in part) for part in batches], step)


def grpo_side(task: Task, steps: int, folder: Path) -> Side:
    """GRPO without KL: groups of responses of one length, a Python function as the reward, one update a batch."""
    base, size = Base(task), task.batch // task.group
    reward = f"{Path(__file__).with_name('trl_side.py')}:variety"
    source = task.data or str(SHIPPED / "prompts.jsonl")
    config = GRPOConfig(
        model=ModelPaths(path=task.model, dtype=task.dtype),
        data=PromptData(sources=(source,), prompt_key=task.prompt_key, max_prompt_tokens=task.max_tokens),
        rollout=RolloutConfig(max_new_tokens=task.new_tokens, samples_per_prompt=task.group),
        reward=PolicyReward(functions=(reward,)),
        optimizer=OPTIMIZER,
        grpo=GRPOOptions(kl_in="off", micro_batch_tokens=max(task.micro_tokens, task.max_tokens + task.new_tokens)),
        run=OnlineRunConfig(steps=steps, prompts_per_step=size),
    )
    prompts = PromptDataset(config.data, base.tokenizer, task.seed).next(steps * size)
    batches = cut(prompts, size)
    roles = build_grpo_roles(config, {task.model: base.shape}, base.mesh)
    generator = EmbeddedGenerator(roles.actor.model, base.mesh)
    params = sampling_params(config.rollout, stop_ids=(), seed=task.seed)  # no early stop
    scorer, shaper = Scorer(config.reward, base.tokenizer, base.mesh), RewardShaper(config.reward.clip)
    group = torch.arange(size).repeat_interleave(task.group)

    def step(number: int) -> dict[str, float]:
        rollouts = sample(generator, batches[number], params, task.group)
        batch: Batch = from_rollouts(rollouts)
        scores = scorer.combined(scorer(rollouts, batch, []))
        shaped = shaper(scores, [rollout.finish == "stop" for rollout in rollouts])
        rewards = torch.tensor([r for part in make_groups(rollouts, scores, shaped, config) for r in part.rewards])
        batch = batch.with_(minibatches=draw_minibatches(len(batch), config.grpo, seed=number))
        batch = with_forward_passes(batch, roles, config)
        batch, about = with_advantages(batch.with_(scores=rewards, group=group), config)
        about |= update(roles, batch, config)
        generator.load(roles.actor.model, number + 1)
        return about

    rows = [{"prompt": base.tokenizer.decode(prompt.tokens)} for prompt in prompts]
    tokens = [sum(task.group * (len(prompt.tokens) + task.new_tokens) for prompt in part) for part in batches]
    return Side(rows, tokens, step, scorer.close)


SIDES: dict[str, Callable[[Task, int, Path], Side]] = {
    "sft": sft_side, "reward": reward_side, "dpo": dpo_side, "kto": kto_side, "grpo": grpo_side,
}  # fmt: skip
