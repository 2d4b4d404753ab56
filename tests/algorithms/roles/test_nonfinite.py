"""A NaN or an infinity stops a run by name or skips its step, on all ranks alike, and is in nothing that is kept."""

import dataclasses
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
from trialign.algorithms import sft
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
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
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.checkpoint import Reader
from trialign.models.families.registry import read_config

SPOILT = 5
"""The sample of a batch of eight that something is wrong with, or of its pairs'."""
WHERE = f"rows.jsonl:{SPOILT}"
KINDS = {  # what is found
    "sft": f"loss of {WHERE} (inf)",
    "gradient": "grad of ",
    "reward": f"rewards of {WHERE} (inf)",
    "process": f"rewards of {WHERE} (nan)",
    "dpo": f"ref_logprobs of {WHERE} (nan)",
    "pair": "loss of rows.jsonl:4 and rows.jsonl:5 (inf)",
    "kto": f"ref_logprobs of {WHERE} (-inf)",
    "grpo": f"rewards of {WHERE} (nan)",
    "ppo": f"rewards of {WHERE} (inf)",
}
LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"dp": 2}}


def spoil(values: Tensor, batch: Batch, value: float, sample: int = SPOILT) -> Tensor:
    """`values` [total] with another one at a sample's last token."""
    return values.index_fill(0, batch.last[sample : sample + 1], value)


def one_step(learners: list[Learner], kind: str, seed: int, spoilt: bool) -> dict[str, float]:
    """A step on eight rows, or pairs; `spoilt`: one of them has something that is not finite."""
    learner = learners[0]
    for each in learners:
        each.sizes = PPOConfig().ppo if kind == "ppo" else UpdateConfig(micro_batch_size=3 if kind == "grpo" else 4)
    if kind in ("reward", "dpo", "pair"):
        batch = pack_pairs(pairs(seed))
    elif kind == "process":
        batch = pack_steps(steps(seed))
    elif kind == "kto":
        batch = pack_labeled(*labeled(seed))
    else:
        batch = random_batch(seed)
    batch = batch.with_(names=tuple(f"rows.jsonl:{i}" for i in range(len(batch))))
    if kind in ("dpo", "pair", "kto"):
        sums = torch.full((len(batch),), -20.0)
        if spoilt:
            sums[SPOILT] = {"dpo": torch.nan, "kto": -torch.inf, "pair": -3e38}[kind]
        batch = with_reference(batch, sums)
    elif kind in ("reward", "process") and spoilt:
        assert batch.rewards is not None
        batch = batch.with_(rewards=spoil(batch.rewards, batch, torch.inf if kind == "reward" else torch.nan))
    if kind == "reward":
        return pair_step(learner, batch, 0.05)
    if kind == "process":
        return process_step(learner, batch)
    if kind in ("dpo", "pair"):
        loss = dataclasses.replace(DPO, kind="ipo", label_smoothing=0.0) if kind == "pair" else DPO
        return dpo_step(learner, batch, loss)
    if kind == "kto":
        return kto_step(learner, batch, KTO, 0.1)
    if kind in ("grpo", "ppo"):
        scores = torch.linspace(-1, 1, 8)
        if spoilt:
            scores[SPOILT] = torch.inf
    if kind == "grpo":
        knobs = grpo_options("dapo", micro_batch_size=3)
        group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])  # alone, so that no sibling's advantage is spoilt
        config = GRPOConfig(grpo=dataclasses.replace(knobs, baseline="none", scale_rewards="none"))
        made, _ = with_advantages(batch.with_(scores=scores, group=group), config)
        if spoilt:
            assert made.rewards is not None
            made = made.with_(rewards=spoil(made.rewards, batch, torch.nan))
        return grpo_update(Roles(learner), made.with_(minibatches=draw_minibatches(8, knobs, seed)), config)
    if kind == "ppo":
        config = PPOConfig()
        minibatches = draw_minibatches(8, config.ppo, seed)
        batch = batch.with_(ref_logprobs=batch.rollout_logprobs, minibatches=minibatches)
        batch, _ = with_rewards(batch, scores, config, 0.1)
        roles = Roles(learner, learners[1], learner)
        return ppo_update(roles, batch, config)

    def read(part: Batch, hidden: Tensor) -> Tensor:
        """A finite loss whose gradient is not: that of the root of 0."""
        logprobs, _ = target_logprobs(learner.model, part, hidden, 1.0)
        return -logprobs.sum() / 100 + ((logprobs.sum() * 0).abs().sqrt() if spoilt else 0)

    if kind == "gradient":
        return learner.step(batch, read)
    whole, spoil_one = sft.target_logprobs, batch.select([SPOILT]).tokens

    def planted(model, part, hidden, temperature):
        """Infinite for the spoilt sample's last token, as a vocabulary's overflow would have it."""
        logprobs, entropy = whole(model, part, hidden, temperature)
        here = [i for i, name in enumerate(part.names) if name == WHERE and spoilt]
        bad = torch.isin(part.response, part.last[here])
        return logprobs.masked_fill(bad, -torch.inf), entropy

    assert len(spoil_one) > 1
    sft.target_logprobs = planted
    try:
        return sft.sft_step(learner, batch)
    finally:
        sft.target_logprobs = whole


