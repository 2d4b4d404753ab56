"""Roles, built on a mesh and filled from Hugging Face folders; and what a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...engine.mesh import Mesh
from ...engine.optim.adamw import ShardedAdamW
from ...engine.optim.lr_schedule import lr_at
from ...engine.parallel.shard import Entry, Slot
from ...engine.pipeline.stage import stage_of
from ...engine.profiler import Profiler
from ...engine.storage.checkpoint import read_state
from ...models.config import HeadKind, ModelConfig, check_layout
from ...models.decoder import Decoder
from ...models.families.registry import head_of, read_config
from ...models.folder import checkpoint_role, read_json
from ...models.hf.convert import SCORES
from ...models.hf.load import load_hf
from ...models.hf.peft import check_adapter, load_adapter
from ...models.hf.source import open_source
from ...models.hf.tokenizer import has_tokenizer, read_tokenizer
from ...models.lora import check_lora, init_adapters, trained_name
from ..config.common import AS_CONFIG, LoRAConfig, OptimizerConfig, ParallelConfig
from ..config.grpo import GRPOConfig
from ..config.ppo import PPOConfig
from ..config.run import RunConfig
from ..micro_batch import MicroBatchSizes
from ..rewards.encoder import check_vocabulary
from .learner import Learner, Roles
from .role import DEFAULT_SIZES, AdapterOff, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str, shape: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: there is none, it cannot be read, or it knows tokens the model has no row for.
    """
    tokenizer = read_tokenizer(folder)
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the model only vocab_size={shape.vocab_size}"
        )
    return tokenizer


def read_shape(
    folder: str, parallel: ParallelConfig, run: RunConfig, head: HeadKind | None = None, lora: LoRAConfig | None = None
) -> ModelConfig:
    """The shape of a model's folder, checked against the layout and against what the run will write.

    Args:
        head: what the folder must hold; None takes either, for a model with a score head.
        lora: what adapters the model is to have, if it is to be trained.

    Raises:
        ValueError: the folder is missing or unsupported, a size does not divide, it cannot have these adapters or they
            are not those of lora.adapter, or the run's export would replace it.
    """
    shape = read_config(folder)
    open_source(folder)  # what is missing, damaged or of another shape is said before a row is read
    if head is not None and head_of(shape) != head:
        wanted = {"lm": "a causal language model", "score": "a model with a score head"}[head]
        raise ValueError(f"{folder} holds a {shape.architecture}: {wanted} is needed")
    if head == "score":
        check_scores_responses(folder)
    try:
        check_layout(shape, parallel.tp, parallel.pp, parallel.ep, parallel.pp_layers)
        adapters = lora.adapters(shape) if lora is not None else None
        if adapters is not None:
            check_lora(shape, adapters, parallel.tp)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if adapters is not None and lora is not None and lora.adapter:
        check_adapter(lora.adapter, shape, adapters, head or "score")
    exported = Path(run.folder).resolve()
    if Path(folder).resolve() in (exported / "model", exported / "model_ema"):
        raise ValueError(f"run.output={run.folder}: its export would replace {folder}, which the run reads")
    return shape


def read_shapes(config: PPOConfig | GRPOConfig, *critics: str) -> dict[str, ModelConfig]:
    """The shape of every folder PPO's or GRPO's roles come from, checked against the layout and each other.

    Args:
        critics: folders of value models; "" is the actor's.

    Raises:
        ValueError: a folder is missing or unsupported, a size does not divide, the critic reads other tokens than the
            actor, or a reward model has no tokenizer and another vocabulary.
    """
    trained = [config.model.path, *filter(None, critics)]
    shapes = {folder: read_shape(folder, config.parallel, config.run) for folder in config.reward.models}
    plain = replace(config.lora, adapter="")  # adapters begin from a folder in the actor alone
    shapes |= {folder: read_shape(folder, config.parallel, config.run, lora=plain) for folder in trained}
    actor = shapes[config.model.path]
    if head_of(actor) != "lm":
        raise ValueError(f"model.path={config.model.path} holds a {actor.architecture}: the actor must predict tokens")
    for folder in trained[1:]:
        check_vocabulary(folder, shapes[folder], config.model.path, actor)
    adapters = config.lora.adapters(actor)
    if adapters is not None and config.lora.adapter:
        check_adapter(config.lora.adapter, actor, adapters)
    for folder in config.reward.models:
        if head_of(shapes[folder]) != "score":
            raise ValueError(f"reward.models={folder} holds a {shapes[folder].architecture}: a score head is needed")
        check_scores_responses(folder)
        if not has_tokenizer(folder):
            check_vocabulary(folder, shapes[folder], config.model.path, actor)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for folder, shape in shapes.items():
        positions = shape.longest_rollout if shape is actor else shape.longest_document
        if longest > positions:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}: {folder} has positions for {positions}"
            )
    return shapes


