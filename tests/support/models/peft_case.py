"""A tiny model with adapters by peft and by trialign, and its training, saving and resuming in a layout."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layouts import ALONE, Layout, whole_states
from tiny import VOCAB
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import stage_forward, target_logprobs
from trialign.engine.mesh import Mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.shard import sinks
from trialign.engine.storage import checkpoint
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.folder import assets
from trialign.models.hf.adapter_record import adapter_record, check_same_adapter
from trialign.models.hf.load import load_hf
from trialign.models.hf.peft import load_adapter
from trialign.models.lora import init_adapters, trained_name

_MODULES = {target: f"{target}_proj" for target in ("q", "k", "v", "gate", "up", "down")} | {"output": "o_proj"}


def randomize_b(wrapped: Any) -> Any:
    """Random B in peft's adapters, whose zeros have no effect."""
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def peft_model(folder: Path, lora: LoRA, seed: int = 1) -> Any:
    """The folder's model in fp32, wrapped by peft with random adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = [_MODULES[target] for target in lora.targets]
    options: Any = {"use_rslora": lora.rslora, "target_modules": modules, "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), **options)
    torch.manual_seed(seed)
    return randomize_b(get_peft_model(model, config))


def save_peft(wrapped: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it cannot look up the base model's config on the hub
        wrapped.save_pretrained(folder)
    return folder


def samples(vocab: int) -> list[list[int]]:
    """Eight sequences of 2 to 20 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 20, (8,), generator=generator).tolist()
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def logits(model: Decoder) -> Tensor:
    """Logits of all `samples`, packed; one process."""
    with torch.no_grad():
        return model.logits(stage_forward(model, pack(samples(VOCAB)), None))


def peer_logits(peer: Any, rows: list[list[int]] | None = None) -> Tensor:
    """The same, or those of other rows, by transformers or peft."""
    with torch.no_grad():
        return torch.cat([peer.eval()(torch.tensor([row])).logits[0] for row in rows or samples(VOCAB)])


def load_whole(auto: Any, folder: Path) -> Any:
    """transformers' model of a folder, where no tensor is missing, unexpected or of another shape."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def build(folder: Path, mesh: Mesh, lora: LoRA | None = None, adapter: Path | None = None, **options: Any) -> Decoder:
    """The model, by default in fp32; with the adapters of a PEFT folder, or initial ones."""
    options.setdefault("dtype", torch.float32)
    model = Decoder(read_config(folder), mesh, lora=lora, **options)
    load_hf(model, folder, new_head="normal")
    init_adapters(model, seed=5)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def adapted(folder: Path, lora: LoRA, layout: Layout = ALONE, **options: Any) -> Decoder:
    """The model with adapters whose B are random, depending on the weight's name alone."""
    model = build(folder, layout.mesh(), lora, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            for piece, view in sinks(parameter):
                seed = len(trained_name(name, piece.part, model.config, model.kind))
                full = 0.1 * torch.randn(piece.global_shape, generator=torch.Generator().manual_seed(seed))
                view.copy_(full[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))])
    return model


def learner(model: Decoder) -> Learner:
    # With the usual eps, AdamW would turn the rounding of gradients near 0 into whole steps.
    optimizer = ShardedAdamW(model, model.mesh, tied=model.tied_parameter(), eps=1e-3, max_grad_norm=0.5)
    return Learner(model, optimizer, lambda step: 1e-2, sizes=UpdateConfig(micro_batch_size=2))


def train(model: Decoder, steps: int) -> Learner:
    """Steps of language modeling on `samples`, in micro-batches of two."""
    trained, batch = learner(model), pack(samples(model.config.vocab_size)).to(model.mesh.device)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(model, part, hidden, 1.0)[0].sum() / len(batch.response)

    for _ in range(steps):
        trained.step(batch, loss)
    return trained


def states(trained: Learner, kind: str = "") -> dict[str, Tensor]:
    """Whole masters, moments and gradients of the last step: `kind/name`; or those of one kind: `name`. Collective."""
    prefix = f"actor/{kind}{'/' * bool(kind)}"
    found = whole_states(actor=trained).items()
    return {key.removeprefix(prefix): value.clone() for key, value in found if key.startswith(prefix)}


def masters(
    rank: int, world: int, layout: Layout, folder: Path, lora: LoRA, adapter: Path | None = None
) -> dict[str, Tensor]:
    """Whole masters of a PEFT folder's adapters, or of initial ones."""
    return states(learner(build(folder, layout.mesh(), lora, adapter)), "master")


def take_steps(
    rank: int, world: int, layout: Layout, folder: Path, lora: LoRA | None, adapter: Path | None = None, **options: Any
) -> dict[str, Tensor]:
    """States after two steps of a PEFT folder's adapters, or of `adapted` ones; of the weights without LoRA."""
    if lora is None or adapter is not None:
        return states(train(build(folder, layout.mesh(), lora, adapter, **options), 2))
    return states(train(adapted(folder, lora, layout, **options), 2))


def save_run(trained: Learner, root: Path, base: Path, role: str = "actor") -> Path:
    """A checkpoint as the scripts write it."""
    model = trained.model
    entries = trained.optimizer.entries(role, partial(trained_name, config=model.config, head=model.kind))
    state = {"adapters": {role: adapter_record(model, base)}, "steps": trained.optimizer.steps}
    return checkpoint.save(root, 1, entries, state, model.mesh, keep=1, assets=assets(base, f"{role}/"))


def train_and_save(rank: int, world: int, layout: Layout, folder: Path, root: Path, lora: LoRA) -> dict[str, Tensor]:
    trained = train(adapted(folder, lora, layout), 2)
    save_run(trained, root, folder)
    return states(trained)


def resume(rank: int, world: int, layout: Layout, folder: Path, path: Path, lora: LoRA) -> dict[str, Tensor]:
    return states(resumed(layout, folder, path, lora))


def resumed(layout: Layout, folder: Path, path: Path, lora: LoRA) -> Learner:
    """A run that resumes from `train_and_save`'s checkpoint."""
    trained = learner(build(folder, layout.mesh(), lora))
    model = trained.model
    check_same_adapter(checkpoint.read_state(path)["adapters"]["actor"], model, folder)
    entries = trained.optimizer.entries("actor", partial(trained_name, config=model.config, head=model.kind))
    trained.optimizer.restore(checkpoint.load(path, entries, model.mesh)["steps"])
    return trained
