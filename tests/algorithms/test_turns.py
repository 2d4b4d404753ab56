"""Rollouts of two turns with an environment's tokens between and after them: batches, files, and losses in float64."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from presets import grpo_options
from samples import tokenizer
from tiny import tiny_llama
from trialign.algorithms.batch import Batch, Prompt, Rollout, Turn, from_rollouts, response_texts, single_turn
from trialign.algorithms.config.common import OptimizerConfig, RolloutConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import ActorConfig, CriticConfig, PPOConfig, PPOOptions
from trialign.algorithms.data.responses import (
    label_pairs,
    make_responses,
    pick,
    picked_samples,
    read_responses,
    read_sampled_pairs,
    write_responses,
)
from trialign.algorithms.data.text_files import write_jsonl
from trialign.algorithms.grpo import actor_step as group_actor_step
from trialign.algorithms.ppo import actor_step, critic_step
from trialign.algorithms.reward_model import pack_pairs
from trialign.algorithms.rewards.encoder import completion_of, conversation
from trialign.algorithms.rewards.scorer import with_conversations
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import read_config

WORDS = tokenizer()


def ids(text: str) -> list[int]:
    return WORDS(text)["input_ids"]


def rollouts() -> list[Rollout]:
    """Two turns and a tool's words at the end, one turn, two turns with a truncated last one, one truncated turn."""
    user = ({"role": "user", "content": "say a"},)
    tool = ({"role": "tool", "content": "w5 w6"},)
    first = Turn(ids("hello w1 <eos>"), [-0.1, -0.2, -0.3], [3, 3, 4])
    second = Turn(ids("w2 <eos>"), [-0.4, -0.5], [4, 4])
    cut = Turn(ids("w2 w3"), [-0.6, -0.7], [4, 5], "length")
    given, after = Turn(ids("w5 w6 w5"), messages=tool), Turn(ids("w6"), messages=tool)
    prompts = [Prompt(i, ids("say a"), "say a", {"level": i}, f"rows:{i}", user) for i in range(2)]
    return [
        Rollout(prompts[0], (first, given, second, after)),
        single_turn(prompts[0], ids("b <eos>"), [-1.0, -2.0], "stop"),
        Rollout(prompts[1], (first, given, cut)),
        single_turn(prompts[1], ids("c"), [-3.0], "length"),
    ]


def test_batch_has_mask_logprobs_and_versions_of_policy_tokens():
    batch = from_rollouts(rollouts())
    policy = [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1]
    assert batch.mask.tolist() == [bool(m) for mask in policy for m in mask] and batch.lengths == (11, 4, 10, 3)
    assert batch.last.tolist() == [9, 14, 24, 27]  # of the first, not the tool's last token
    assert batch.rollout_logprobs is not None and batch.versions is not None
    logprobs, versions = batch.rollout_logprobs[batch.mask], batch.versions[batch.mask]
    assert logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -1, -2, -0.1, -0.2, -0.3, -0.6, -0.7, -3])
    assert versions.tolist() == [3, 3, 4, 4, 4, 0, 0, 3, 3, 4, 4, 5, 0]
    assert not batch.rollout_logprobs[~batch.mask].any() and not batch.versions[~batch.mask].any()
    assert [rollout.length for rollout in rollouts()] == [5, 2, 5, 1]
    assert [rollout.finish for rollout in rollouts()] == ["stop", "stop", "length", "length"]
    masked = batch.with_(mask=batch.mask & (torch.arange(28) > 14))  # samples without targets: their last token
    assert masked.last.tolist() == [10, 14, 24, 27]
    assert batch.select([2, 0]).last.tolist() == [9, 19]


