"""Adapters made by peft on a tiny model, and trialign's model with the same: what the tests of LoRA and QLoRA share."""

import warnings
from pathlib import Path
from typing import Any

import torch
from layouts import whole_states
from tiny import VOCAB
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import target_logprobs
from trialign.engine.mesh import Mesh, build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.shard import sinks
from trialign.models.config import HeadKind
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.load import load_hf
from trialign.models.hf.peft import load_adapter
from trialign.models.lora import init_adapters, trained_name

Layout = tuple[int, int, int]  # tp, pp, dp
MODULES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "output": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def peft_model(folder: Path, lora: LoRA, seed: int = 1, score: bool = False) -> Any:
    """The folder's model in fp32, wrapped by peft with `lora`'s adapters, B random so that they do something."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cls = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        use_rslora=lora.rslora,
        target_modules=[MODULES[target] for target in lora.targets],
        task_type="SEQ_CLS" if score else "CAUSAL_LM",
    )
    torch.manual_seed(seed)
    wrapped: Any = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def save_peft(wrapped: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants to look at the base model's config on the hub
        wrapped.save_pretrained(folder)
    return folder


def samples(vocab: int) -> list[list[int]]:
    """Eight sequences of 2 to 20 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 20, (8,), generator=generator).tolist()
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def build(
    folder: Path, mesh: Mesh, lora: LoRA | None, adapter: Path | None = None, head: HeadKind = "lm", **options: Any
) -> Decoder:
    """The model with the adapters of a PEFT folder, or fresh ones."""
    model = Decoder(read_config(folder), mesh, dtype=torch.float32, head=head, lora=lora, **options)
    load_hf(model, folder, new_head="normal")
    init_adapters(model, seed=5)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def learner(model: Decoder) -> Learner:
    # With the usual eps the rounding of gradients that are all but 0 would become whole steps.
    optimizer = ShardedAdamW(model, model.mesh, tied=model.tied_parameter(), eps=1e-3, max_grad_norm=0.5)
    return Learner(model, optimizer, lambda step: 1e-2, sizes=UpdateConfig(micro_batch_size=2))


def train(model: Decoder, steps: int) -> Learner:
    """Some steps on the next tokens of `samples`, in micro-batches of two."""
    trained, batch = learner(model), pack(samples(model.config.vocab_size)).to(model.mesh.device)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(model, part, hidden, 1.0)[0].sum() / len(batch.response)

    for _ in range(steps):
        trained.step(batch, loss)
    return trained


def held(trained: Learner) -> dict[str, Tensor]:
    """Every trained number, its moments and its last gradient, put together from all ranks: `kind/name` -> whole."""
    return {key.removeprefix("actor/"): value for key, value in whole_states(actor=trained).items()}


def two_steps(
    rank: int,
    world: int,
    folder: Path,
    lora: LoRA | None,
    adapter: Path | None,
    layout: Layout,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """What two optimizer steps make of the adapters, or of the weights without, in a layout."""
    tp, pp, dp = layout
    return held(train(build(folder, build_mesh(tp=tp, pp=pp, dp=dp), lora, adapter, recompute=recompute), 2))


def adapted(folder: Path, lora: LoRA, sizes: dict[str, Any] | None = None, **options: Any) -> Decoder:
    """The model with adapters whose B are not zero: numbers that depend on a matrix's name alone."""
    model = build(folder, build_mesh(**(sizes or {})), lora, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            for piece, view in sinks(parameter):
                known = trained_name(name, piece.part, model.config, model.kind)
                whole = 0.1 * torch.randn(piece.global_shape, generator=torch.Generator().manual_seed(len(known)))
                view.copy_(whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))])
    return model


def masters(trained: Learner) -> dict[str, Tensor]:
    return {n.removeprefix("master/"): t for n, t in held(trained).items() if n.startswith("master/")}


def logits_of(peer: Any) -> Tensor:
    """transformers' logits of all samples, packed."""
    with torch.no_grad():
        return torch.cat([peer.eval()(torch.tensor([row])).logits[0] for row in samples(VOCAB)])
