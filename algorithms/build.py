"""The roles of a PPO run, built on a mesh and filled from Hugging Face folders; and what a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..engine.checkpoint import Entry
from ..engine.lr import lr_at
from ..engine.mesh import Mesh
from ..engine.optimizer import ShardedAdamW
from ..models.config import ModelConfig, check_layout
from ..models.decoder import Decoder
from ..models.hf import hf_name, load_hf
from .config import OptimizerConfig, PPOConfig
from .ppo import Roles
from .roles import Learner, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str, shape: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: there is none, it cannot be read, or it knows tokens the model has no row for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises its own kinds, none of which names the folder
        raise ValueError(f"{folder}: no tokenizer can be read from it: {error}") from error
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the model only vocab_size={shape.vocab_size}"
        )
    return tokenizer


def read_shapes(config: PPOConfig) -> dict[str, ModelConfig]:
    """The shape of every folder the roles come from, checked against the layout and each other.

    Raises:
        ValueError: a folder is missing or unsupported, a size does not divide, or vocabularies differ.
    """
    folders = [config.model.path, config.model.critic or config.model.path, *config.reward.models]
    shapes = {folder: ModelConfig.from_hf(folder) for folder in folders}
    actor = shapes[config.model.path]
    if actor.head != "lm":
        raise ValueError(f"model.path={config.model.path} holds a {actor.architecture}: the actor must predict tokens")
    for folder, shape in shapes.items():
        try:
            check_layout(shape, tp=config.parallel.tp, pp=config.parallel.pp)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        if shape.vocab_size != actor.vocab_size:
            raise ValueError(
                f"{folder}: vocab_size={shape.vocab_size}, but the actor's is {actor.vocab_size}:"
                " all roles read the same tokens"
            )
    for folder in config.reward.models:
        if shapes[folder].head != "score":
            raise ValueError(f"reward.models={folder} holds a {shapes[folder].architecture}: a score head is needed")
    exported = Path(config.run.folder).resolve()
    for folder in shapes:
        if Path(folder).resolve() in (exported / "model", exported / "model_ema"):
            raise ValueError(f"run.output={config.run.folder}: its export would replace {folder}, which the run reads")
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for folder, shape in shapes.items():
        if longest > shape.max_positions:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}:"
                f" {folder} has positions for {shape.max_positions}"
            )
    return shapes


def build_roles(config: PPOConfig, shapes: dict[str, ModelConfig], mesh: Mesh) -> Roles:
    """All four roles, colocated on one mesh, with the weights of their folders.

    Raises:
        ValueError: a folder lacks a tensor or holds one of the wrong shape.
    """
    dtype = getattr(torch, config.model.dtype)
    steps, per_step = config.run.steps, config.ppo.epochs * config.ppo.minibatches

    def decoder(folder: str, *, lm: bool, trained: bool) -> Decoder:
        recompute = trained and config.parallel.recompute
        model = Decoder(shapes[folder], mesh, dtype=dtype, head="lm" if lm else "score", recompute=recompute)
        load_hf(model, folder, new_head="normal" if trained else "refuse")
        return model if trained else model.requires_grad_(False)

    def learner(model: Decoder, settings: OptimizerConfig, updates: int, ema_decay: float = 0.0) -> Learner:
        optimizer = ShardedAdamW(
            model,
            mesh,
            tied=model.tied_parameter(),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            ema_decay=ema_decay,
            name="actor" if model.kind == "lm" else "critic",
        )
        return Learner(model, optimizer, schedule(settings, updates), config.rollout.temperature)

    actor = decoder(config.model.path, lm=True, trained=True)
    critic = decoder(config.model.critic or config.model.path, lm=False, trained=True)
    return Roles(
        actor=learner(
            actor,
            config.actor.optimizer,
            (steps - config.critic.warmup_steps) * per_step,
            config.actor.ema_decay,
        ),
        critic=learner(critic, config.critic.optimizer, steps * per_step),
        reference=Role(decoder(config.model.path, lm=True, trained=False), config.rollout.temperature),
        rewards=[Role(decoder(folder, lm=False, trained=False)) for folder in config.reward.models],
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


def trained_entries(roles: Roles) -> Iterator[Entry]:
    """Masters, moments and averages of actor and critic, as a checkpoint names them."""
    for name, learner in (("actor", roles.actor), ("critic", roles.critic)):
        yield from learner.optimizer.entries(
            name, partial(hf_name, config=learner.model.config, head=learner.model.kind)
        )
