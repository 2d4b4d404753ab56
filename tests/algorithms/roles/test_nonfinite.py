"""NaN and infinity: the run stops or skips the step on all ranks, names the sample, and saves no such number."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from preferences import DPO, KTO, labeled, pairs, steps
from presets import grpo_options
from safetensors.torch import load_file, save_file
from samples import random_batch
from scripts import launch, metrics, options, succeed
from tiny import tiny_chat_model, tiny_llama
from torch import Tensor
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.preference import DPOLoss
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.dpo import dpo_step, with_reference
from trialign.algorithms.grpo import update as grpo_update
from trialign.algorithms.grpo import with_advantages
from trialign.algorithms.kto import kto_step, pack_labeled
from trialign.algorithms.metrics import nats_a_token, perplexity
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.ppo import update as ppo_update
from trialign.algorithms.ppo import with_rewards
from trialign.algorithms.reward_model import pack_pairs, pack_steps, pair_step, process_step
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Learner, Roles
from trialign.algorithms.roles.nonfinite import check_states
from trialign.algorithms.roles.role import Role, target_logprobs
from trialign.algorithms.sft import eval_loss
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.checkpoint import Reader
from trialign.models.families.registry import read_config

CORRUPT = 5
"""Index of the sample with the number that is not finite, in batches of eight samples or pairs."""
ROW = f"rows.jsonl:{CORRUPT}"
KINDS = {  # -> culprit in the message
    "sft": f"loss of {ROW} (inf)",
    "gradient": "grad of ",
    "reward": f"rewards of {ROW} (inf)",
    "process": f"rewards of {ROW} (nan)",
    "dpo": f"ref_logprobs of {ROW} (nan)",
    "pair": "loss of rows.jsonl:4 and rows.jsonl:5 (inf)",
    "kto": f"ref_logprobs of {ROW} (-inf)",
    "grpo": f"rewards of {ROW} (nan)",
    "ppo": f"rewards of {ROW} (inf)",
}
LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"dp": 2}}


def batch_of(kind: str, seed: int, corrupt: bool) -> Batch:
    """Eight samples or pairs; `corrupt`: with a number of sample CORRUPT that is not finite, if the batch holds it."""
    if kind in ("reward", "dpo", "pair"):
        batch = pack_pairs(pairs(seed))
    elif kind in ("process", "kto"):
        batch = pack_steps(steps(seed)) if kind == "process" else pack_labeled(*labeled(seed))
    else:
        batch = random_batch(seed)
    batch = batch.with_(names=tuple(f"rows.jsonl:{i}" for i in range(len(batch))))
    if kind in ("dpo", "pair", "kto"):
        sums = torch.full((len(batch),), -20.0)
        if corrupt:
            sums[CORRUPT] = {"dpo": torch.nan, "kto": -torch.inf, "pair": -3e38}[kind]
        batch = with_reference(batch, sums)
    if kind in ("reward", "process") and corrupt:
        assert batch.rewards is not None
        at, value = batch.last[CORRUPT : CORRUPT + 1], torch.inf if kind == "reward" else torch.nan
        batch = batch.with_(rewards=batch.rewards.index_fill(0, at, value))
    return batch


def one_step(learners: list[Learner], kind: str, seed: int, corrupt: bool) -> dict[str, float]:
    """An optimizer step of a kind, with or without a number that is not finite."""
    learner, batch = learners[0], batch_of(kind, seed, corrupt)
    for each in learners:
        each.sizes = PPOConfig().ppo if kind == "ppo" else UpdateConfig(micro_batch_size=3 if kind == "grpo" else 4)
    scores = torch.linspace(-1, 1, 8)
    scores[CORRUPT] = torch.inf if corrupt else scores[CORRUPT]
    if kind == "reward":
        return pair_step(learner, batch, 0.05)
    if kind == "process":
        return process_step(learner, batch)
    if kind in ("dpo", "pair"):
        return dpo_step(learner, batch, DPO if kind == "dpo" else DPOLoss(kind="ipo"))
    if kind == "kto":
        return kto_step(learner, batch, KTO, 0.1)
    if kind == "grpo":
        options = grpo_options("dapo", micro_batch_size=3, baseline="none", scale_rewards="none")
        group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])  # CORRUPT is alone in its group
        batch, _ = with_advantages(batch.with_(scores=scores, group=group), config := GRPOConfig(grpo=options))
        if corrupt:
            assert batch.rewards is not None
            batch = batch.with_(rewards=batch.rewards.index_fill(0, batch.last[CORRUPT : CORRUPT + 1], torch.nan))
        return grpo_update(Roles(learner), batch.with_(minibatches=draw_minibatches(8, options, seed)), config)
    if kind == "ppo":
        config = PPOConfig()
        batch = batch.with_(ref_logprobs=batch.rollout_logprobs, minibatches=draw_minibatches(8, config.ppo, seed))
        batch, _ = with_rewards(batch, scores, config, 0.1)
        return ppo_update(Roles(learner, learners[1], learner), batch, config)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        logprobs, _ = target_logprobs(learner.model, part, hidden, 1.0)
        if kind == "sft":  # an infinite loss at the sample's last token, as by an overflow of the vocabulary's logits
            at = [i for i, name in enumerate(part.names) if name == ROW and corrupt]
            return -logprobs.masked_fill(torch.isin(part.response, part.last[at]), -torch.inf).sum() / 100
        root = (logprobs.sum() * 0).abs().sqrt() if corrupt else 0  # finite, unlike its gradient
        return -logprobs.sum() / 100 + root

    return learner.step(batch, loss)


def states(learners: list[Learner]) -> list[Tensor]:
    """States that a step changes, on this rank."""
    found = []
    for learner in learners:
        for bucket in learner.optimizer.buckets:
            found += [*bucket.states.values(), bucket.weights]
        found.append(torch.tensor(learner.optimizer.steps))
    return [tensor.clone() for tensor in found]


def run(rank: int, world: int, folders: dict[str, Path], kind: str, sizes: dict[str, Any]) -> list[str]:
    """Reasons of a skipped step between two good ones; the run ends as one of the good steps alone."""
    mesh = build_mesh(**sizes)
    heads: list[Any] = {"reward": ["score"], "process": ["score"], "ppo": ["lm", "score"]}.get(kind, ["lm"])
    settings = OptimizerConfig(lr=1e-3, on_nonfinite="skip", max_skipped=1)

    def learners() -> list[Learner]:
        options: dict[str, Any] = {"dtype": "bfloat16", "trained": True}
        models = [build_decoder(str(folders[h]), read_config(folders[h]), mesh, head=h, **options) for h in heads]
        return [build_learner(model, settings, 4, ema_decay=0.5) for model in models]

    skipping, expected = learners(), learners()
    skipped = "skipped" if kind != "ppo" else "critic_skipped"
    assert one_step(skipping, kind, 0, False)[skipped] == 0
    before = states(skipping)
    metrics = one_step(skipping, kind, 1, True)
    assert metrics[skipped] == 1 and not any(name.endswith("grad_norm") for name in metrics)
    assert kind != "ppo" or metrics["actor_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(states(skipping), before, strict=True))
    for seed in (0, 2):
        one_step(expected, kind, seed, False)
    assert one_step(skipping, kind, 2, False)[skipped] == 0
    assert all(torch.equal(a, b) for a, b in zip(states(skipping), states(expected), strict=True))
    check_states({"actor": skipping[0].optimizer}, mesh)
    return [reason for learner in skipping for reason in learner.reasons]


def run_all_kinds(rank: int, world: int, folders: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    return {
        (layout, kind): run(rank, world, folders, kind, sizes) for layout, sizes in LAYOUTS.items() for kind in KINDS
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nonfinite")
    return {"lm": tiny_llama(root / "lm"), "score": tiny_llama(root / "score", score=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_steps_change_nothing_and_name_the_sample(folders, kind):
    reasons = run(0, 1, folders, kind, {})
    assert len(reasons) == (2 if kind == "ppo" else 1)
    for reason in reasons:
        assert f"not finite: {KINDS[kind]}" in reason
        assert reason.count("rows.jsonl") == (0 if kind == "gradient" else 2 if kind == "pair" else 1)


def test_all_ranks_skip_the_same_steps(folders):
    ranks = run_ranks(run_all_kinds, 2, folders, timeout=200)
    assert ranks[0] == ranks[1]
    for (_, kind), reasons in ranks[0].items():
        assert all(f"not finite: {KINDS[kind]}" in reason for reason in reasons), kind


def learner_of(folder: Path, **options) -> Learner:
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", trained=True)
    return build_learner(model, OptimizerConfig(**options), 4)


def test_nonfinite_numbers_stop_the_run_by_default_and_after_max_skipped(folders):
    stopping = learner_of(folders["lm"])
    before = states([stopping])
    with pytest.raises(FloatingPointError, match=rf"optimizer step 1 is nan: not finite: loss of {ROW} \(inf\)"):
        one_step([stopping], "sft", 0, True)
    assert all(torch.equal(a, b) for a, b in zip(states([stopping]), before, strict=True))
    skipping = learner_of(folders["lm"], on_nonfinite="skip", max_skipped=2)
    for corrupt in (True, True, False, True, True):
        one_step([skipping], "sft", 0, corrupt)
    with pytest.raises(FloatingPointError, match=r"2 steps before it were skipped .*optimizer.max_skipped"):
        one_step([skipping], "sft", 2, True)


def test_nonfinite_states_are_not_saved(folders):
    learner, mesh = learner_of(folders["lm"]), build_mesh()
    check_states({"actor": learner.optimizer}, mesh)
    learner.optimizer.buckets[0].states["exp_avg_sq"][3] = torch.inf
    with pytest.raises(FloatingPointError, match=r"no checkpoint is written: not finite: actor: exp_avg_sq of \w+"):
        check_states({"actor": learner.optimizer}, mesh)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    tiny_chat_model(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (folder / "rewards.py").write_text(
        "def lengths(prompts, completions, three):\n"
        "    return [three if '3' in p else float(len(c)) for p, c in zip(prompts, completions)]\n"
        "def huge(prompts, completions, **_): return lengths(prompts, completions, 1e39)\n"
        "def large(prompts, completions, **_): return lengths(prompts, completions, 1e38)\n"
    )
    return folder


def grpo(setting: Path, output: Path, **given) -> list[str]:
    fixed = options(
        model_path=setting / "model", model_dtype="float32", data_sources=setting / "prompts.jsonl",
        data_max_prompt_tokens=96, rollout_max_new_tokens=4, rollout_samples_per_prompt=2, reward_clip=0,
        run_prompts_per_step=2, run_steps=4, run_save_every=1, run_keep=9, run_show=0, optimizer_lr=1e-3,
        run_output=output,
    )  # fmt: skip
    return fixed + options(**given)


def test_reward_beyond_float32_stops_the_run(setting, tmp_path):
    done = launch("grpo", *grpo(setting, tmp_path / "run", reward_functions=f"{setting}/rewards.py:huge"))
    assert done.returncode != 0
    assert re.search(r"rewards.py:huge: gave 1e\+39 for \S*prompts.jsonl:4: must be a finite number", done.stderr)
    assert not list((tmp_path / "run").glob("checkpoints/step_4"))


def test_reward_that_overflows_by_its_weight_skips_one_step(setting, tmp_path):
    """1e38 times 10; four steps see every prompt once. Without skipping the run stops."""
    run_ = tmp_path / "run"
    words = grpo(setting, run_, reward_functions=f"{setting}/rewards.py:large", reward_weights=10.0)
    stopped = launch("grpo", *words, "--run.output", str(tmp_path / "stopped"))
    assert stopped.returncode != 0 and re.search(r"not finite: \w+ of \S*prompts.jsonl:4, response 1", stopped.stderr)
    output = succeed("grpo", *words, "--optimizer.on_nonfinite", "skip")
    skipped = [step["skipped"] for step in metrics(run_)]
    assert sorted(skipped) == [0, 0, 0, 1]
    step = skipped.index(1) + 1
    assert re.search(rf"actor: step {step} is skipped: .*prompts.jsonl:4, response 1", output)
    if step > 1:
        before, after = (Reader(run_ / "checkpoints" / f"step_{number}") for number in (step - 1, step))
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def overflowing_model(folder: Path, **changes) -> Path:
    """A model with finite weights whose products are not finite."""
    tiny_chat_model(folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nonfinite_reference_stops_the_run_before_its_first_step(setting, tmp_path):
    """And leaves no reference pass for a resume."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say", "chosen": "hi", "rejected": "no"}\n' * 4)
    given = options(
        model_path=setting / "model", model_reference=overflowing_model(tmp_path / "reference"),
        data_sources=tmp_path / "rows.jsonl", data_max_tokens=64, update_batch_size=2, run_output=tmp_path / "run",
    )  # fmt: skip
    done = launch("dpo", *given)
    assert done.returncode != 0
    assert re.search(r"log-probability of \S*rows.jsonl:\d is \S+: must be .* \(8 of 8 are not\)", done.stderr)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_nonfinite_eval_losses_are_refused(tmp_path):
    folder = overflowing_model(tmp_path / "model", num_hidden_layers=1)
    role = Role(build_decoder(str(folder), read_config(folder), build_mesh(device="cpu"), "float32"))
    batch = pack([[5, 6, 7], [8, 9]]).with_(names=("a.jsonl:1", "a.jsonl:2"))
    for measure in (lambda: eval_loss(role, batch), lambda: nats_a_token(role, [batch])):
        with pytest.raises(ValueError, match=r"^a\.jsonl:1: loss of a token \S+: must be"):
            measure()
    assert perplexity(2.0) == math.exp(2.0) and math.isfinite(perplexity(1e4))
