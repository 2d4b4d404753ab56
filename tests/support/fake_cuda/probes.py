"""Launches and waits of a training micro-batch and of decode steps, on the fake device."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fake_ledger import LEDGER, Launch
from fake_tensor import State
from plant import plant
from torch import Tensor
from trialign.algorithms.batch import Batch, Prompt, from_rollouts, single_turn
from trialign.algorithms.config.common import LoRAConfig, ParallelConfig
from trialign.algorithms.roles.build import build_decoder
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import target_logprobs
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.generation.runner import ModelRunner
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config

LORA = {"lora": LoRAConfig(rank=4), "qlora": LoRAConfig(rank=4, quantize=True)}


class Work(NamedTuple):
    """Counts of one piece of work."""

    launches: int
    waits: int  # of the host for the device
    copies: int  # that the host does not wait for

    def __sub__(self, other: "Work") -> "Work":
        return Work(*(count - before for count, before in zip(self, other, strict=True)))


def work() -> Work:
    """Counts since the ledger was cleared."""
    return Work(*(sum(counts.values()) for counts in (LEDGER.launches, LEDGER.syncs, LEDGER.copies)))


def build(folder: str, kind: str, ep: int) -> Decoder:
    """A trained bf16 model of a folder; kind: dense, lora, qlora or moe."""
    mesh = build_mesh(dp=ep, ep=ep, device=State.device)
    options: dict[str, Any] = {"parallel": ParallelConfig(recompute="none"), "lora": LORA.get(kind)}
    return build_decoder(folder, read_config(Path(folder)), mesh, "bfloat16", trained=True, **options)


def train(folder: str, kind: str, ep: int) -> tuple[Work, set[str]]:
    """One micro-batch, forward and backward; its waits by line."""
    model = build(folder, kind, ep)
    mesh = model.mesh
    learner = Learner(model, ShardedAdamW(model, mesh, name="actor"), lambda step: 0.0)
    # Enough tokens for every expert to have some: ops on none are not launched.
    prompts = [Prompt(i, [3 + i, 50 + i, 30 - i], "", source="") for i in range(8 * ep)]  # a micro-batch a rank
    rollouts = [single_turn(p, [6 + p.index, 70 - p.index, 90 - p.index], [0.0] * 3, "stop") for p in prompts]
    batch = from_rollouts(rollouts).to(mesh.device)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(model, part, hidden, 1.0)[0].sum()

    counts: list[tuple[Work, Counter]] = []
    for more in (0, 0, 1):  # further micro-batches in the step; the first step also fills caches
        LEDGER.clear()
        learner.step(batch, loss, extra_losses=[(batch, loss)] * more)
        counts.append((work(), Counter(LEDGER.syncs)))
    _, (one, one_waits), (two, two_waits) = counts
    return two - one, {f"{kind} {line}" for _, kind, line in two_waits - one_waits}


class Decoding(NamedTuple):
    """Decode steps of a generation.

    Attributes:
        step: the work of a step between its plan and the next.
        plan: the work of a plan, with the advance of the rows.
        replays: of captured steps.
        same_launches: whether steps that were not captured launch the same ops on the same addresses.
        waits: of the steps, by line.
    """

    tokens: list[list[int]]
    step: Work
    plan: Work
    replays: int
    same_launches: bool
    waits: set[str]


def decode(folder: str, kind: str, ep: int, captured: bool) -> Decoding:
    """Generates 16 tokens to each of four prompts, with captured steps or without."""
    model, middle = build(folder, kind, ep), slice(4, 12)  # steps without admission, compilation, capture or end
    steps: list[Work] = []
    plans: list[Work] = []
    traces: list[list[Launch]] = []
    waits: list[Counter] = []
    if not captured:
        ModelRunner._new_graphs = lambda self: None
        ModelRunner._decode = _traced(ModelRunner._decode, traces)
    generator = EmbeddedGenerator(model, model.mesh, max_running=4, max_length=64)
    plan, run = generator._plan, generator.runner.run

    def counted_plan(number: int) -> None:
        before = work()
        plan(number)
        plans.append(work() - before)

    def counted_run(lane: Any, step: Any, hidden: Tensor | None) -> Tensor:
        before, known = work(), Counter(LEDGER.syncs)
        output = run(lane, step, hidden)
        steps.append(work() - before)
        waits.append(LEDGER.syncs - known)
        return output

    generator._plan, generator.runner.run = counted_plan, counted_run
    LEDGER.clear()
    prompts = [[3 + i, 4, 5] for i in range(4)]
    done = generator.generate(prompts, list(range(4)), SamplingParams(max_new_tokens=16, temperature=1.0))
    lines = {f"{kind} {line}" for counts in waits[middle] for _, kind, line in counts}
    replays = sum(count for (_, op, _), count in LEDGER.launches.items() if op == "graph")
    same = len(traces) > 8 and all(trace == traces[middle][0] for trace in traces[middle])
    tokens = [completion.tokens for completion in done]
    return Decoding(tokens, max(steps[middle]), max(plans[middle]), replays, same, lines)


def faulty(folder: str, captured: bool) -> Decoding | str:
    """`decode` with a hidden item in each step; the error of its capture."""
    plant(ModelRunner._sample, "logits = all_gather(", "lane.position[0].item(); logits = all_gather(")
    try:
        return decode(folder, "dense", 1, captured)
    except RuntimeError as error:
        return str(error)


def _traced(step: Callable, traces: list[list[Launch]]) -> Callable:
    def run(*given: Any) -> Tensor:
        with LEDGER.tracing() as trace:
            output = step(*given)
        traces.append(trace)
        return output

    return run
