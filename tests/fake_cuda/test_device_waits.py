"""Host waits and launches of a model's forward and backward on the fake CUDA device: a mixture of one rank waits for
nothing, recomputed or not, and over ep for one exchange of counts a layer."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_ledger import LEDGER
from fake_run import FakeCuda
from peft_case import build, samples
from tiny import VOCAB, tiny_llama
from tiny_moe import moe_folder
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import Mesh, build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.models.lora import EVERY_TARGET, TARGETS
from trialign.models.moe import Routing, moe_layers


def cuda_mesh(ep: int = 1) -> Mesh:
    return build_mesh(ep=ep, device=torch.device("cuda", dist.get_rank() if ep > 1 else 0))


def step_waits(folder: Path, recompute: bool, lora: LoRA | None, ep: int) -> tuple[dict[str, int], int, int]:
    """{kind: waits} of a forward and backward with the router losses; MoE layers; sums that are on the device."""
    mesh = cuda_mesh(ep)
    model = build(folder, mesh, lora, recompute=recompute, dtype=torch.bfloat16)
    batch = pack(samples(VOCAB)).to(mesh.device)
    routing = Routing(batch.cu_seqlens, 1e-3)
    stage_forward(model, batch, None, routing).float().sum().backward()  # scales of NF4 are quantized once
    LEDGER.clear()
    stage_forward(model, batch, None, routing).float().sum().backward()
    waits: dict[str, int] = {}
    for (_, kind, _), count in LEDGER.syncs.items():
        waits[kind] = waits.get(kind, 0) + count
    return waits, len(moe_layers(model.config)), sum(routing.sums[layer].is_cuda for layer in routing.sums)


@pytest.mark.parametrize("lora", [None, LoRA(4, 8.0, EVERY_TARGET, quantize=True)], ids=["full", "qlora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_mixture_of_one_rank_waits_for_nothing(fake, tmp_path, recompute, lora):
    ((waits, layers, sums),) = fake.call(step_waits, moe_folder(tmp_path, tied=False), recompute, lora, 1)
    assert waits == {} and layers == sums > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_a_mixture_over_ep_waits_once_a_layer(fake, tmp_path, recompute):
    """For the counts of the rows to exchange, in each forward."""
    for waits, layers, _ in fake.call(step_waits, moe_folder(tmp_path, tied=False), recompute, None, 2, ranks=2):
        assert waits == {"tolist": layers * (1 + recompute)}


def decode_launches(folder: Path, lora: LoRA | None, share: float | None, rows: int) -> tuple[int, int]:
    """Launches and waits of a decode step's layers, with the weights frozen for a rollout."""
    model = build(folder, cuda_mesh(), lora, dtype=torch.bfloat16)
    token = torch.zeros(rows, dtype=torch.int64, device=model.mesh.device)
    with torch.no_grad():
        for _ in range(2):
            model.freeze_weights(None if share is None else int(share * model.merged_bytes))
            LEDGER.clear()
            model(token, token, lambda layer, q, k, v: q.clone())
    return sum(LEDGER.launches.values()), sum(LEDGER.syncs.values())


def table(fake: FakeCuda, folder: Path, targets: tuple[str, ...], rows: int) -> dict[str, list[int]]:
    """{weights: launches of all layers as training computes, with single adapter products, and merged}."""
    settings = {"lora": LoRA(4, 8.0, targets), "qlora": LoRA(4, 8.0, targets, quantize=True)}
    found = {}
    for name, lora in ({"plain": None} | settings).items():
        counts = [fake.call(decode_launches, folder, lora, share, rows)[0] for share in (None, 0.0, 1.0)]
        assert not any(waits for _, waits in counts)
        found[name] = [launched for launched, _ in counts]
    return found


@pytest.mark.parametrize("rows, unpacked", [(4, 0), (64, 4)])
def test_launches_of_a_decode_step(fake, tmp_path, rows, unpacked):
    """A layer launches 11, with adapters merged and NF4 unpacked too; adapters without room add two for each of its
    four matrices. NF4 without room adds one for each from 17 rows on, which unpacks it."""
    found = table(fake, tiny_llama(tmp_path, hidden_size=128, intermediate_size=256), TARGETS, rows)
    layers = {
        name: [(count - 3) / 4 for count in counts] for name, counts in found.items()
    }  # 3: embedding, angles, norm
    nf4 = [24 + unpacked, 19 + unpacked, 11]
    assert layers == {"plain": [11, 11, 11], "lora": [24, 19, 11], "qlora": nf4}


def test_launches_of_a_decode_step_of_a_mixture(fake, tmp_path):
    """A dense layer and one with experts and a shared one; merged routers multiply in fp32, a launch more each."""
    found = table(fake, moe_folder(tmp_path, tied=False), EVERY_TARGET, 4)
    assert found == {"plain": [44, 44, 44], "lora": [91, 76, 46], "qlora": [93, 78, 46]}
