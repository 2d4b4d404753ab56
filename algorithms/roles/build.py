"""Roles built on a mesh with the weights of Hugging Face folders, and their entries in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...engine.memory import allocating
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
from ..config.common import LoRAConfig, OptimizerConfig, ParallelConfig
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
        ValueError: there is none, it cannot be read, or it has more tokens than the model's vocabulary.
    """
    tokenizer = read_tokenizer(folder)
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model vocab_size={shape.vocab_size}"
        )
    return tokenizer


def read_shape(
    folder: str, parallel: ParallelConfig, run: RunConfig, head: HeadKind | None = None, lora: LoRAConfig | None = None
) -> ModelConfig:
    """The shape of a model's folder, checked against the layout, the adapters and the run's output folder.

    Args:
        head: of the folder's model; None accepts either, for a model that gets a score head.
        lora: adapters of a trained model.

    Raises:
        ValueError: the folder is missing, unsupported or has another head, a size does not divide, the adapters do not
            fit the model or differ from lora.adapter, or the run's export would replace the folder.
    """
    shape = read_config(folder)
    open_source(folder)  # missing, corrupt or misshapen tensors are refused before a row is read
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
    """Shapes of the folders of PPO's or GRPO's roles, checked against the layout and each other.

    Args:
        critics: folders of value models; "" is the actor's.

    Raises:
        ValueError: as `read_shape`; a critic or a reward model without a tokenizer has another vocabulary than the
            actor, or a model has too few positions.
    """
    path, critics = config.model.path, tuple(filter(None, critics))
    read = partial(read_shape, parallel=config.parallel, run=config.run)
    shapes = {folder: read(folder, head="score") for folder in config.reward.models}
    shapes |= {folder: read(folder, lora=replace(config.lora, adapter="")) for folder in critics}
    shapes[path] = actor = read(path, head="lm", lora=config.lora)
    for folder in (*critics, *(folder for folder in config.reward.models if not has_tokenizer(folder))):
        check_vocabulary(folder, shapes[folder], path, actor)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for folder, shape in shapes.items():
        positions = shape.longest_rollout if shape is actor else shape.longest_document
        if longest > positions:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}: {folder} has positions for {positions}"
            )
    return shapes


