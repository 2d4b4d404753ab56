"""NaN and infinity: the run stops or skips the step on all ranks, names the sample, and saves no such number."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from preferences import KTO, labeled, pairs, steps
from presets import grpo_options
from safetensors.torch import load_file, save_file
from samples import random_batch
from scripts import launch, metrics, options, succeed
from tiny import tiny_chat_model, tiny_llama
from tiny_run import prompts, tiny_run
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


def corrupted(batch: Batch, value: float) -> Batch:
    """The batch with another reward at the last token of CORRUPT."""
    assert batch.rewards is not None
    return batch.with_(rewards=batch.rewards.index_fill(0, batch.last[CORRUPT : CORRUPT + 1], value))


def one_step(learners: list[Learner], kind: str, seed: int, corrupt: bool) -> dict[str, float]:
    """An optimizer step on eight samples or pairs; `corrupt`: a number of sample CORRUPT is not finite."""
    learner = learners[0]
    made = {"kto": lambda: pack_labeled(*labeled(seed)), "process": lambda: pack_steps(steps(seed))}
    made |= dict.fromkeys(("reward", "dpo", "pair"), lambda: pack_pairs(pairs(seed)))
    batch = made.get(kind, lambda: random_batch(seed))()
    batch = batch.with_(names=tuple(f"rows.jsonl:{i}" for i in range(len(batch))))
    for each in learners:
        each.sizes = PPOConfig().ppo if kind == "ppo" else UpdateConfig(micro_batch_size=3 if kind == "grpo" else 4)
    scores = torch.linspace(-1, 1, 8)
    scores[CORRUPT] = torch.inf if corrupt else scores[CORRUPT]
    if kind in ("dpo", "pair", "kto"):
        sums = torch.full((len(batch),), -20.0)
        if corrupt:
            sums[CORRUPT] = {"dpo": torch.nan, "kto": -torch.inf, "pair": -3e38}[kind]
        batch = with_reference(batch, sums)
        if kind == "kto":
            return kto_step(learner, batch, KTO, 0.1)
        return dpo_step(learner, batch, DPOLoss(kind="ipo" if kind == "pair" else "dpo"))
    if kind in ("reward", "process"):
        if corrupt:
            batch = corrupted(batch, torch.inf if kind == "reward" else torch.nan)
        return pair_step(learner, batch, 0.05) if kind == "reward" else process_step(learner, batch)
    if kind == "grpo":
        options = grpo_options("dapo", micro_batch_size=3, baseline="none", scale_rewards="none")
        group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])  # CORRUPT is alone in its group
        batch, _ = with_advantages(batch.with_(scores=scores, group=group), config := GRPOConfig(grpo=options))
        batch = corrupted(batch, torch.nan) if corrupt else batch
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
    heads: list[Any] = {"ppo": ["lm", "score"], "reward": ["score"], "process": ["score"]}.get(kind, ["lm"])
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


def test_rewards_that_are_not_finite_stop_the_run_or_skip_one_step(tmp_path):
    """1e39 is beyond float32; 1e38 is by its weight of 10. Four steps see every prompt once."""
    given = {"rollout_max_new_tokens": 4, "rollout_samples_per_prompt": 2, "reward_clip": 0, "optimizer_lr": 1e-3}
    given |= {"run_prompts_per_step": 2, "run_steps": 4, "run_save_every": 1, "run_keep": 9, "run_show": 0}
    config = tiny_run(tmp_path, prompts(8), data_max_prompt_tokens=96, **given) / "config.toml"
    (tmp_path / "own.py").write_text(
        "def lengths(prompts, completions, three):\n"
        "    return [three if '3' in p else float(len(c)) for p, c in zip(prompts, completions)]\n"
        "def huge(prompts, completions, **_): return lengths(prompts, completions, 1e39)\n"
        "def large(prompts, completions, **_): return lengths(prompts, completions, 1e38)\n"
    )

    def words(name: str, output: str) -> list[str]:
        own = options(reward_functions=f"{tmp_path}/own.py:{name}", run_output=tmp_path / output)
        return ["--config", str(config), *own]

    done = launch("grpo", *words("huge", "refused"))
    assert done.returncode != 0
    assert re.search(r"own.py:huge: .*1e\+39 for \S*rows.jsonl:4: must be a finite number", done.stderr)
    assert not list((tmp_path / "refused").glob("checkpoints/step_4"))
    weighted = [*words("large", "run"), "--reward.weights", "10"]
    stopped = launch("grpo", *weighted, "--run.output", str(tmp_path / "stopped"))
    assert stopped.returncode != 0 and re.search(r"not finite: \w+ of \S*rows.jsonl:4, response 1", stopped.stderr)
    output = succeed("grpo", *weighted, "--optimizer.on_nonfinite", "skip")
    skipped = [step["skipped"] for step in metrics(tmp_path / "run")]
    assert sorted(skipped) == [0, 0, 0, 1]
    step = skipped.index(1) + 1
    assert re.search(rf"actor: step {step} is skipped: .*rows.jsonl:4, response 1", output)
    if step > 1:
        before, after = (Reader(tmp_path / "run" / "checkpoints" / f"step_{number}") for number in (step - 1, step))
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def overflowing_model(folder: Path, **changes) -> Path:
    """A model with finite weights whose products are not finite."""
    tiny_chat_model(folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nonfinite_reference_stops_the_run_before_its_first_step(tmp_path):
    """And leaves no reference pass for a resume."""
    reference, rows = overflowing_model(tmp_path / "reference"), [{"prompt": "say", "chosen": "hi", "rejected": "no"}]
    tiny_run(tmp_path, rows * 4, model_reference=str(reference), data_max_tokens=64, update_batch_size=2)
    done = launch("dpo", "--config", tmp_path / "config.toml", "--run.output", tmp_path / "run")
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