def check_scores_responses(folder: str) -> None:
    """Refuses a process reward model where a whole response is to be scored. Raises ValueError."""
    path = Path(folder)
    said = read_state(path) if checkpoint_role(path) else read_json(path / "config.json")
    if said.get(SCORES) == "steps":
        raise ValueError(
            f"{folder} is a process reward model, trained at the ends of steps: it has no score for a whole response;"
            " reward.functions may read it step by step"
        )


def build_decoder(
    folder: str,
    shape: ModelConfig,
    mesh: Mesh,
    dtype: str,
    *,
    head: HeadKind = "lm",
    trained: bool = False,
    parallel: ParallelConfig | None = None,
    lora: LoRAConfig | None = None,
    seed: int = 0,
) -> Decoder:
    """A model on its mesh with the weights of a folder; frozen unless it is trained.

    Args:
        parallel: layers of stages, and whether a trained model recomputes; the layout itself is the mesh's.
        lora: what is trained, if it is not the weights: adapters, drawn by `seed` or read from a PEFT folder.

    Raises:
        ValueError: the folder lacks a tensor or holds one of the wrong shape; adapters that are not the model's.
    """
    adapters = lora.adapters(shape) if trained and lora is not None else None
    parallel = parallel or ParallelConfig()
    model = Decoder(
        shape,
        mesh,
        dtype=getattr(torch, dtype),
        head=head,
        recompute=trained and parallel.recompute,
        lora=adapters,
        stage=stage_of(mesh, shape.num_layers, parallel.pp_layers),
    )

    def fill(model: Decoder, into: Sequence[Slot] | None = None) -> None:
        load_hf(model, folder, new_head="normal" if trained else "refuse", into=into)
        init_adapters(model, seed, into)
        if lora is not None and lora.adapter and adapters is not None:
            load_adapter(model, lora.adapter, into)

    fill(model)
    model.fill = fill
    return model if trained else model.requires_grad_(False)


def build_learner(
    model: Decoder,
    settings: OptimizerConfig,
    updates: int,
    *,
    ema_decay: float = 0.0,
    temperature: float = 1.0,
    sizes: MicroBatchSizes = DEFAULT_SIZES,
    profiler: Profiler | None = None,
    name: str = "actor",
) -> Learner:
    """A trained model with its optimizer and a schedule over `updates` steps. `name` is for messages.

    Masters begin as precise as what the model was filled from; its weights are those masters, rounded.

    Raises:
        ValueError: router losses are weighted in a model without experts.
    """
    set_router_coefs(model, settings, name)
    optimizer = ShardedAdamW(
        model,
        model.mesh,
        tied=model.tied_parameter(),
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        ema_decay=ema_decay,
        name=name,
    )
    if model.fill is not None:
        optimizer.refine_masters(partial(model.fill, model))
    max_skipped = settings.max_skipped if settings.on_nonfinite == "skip" else 0
    return Learner(model, optimizer, schedule(settings, updates), temperature, sizes, max_skipped, profiler)


def set_router_coefs(model: Decoder, settings: OptimizerConfig, name: str) -> None:
    """Gives a model with experts the weights of its router losses.

    Raises:
        ValueError: one is set and the model has no experts.
    """
    aux, z, moe = settings.router_aux_coef, settings.router_z_coef, model.config.moe
    if moe is not None:
        model.set_router_coefs(moe.aux_coef if aux == AS_CONFIG else aux, z)
        return
    for knob, value, off in (("router_aux_coef", aux, AS_CONFIG), ("router_z_coef", z, 0.0)):
        if value != off:
            raise ValueError(f"{knob}={value}: must be {off:g}, for the {name} model has no experts")