def check_scores_responses(folder: str) -> None:
    """Refuses a process reward model, which has no score for a whole response. Raises ValueError."""
    path = Path(folder)
    metadata = read_state(path) if checkpoint_role(path) else read_json(path / "config.json")
    if metadata.get(SCORES) == "steps":
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
    """A model on its mesh with the weights of a folder; frozen unless `trained`.

    Args:
        parallel: layers of stages and recomputation; the layout is the mesh's.
        lora: adapters to train in place of the weights, initialized by `seed` or read from a PEFT folder.

    Raises:
        ValueError: the folder lacks a tensor or has one of the wrong shape; adapters do not fit the model.
    """
    adapters = lora.adapters(shape) if trained and lora is not None else None
    parallel = parallel or ParallelConfig()
    with allocating("parameters"):
        model = Decoder(
            shape,
            mesh,
            dtype=getattr(torch, dtype),
            head=head,
            recompute=trained and parallel.recompute_on(mesh.device.type) == "full",
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
    """A trained model with its optimizer and a learning-rate schedule over `updates` steps. `name` is for messages.

    Master weights have the precision of the folder's tensors; the model's weights are the masters, rounded.

    Raises:
        ValueError: router coefficients are set for a model without experts.
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
    lr = partial(
        lr_at,
        total=updates,
        peak=settings.lr,
        schedule=settings.schedule,
        warmup_ratio=settings.warmup_ratio,
        min_lr_ratio=settings.min_lr_ratio,
    )
    max_skipped = settings.max_skipped if settings.on_nonfinite == "skip" else 0
    return Learner(model, optimizer, lr, temperature, sizes, max_skipped, profiler)


def set_router_coefs(model: Decoder, settings: OptimizerConfig, name: str) -> None:
    """Sets the coefficients of the router losses of a model with experts.

    Raises:
        ValueError: one is set for a model without experts.
    """
    if model.config.moe is not None:
        model.set_router_coefs(settings.router_aux_coef, settings.router_z_coef)
        return
    for option in ("router_aux_coef", "router_z_coef"):
        value, default = getattr(settings, option), getattr(OptimizerConfig(), option)
        if value not in (0.0, default):
            raise ValueError(f"{option}={value}: must be 0 or {default:g}, since the {name} model has no experts")


def build_ppo_roles(
    config: PPOConfig, shapes: dict[str, ModelConfig], mesh: Mesh, profiler: Profiler | None = None
) -> Roles:
    """Actor, critic, reference and reward models, colocated on one mesh, with the weights of their folders.

    Raises:
        ValueError: a folder lacks a tensor or has one of the wrong shape.
    """
    decoder = partial(_role_decoder, config, shapes, mesh)
    shared: dict[str, Any] = {"temperature": config.rollout.temperature, "sizes": config.ppo, "profiler": profiler}
    steps, updates = config.run.steps, config.ppo.epochs * config.ppo.minibatches  # of a step
    policy, ema_decay = decoder(config.model.path, trained=True), config.actor.ema_decay
    actor_updates = (steps - config.critic.warmup_steps) * updates
    actor = build_learner(policy, config.actor.optimizer, actor_updates, ema_decay=ema_decay, **shared)
    value = decoder(config.model.critic or config.model.path, "score", trained=True)
    return Roles(
        actor=actor,
        critic=build_learner(value, config.critic.optimizer, steps * updates, name="critic", **shared),
        reference=_reference(policy, decoder, config.model.path, **shared),
        rewards=[Role(decoder(folder, "score"), 1.0, config.ppo, profiler) for folder in config.reward.models],
    )


def build_grpo_roles(
    config: GRPOConfig, shapes: dict[str, ModelConfig], mesh: Mesh, profiler: Profiler | None = None
) -> Roles:
    """Actor, reference (if anything needs one) and reward models on one mesh, with the weights of their folders.

    Raises:
        ValueError: a folder lacks a tensor or has one of the wrong shape.
    """
    decoder = partial(_role_decoder, config, shapes, mesh)
    shared: dict[str, Any] = {"temperature": config.rollout.temperature, "sizes": config.grpo, "profiler": profiler}
    updates = config.run.steps * config.grpo.epochs * config.grpo.minibatches
    policy = decoder(config.model.path, trained=True)
    return Roles(
        actor=build_learner(policy, config.optimizer, updates, ema_decay=config.grpo.ema_decay, **shared),
        reference=_reference(policy, decoder, config.model.path, **shared) if config.needs_reference else None,
        rewards=[Role(decoder(folder, "score"), 1.0, config.grpo, profiler) for folder in config.reward.models],
    )


def _role_decoder(
    config: PPOConfig | GRPOConfig,
    shapes: dict[str, ModelConfig],
    mesh: Mesh,
    folder: str,
    head: HeadKind = "lm",
    *,
    trained: bool = False,
) -> Decoder:
    lora = config.lora if head == "lm" else replace(config.lora, adapter="")  # lora.adapter is the actor's
    options = {"head": head, "trained": trained, "parallel": config.parallel, "lora": lora, "seed": config.run.seed}
    return build_decoder(folder, shapes[folder], mesh, config.model.dtype, **options)


def _reference(policy: Decoder, decoder: Callable[[str], Decoder], folder: str, **shared: Any) -> Role:
    """The policy without its adapters, or a second copy of its folder."""
    return AdapterOff(policy, **shared) if policy.lora else Role(decoder(folder), **shared)


def trained_entries(learners: Mapping[str, Learner]) -> Iterator[Entry]:
    """Masters, moments and averages of every learner under their names in a checkpoint, `role/kind/weight`."""
    for name, learner in learners.items():
        yield from learner.optimizer.entries(
            name, partial(trained_name, config=learner.model.config, head=learner.model.kind)
        )
