"""The generator's copies of weights, adapters merged and NF4 unpacked: same logits and originals, fewer launches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import ALONE, Layout, assert_close
from peft_case import adapted, build, logits, samples
from tiny import VOCAB, tiny_llama
from tiny_moe import moe_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import Request, SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.expert import ExpertLinear
from trialign.engine.parallel.lora import LoRA, adapted_linears
from trialign.engine.parallel.tensor import MergeableLinear
from trialign.models.decoder import Decoder
from trialign.models.lora import EVERY_TARGET, TARGETS

DENSE, MOE = (LoRA(4, 8.0, targets) for targets in (TARGETS, EVERY_TARGET))
QDENSE, QMOE = (LoRA(4, 8.0, targets, quantize=True) for targets in (TARGETS, EVERY_TARGET))
WIDE: Any = {"hidden_size": 128, "intermediate_size": 256}  # rows of whole NF4 blocks in two TP ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[LoRA, Path]:
    dense = tiny_llama(tmp_path_factory.mktemp("dense"), **WIDE)
    mixture = moe_folder(tmp_path_factory.mktemp("mixture"), tied=False)
    return {DENSE: dense, QDENSE: dense, MOE: mixture, QMOE: mixture}


def linears(model: Decoder) -> list[MergeableLinear]:
    return [module for module in model.modules() if isinstance(module, MergeableLinear)]


def held(model: Decoder) -> list[Tensor]:
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers()) if not t.is_meta]


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("lora", [DENSE, QDENSE, MOE, QMOE], ids=["dense", "dense-nf4", "mixture", "mixture-nf4"])
def test_copies_fit_and_leave_logits_and_originals_as_they_were(folders, lora, share):
    model = adapted(folders[lora], lora)
    with torch.no_grad():
        before, originals, spare = logits(model), held(model), int(share * model.merged_bytes)
        with model.adapter_off():
            base = logits(model)
        model.freeze_weights(spare)
        copies = [module.merged for module in linears(model) if module.merged is not None]
        assert sum(copy.nbytes for copy in copies) <= spare
        assert bool(copies) == (share > 0) and (len(copies) == len(linears(model))) == (share == 1)
        assert_close(logits(model), before, 2e-5)
        if "head" not in lora.targets:
            with model.adapter_off():
                assert torch.equal(logits(model), base)
    with pytest.raises(AssertionError, match="no gradient"):
        stage_forward(model, pack(samples(VOCAB)), None)
    model.thaw_weights()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(a, b) for a, b in zip(held(model), originals, strict=True))
    assert not any(module.merged is not None or module.wide is not None for module in linears(model))


def test_without_a_budget_nothing_is_merged(folders):
    model = adapted(folders[DENSE], DENSE)
    before = logits(model)
    model.freeze_weights()
    assert torch.equal(logits(model), before)
    assert not any(module.merged is not None or module.wide is not None for module in linears(model))


def frozen_logits(rank: int, world: int, layout: Layout, folder: Path, lora: LoRA, share: float) -> Tensor:
    model = adapted(folder, lora, layout)
    model.freeze_weights(int(share * model.merged_bytes))
    return logits(model)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("lora", [QDENSE, MOE], ids=["dense-nf4", "mixture"])
def test_copies_of_tp_ranks_equal_those_of_one_process(folders, lora, share):
    alone = frozen_logits(0, 1, ALONE, folders[lora], lora, share)
    parts = run_ranks(frozen_logits, 2, Layout(tp=2), folders[lora], lora, share)
    assert_close(torch.cat(parts, 1), alone, 2e-5)


class Launches(TorchDispatchMode):
    """Number of operators that a GPU would launch a kernel for."""

    FREE = ("aten::detach", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::_unsafe_view", "aten::view")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func._schema.name in self.FREE)
        return func(*args, **(kwargs or {}))


def launches(model: Decoder, spare: int | None) -> int:
    """Of a forward of one token, as a decode step has it, with the weights frozen."""
    token = torch.zeros(1, dtype=torch.int64)
    model.freeze_weights(spare)
    with torch.no_grad(), Launches() as seen:
        model(token, token, lambda layer, q, k, v: q.clone())
    model.thaw_weights()
    return seen.count


def test_launches_of_a_decode_step(folders):
    """Merged or unpacked: those of the plain model. Adapters alone: two more a matrix."""
    plain, alone = build(folders[DENSE], build_mesh()), adapted(folders[DENSE], DENSE)
    least = launches(plain, None)
    for model in (alone, adapted(folders[DENSE], QDENSE)):
        assert launches(model, model.merged_bytes) == least
    assert launches(alone, 0) == least + 2 * len(adapted_linears(alone)) < launches(alone, None)


def test_launches_of_a_decode_step_of_a_mixture(folders):
    """As above; an expert's product is added by a third launch."""
    plain, alone = build(folders[MOE], build_mesh()), adapted(folders[MOE], MOE)
    least, matrices = launches(plain, None), adapted_linears(alone)
    experts = sum(isinstance(m, ExpertLinear) for m in matrices)
    for model in (alone, adapted(folders[MOE], QMOE)):
        assert launches(model, model.merged_bytes) == least
    assert launches(alone, 0) <= least + 2 * len(matrices) + experts < launches(alone, None)


@pytest.mark.parametrize("lora", [DENSE, QMOE], ids=["dense", "mixture-nf4"])
def test_generator_samples_from_the_copies_and_drops_them(folders, lora):
    model, params = adapted(folders[lora], lora), SamplingParams(max_new_tokens=6, temperature=0.0)
    prompts = [[5, 6, 7], [8, 9]]
    plain = EmbeddedGenerator(model, model.mesh).generate(prompts, [0, 1], params)
    generator = EmbeddedGenerator(model, model.mesh)
    generator.runner.spare = model.merged_bytes  # as a GPU has
    ids = [generator.add(Request(prompt, number, params)) for number, prompt in enumerate(prompts)]
    found = {completion.id: completion for completion in generator.step()}
    assert all(module.merged is not None for module in linears(model))
    copies = sum(copy.nbytes for copy in generator.runner.memory()["parameters"])
    assert copies >= model.merged_bytes, "a report of memory leaves them out"
    while generator.busy:
        found |= {completion.id: completion for completion in generator.step()}
    assert [found[number].tokens for number in ids] == [completion.tokens for completion in plain]
    assert not generator.runner.memory()["parameters"]