def test_malformed_rollouts_are_refused():
    """No turns, an environment first, no tokens, too few logprobs or versions."""
    one = Turn([5], [-1.0], [0])
    for turns in ((), (Turn([5]), one), (one, Turn([], [], [])), (Turn([5, 6], [-1.0], [0, 0]),),
                  (Turn([5, 6], [-1.0, -1.0], [0]),)):  # fmt: skip
        with pytest.raises(ValueError, match="rows:7"):
            from_rollouts([Rollout(Prompt(0, [1], "p", source="rows:7"), turns)])


def test_texts_hold_policy_turns_and_conversations_all_turns():
    done = rollouts()
    assert response_texts(done, WORDS) == ["hello w1\n\nw2", "b", "hello w1\n\nw2 w3", "c"]
    tool = {"role": "tool", "content": "w5 w6"}
    start = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "hello w1"}, tool]
    whole = [*start, {"role": "assistant", "content": "w2"}, tool]
    assert conversation(done[0], ["hello w1", "w2"]) == whole
    last = completion_of(done[0], ["hello w1", "w2"])  # scored by a reward model with its own tokenizer
    assert (last.messages, last.text, last.finished) == (start, "w2", True)
    columns = [prompt.fields for prompt in with_conversations(done, WORDS)]
    assert columns[0] == {"level": 0, "conversation": whole}
    assert columns[1]["conversation"] == [start[0], {"role": "assistant", "content": "b"}]
    assert with_conversations(done[1:2], WORDS)[0].fields == {"level": 0}  # not in a batch of single turns
    bare = dataclasses.replace(done[0], turns=(done[0].turns[0], Turn([5]), done[0].turns[2]))
    with pytest.raises(ValueError, match="rows:0: .*turn 1 "):
        conversation(bare, ["a", "b"])