def states(learners: list[Learner]) -> list[Tensor]:
    """All that a step changes, on this rank."""
    found = []
    for learner in learners:
        for bucket in learner.optimizer.buckets:
            found += [*bucket.states.values(), bucket.weights]
        found.append(torch.tensor(learner.optimizer.steps))
    return [tensor.clone() for tensor in found]


def run(rank: int, world: int, folders: dict[str, Path], kind: str, sizes: dict[str, Any], **given) -> list[str]:
    """A good step, one that is skipped and leaves all as it was, and a good one as if that had never been; why it was
    skipped."""
    mesh = build_mesh(**sizes)
    heads: list[Any] = {"reward": ["score"], "process": ["score"], "ppo": ["lm", "score"]}.get(kind, ["lm"])
    settings = OptimizerConfig(lr=1e-3, on_nonfinite="skip", max_skipped=1, **given)

    def learners() -> list[Learner]:
        return [
            build_learner(
                build_decoder(str(folders[h]), read_config(folders[h]), mesh, "bfloat16", head=h, trained=True),
                settings,
                4,
                ema_decay=0.5,
            )
            for h in heads
        ]

    ours, theirs = learners(), learners()
    skipped = "skipped" if kind != "ppo" else "critic_skipped"
    assert one_step(ours, kind, 0, False)[skipped] == 0
    before = states(ours)
    made = one_step(ours, kind, 1, True)
    assert made[skipped] == 1 and not any(name.endswith("grad_norm") for name in made)
    assert kind != "ppo" or made["actor_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(states(ours), before, strict=True))
    assert one_step(ours, kind, 2, False)[skipped] == 0
    for seed in (0, 2):
        one_step(theirs, kind, seed, False)
    assert all(torch.equal(a, b) for a, b in zip(states(ours), states(theirs), strict=True))
    check_states({"it": ours[0].optimizer}, mesh)
    return [reason for learner in ours for reason in learner.reasons]


def all_kinds(rank: int, world: int, folders: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    return {
        (layout, kind): run(rank, world, folders, kind, sizes) for layout, sizes in LAYOUTS.items() for kind in KINDS
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nonfinite")
    return {"lm": tiny_llama(root / "lm"), "score": tiny_llama(root / "score", score=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_everything_as_it_was_and_names_its_sample(folders, kind):
    reasons = run(0, 1, folders, kind, {})
    assert len(reasons) == (2 if kind == "ppo" else 1)
    for reason in reasons:
        assert f"not finite: {KINDS[kind]}" in reason
        assert WHERE in reason or kind == "gradient"
        assert reason.count("rows.jsonl") == (0 if kind == "gradient" else 2 if kind == "pair" else 1)


def test_all_ranks_skip_alike_in_every_layout(folders):
    ranks = run_ranks(all_kinds, 2, folders, timeout=200)
    assert ranks[0] == ranks[1]
    for (_, kind), reasons in ranks[0].items():
        assert all(f"not finite: {KINDS[kind]}" in reason for reason in reasons), kind


def test_by_default_the_run_stops_and_skips_in_a_row_end_it_too(folders):
    def learner(**given) -> Learner:
        shape = read_config(folders["lm"])
        model = build_decoder(str(folders["lm"]), shape, build_mesh(), "float32", trained=True)
        return build_learner(model, OptimizerConfig(**given), 4)

    stopping = learner()
    before = states([stopping])
    with pytest.raises(FloatingPointError, match=rf"optimizer step 1 is nan: not finite: loss of {WHERE} \(inf\)"):
        one_step([stopping], "sft", 0, True)
    assert all(torch.equal(a, b) for a, b in zip(states([stopping]), before, strict=True))
    skipping = learner(on_nonfinite="skip", max_skipped=2)
    for seed in range(2):
        one_step([skipping], "sft", seed, True)
    one_step([skipping], "sft", 2, False)
    for seed in range(2):
        one_step([skipping], "sft", seed, True)
    with pytest.raises(FloatingPointError, match=r"2 steps before it were skipped .*optimizer.max_skipped"):
        one_step([skipping], "sft", 2, True)


def test_what_is_not_finite_is_not_saved(folders):
    shape, mesh = read_config(folders["lm"]), build_mesh()
    learner = build_learner(
        build_decoder(str(folders["lm"]), shape, mesh, "float32", trained=True), OptimizerConfig(), 1
    )
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


def test_a_reward_that_float32_has_no_number_for_stops_the_run_by_name(setting, tmp_path):
    done = launch("grpo", *grpo(setting, tmp_path / "run", reward_functions=f"{setting}/rewards.py:huge"))
    assert done.returncode != 0
    assert re.search(r"rewards.py:huge: gave 1e\+39 for \S*prompts.jsonl:4: must be a finite number", done.stderr)
    assert not list((tmp_path / "run").glob("checkpoints/step_4"))


def test_a_run_skips_the_step_of_a_reward_that_overflows(setting, tmp_path):
    """1e38 times its weight: four steps see every prompt once, so one of them is skipped."""
    run_ = tmp_path / "run"
    words = grpo(setting, run_, reward_functions=f"{setting}/rewards.py:large", reward_weights=10.0)
    stopped = launch("grpo", *words, "--run.output", str(tmp_path / "stopped"))
    assert stopped.returncode != 0 and re.search(r"not finite: \w+ of \S*prompts.jsonl:4, response 1", stopped.stderr)
    said = succeed("grpo", *words, "--optimizer.on_nonfinite", "skip")
    skipped = [step["skipped"] for step in metrics(run_)]
    assert sorted(skipped) == [0, 0, 0, 1]
    step = skipped.index(1) + 1
    assert re.search(rf"actor: step {step} is skipped: .*prompts.jsonl:4, response 1", said)
    if step > 1:
        before, after = (Reader(run_ / "checkpoints" / f"step_{number}") for number in (step - 1, step))
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_a_reference_that_gives_no_finite_number_stops_the_run_before_its_first_step(setting, tmp_path):
    """Not kept for a resume either."""
    bad = tiny_chat_model(tmp_path / "reference")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite, its products are not
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say", "chosen": "hi", "rejected": "no"}\n' * 4)
    given = options(
        model_path=setting / "model", model_reference=bad, data_sources=tmp_path / "rows.jsonl", data_max_tokens=64,
        update_batch_size=2, run_output=tmp_path / "run",
    )  # fmt: skip
    done = launch("dpo", *given)
    assert done.returncode != 0
    assert re.search(r"log-probability of \S*rows.jsonl:\d is \S+: must be .* \(8 of 8 are not\)", done.stderr)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_loss_of_held_out_rows_that_is_not_finite_is_refused_by_row(tmp_path):
    folder = tiny_chat_model(tmp_path / "model", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)  # finite, its products are not
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = read_config(folder)
    mesh = build_mesh(device="cpu")
    role = Role(build_decoder(str(folder), shape, mesh, "float32"))
    batch = pack([[5, 6, 7], [8, 9]]).with_(names=("a.jsonl:1", "a.jsonl:2"))
    for measure in (
        lambda: sft.eval_loss(role, batch),
        lambda: nats_a_token(role, [batch]),
    ):
        with pytest.raises(ValueError, match=r"^a\.jsonl:1: loss of a token \S+: must be"):
            measure()
    assert perplexity(2.0) == math.exp(2.0) and math.isfinite(perplexity(1e4))

    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "response": "b"}\n')
    given = {"model_path": folder, "model_dtype": "float32", "run_output": tmp_path / "run"}
    done = launch("evaluate", *options(**given, dialogues_sources=source, dialogues_max_tokens=64))
    assert done.returncode == 1 and f"error: {source}:1: " in done.stderr and "Traceback" not in done.stderr