def build_ppo_roles(
    config: PPOConfig, shapes: dict[str, ModelConfig], mesh: Mesh, profiler: Profiler | None = None
) -> Roles:
    """All four roles, colocated on one mesh, with the weights of their folders.

    Raises:
        ValueError: a folder lacks a tensor or holds one of the wrong shape.
    """
    steps, per_step = config.run.steps, config.ppo.epochs * config.ppo.minibatches
    temperature = config.rollout.temperature

    def decoder(folder: str, head: HeadKind, *, trained: bool = False) -> Decoder:
        # The folder that adapters begin from is the actor's.
        lora = config.lora if head == "lm" else replace(config.lora, adapter="")
        options = {"head": head, "trained": trained, "parallel": config.parallel}
        return build_decoder(
            folder, shapes[folder], mesh, config.model.dtype, **options, lora=lora, seed=config.run.seed
        )

    actor_steps = (steps - config.critic.warmup_steps) * per_step
    actor, critic = config.model.path, config.model.critic or config.model.path
    policy = decoder(actor, "lm", trained=True)
    # Without its adapters the actor is the reference.
    reference = AdapterOff if policy.lora else Role
    frozen = policy if policy.lora else decoder(actor, "lm")
    return Roles(
        actor=build_learner(
            policy,
            config.actor.optimizer,
            actor_steps,
            ema_decay=config.actor.ema_decay,
            temperature=temperature,
            sizes=config.ppo,
            profiler=profiler,
        ),
        critic=build_learner(
            decoder(critic, "score", trained=True),
            config.critic.optimizer,
            steps * per_step,
            temperature=temperature,
            sizes=config.ppo,
            profiler=profiler,
            name="critic",
        ),
        reference=reference(frozen, temperature, config.ppo, profiler),
        rewards=[Role(decoder(folder, "score"), 1.0, config.ppo, profiler) for folder in config.reward.models],
    )


def build_grpo_roles(
    config: GRPOConfig, shapes: dict[str, ModelConfig], mesh: Mesh, profiler: Profiler | None = None
) -> Roles:
    """GRPO's roles on one mesh, with the weights of their folders; a reference only where something needs it.

    Raises:
        ValueError: a folder lacks a tensor or holds one of the wrong shape.
    """
    folder, temperature = config.model.path, config.rollout.temperature

    def decoder(path: str, head: HeadKind = "lm", *, trained: bool = False) -> Decoder:
        options = {"head": head, "trained": trained, "parallel": config.parallel, "lora": config.lora}
        return build_decoder(path, shapes[path], mesh, config.model.dtype, **options, seed=config.run.seed)

    policy = decoder(folder, trained=True)
    reference = None
    if config.needs_reference:
        # Without its adapters the actor is the reference.
        frozen = AdapterOff if policy.lora else Role
        reference = frozen(policy if policy.lora else decoder(folder), temperature, config.grpo, profiler)
    updates = config.run.steps * config.grpo.epochs * config.grpo.minibatches
    return Roles(
        actor=build_learner(
            policy,
            config.optimizer,
            updates,
            ema_decay=config.grpo.ema_decay,
            temperature=temperature,
            sizes=config.grpo,
            profiler=profiler,
        ),
        reference=reference,
        rewards=[Role(decoder(path, "score"), 1.0, config.grpo, profiler) for path in config.reward.models],
    )


def schedule(settings: OptimizerConfig, updates: int) -> Callable[[int], float]:
    """Learning rate by optimizer step over `updates` steps."""
    return partial(
        lr_at,
        total=updates,
        peak=settings.lr,
        schedule=settings.schedule,
        warmup_ratio=settings.warmup_ratio,
        min_lr_ratio=settings.min_lr_ratio,
    )


def trained_entries(learners: Mapping[str, Learner]) -> Iterator[Entry]:
    """Masters, moments and averages of every learner, as a checkpoint names them: `role/kind/weight`."""
    for name, learner in learners.items():
        yield from learner.optimizer.entries(
            name, partial(trained_name, config=learner.model.config, head=learner.model.kind)
        )