def test_rows_of_responses_keep_their_turns(tmp_path):
    done = rollouts()
    rewards = [1.0, 0.0, 2.0, -1.0]
    responses = make_responses(done, response_texts(done, WORDS), rewards, {"f": rewards})
    pick(responses, [r.prompt.index for r in done], "sft")
    write_responses(tmp_path / "rows.jsonl", responses)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert ['"mask"' in line for line in lines] == [True, False, True, False]
    assert read_responses(tmp_path / "rows.jsonl") == responses
    first, third = picked_samples(responses)
    assert bytes(first.mask) == bytes([0, 0, 1, 1, 1, 0, 0, 0, 1, 1])  # up to its last target
    assert bytes(third.mask) == bytes([0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
    write_jsonl(tmp_path / "pairs.jsonl", label_pairs(responses, 1).rows)
    pairs = read_sampled_pairs(str(tmp_path / "pairs.jsonl"))
    assert [pair.chosen[:2] for pair in pairs] == [first[:2], third[:2]]
    assert pack_pairs(pairs).last.tolist() == [9, 13, 23, 26]


def targets_of(batch: Batch, sample: int) -> list[int]:
    """Indices of a sample's targets."""
    begin = sum(batch.lengths[:sample])
    return [place for place in range(begin, begin + batch.lengths[sample]) if batch.mask[place]]


PPO = PPOConfig(
    actor=ActorConfig(clip_low=0.1, clip_high=0.1, dual_clip=1.25, entropy_coef=0.01),
    critic=CriticConfig(value_clip=0.2),
    ppo=PPOOptions(loss_aggregation="sample-mean", tis_clip=1.05, micro_batch_size=2),
    rollout=RolloutConfig(max_new_tokens=16),
)
GSPO = GRPOConfig(
    grpo=grpo_options("gspo", clip_low=0.03, clip_high=0.03, entropy_coef=0.01, micro_batch_size=2),
    rollout=RolloutConfig(max_new_tokens=16, samples_per_prompt=2),
)
OLD = torch.tensor([-0.25, 0.1, 0.05, -0.1, 0.3, 0.02, -0.04, 0.9, -0.3, 0.15, -0.16, 0.05, -0.1])
"""Distance of each target's old logprob from the actor's."""
ADVANTAGES = torch.tensor([1.0, 0.5, -1.0, 0.4, -0.7, 0.3, -0.2, -1.2, -0.9, 0.8, 1.1, -0.6, 0.5])
"""Both signs at ratios inside of and beyond the clips, and beyond the dual clip."""


def off_policy_step(folder: Path, kind: str) -> dict[str, float]:
    """Metrics of one step of actor (PPO, GSPO) or critic on the four rollouts."""
    head: Any = "score" if kind == "critic" else "lm"
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", head=head, trained=True)
    learner = build_learner(model, OptimizerConfig(lr=0.0, max_grad_norm=0.0), 1, sizes=PPO.ppo)
    batch = from_rollouts(rollouts())
    off = batch.scatter(OLD)
    if kind == "critic":
        values = learner.values(batch)
        return critic_step(learner, batch.with_(values=values + off, returns=values - off), range(4), PPO)[0]
    logprobs, advantages = learner.logprobs(batch), batch.scatter(ADVANTAGES)
    batch = batch.with_(logprobs=logprobs + off, rollout_logprobs=logprobs + off / 2, advantages=advantages)
    if kind == "ppo":
        return actor_step(learner, batch, range(4), PPO, first=False)
    return group_actor_step(learner, batch, range(4), GSPO, first=False)


def reference_step(folder: Path, kind: str) -> tuple[float, float, float]:
    """(loss, clip fraction, gradient norm) in float64 by transformers, one sample at a time."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    head: Any = LlamaForSequenceClassification if kind == "critic" else LlamaForCausalLM
    model = head.from_pretrained(folder, dtype=torch.float64)
    batch, offsets = from_rollouts(rollouts()), torch.stack([OLD, ADVANTAGES]).double()
    losses, bonus, clipped = [], [], []
    for sample in range(4):
        places, begin = targets_of(batch, sample), sum(batch.lengths[:sample])
        tokens, rows = batch.tokens[begin : begin + batch.lengths[sample]][None], [i - begin - 1 for i in places]
        (off, advantages), offsets = offsets[:, : len(places)], offsets[:, len(places) :]
        if kind == "critic":
            values = model.score(model.model(tokens).last_hidden_state)[0, rows, 0]
            old, returns = values.detach() + off, values.detach() - off
            free, held = (values - returns) ** 2, (old + (values - old).clamp(-0.2, 0.2) - returns) ** 2
            own = PPO.critic.loss_coef * torch.maximum(free, held)
        else:
            distribution = model(tokens).logits[0, rows].log_softmax(-1)
            logprobs = distribution.gather(1, batch.tokens[places][:, None])[:, 0]
            bonus.append(-0.01 * (distribution.exp() * distribution).sum(-1).mean())
            d, clip = logprobs - logprobs.detach() - off, 0.1
            if kind == "gspo":
                d, clip = d.mean().expand_as(d), 0.03
            free, held = -d.exp() * advantages, -d.exp().clamp(1 - clip, 1 + clip) * advantages
            own = torch.maximum(free, held)
        if kind == "ppo":
            own = torch.where(advantages < 0, torch.minimum(own, -1.25 * advantages), own)  # dual clip
            own = own * (off / 2).exp().clamp(max=1.05)  # truncated importance sampling
        losses.append(own.mean())
        clipped += (held > free + 1e-9).tolist()
    loss = torch.stack(losses).mean()  # sample-mean
    (loss - sum(bonus) / 4).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), sum(clipped) / len(clipped), norm.item()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ppo", ("policy_loss", "clip_fraction", "actor_grad_norm")),
        ("gspo", ("policy_loss", "clip_fraction", "grad_norm")),
        ("critic", ("value_loss", "value_clip_fraction", "critic_grad_norm")),
    ],
)
def test_losses_of_two_turns_equal_float64(tmp_path, kind, names):
    folder = tiny_llama(tmp_path, score=kind == "critic")
    expected, metrics = reference_step(folder, kind), off_policy_step(folder, kind)
    assert [metrics[name] for name in names] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected[1] < 1
