"""Rollouts of two turns with an environment's tokens between and after them, against plain loops over each sample."""

import dataclasses

import pytest
import torch
from samples import tokenizer
from trialign.algorithms.advantages import gae
from trialign.algorithms.batch import Batch, Prompt, Rollout, Turn, from_rollouts, response_texts, single_turn
from trialign.algorithms.config.grpo import GRPOConfig, GRPOOptions
from trialign.algorithms.config.ppo import PPOConfig, PPOOptions
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
from trialign.algorithms.grpo import with_advantages as with_group_advantages
from trialign.algorithms.losses.aggregation import Segments, token_weights
from trialign.algorithms.losses.value import value_loss
from trialign.algorithms.ppo import with_gae, with_rewards
from trialign.algorithms.reward_model import pack_pairs
from trialign.algorithms.rewards.encoder import completion_of, conversation
from trialign.algorithms.rewards.scorer import with_conversations

WORDS = tokenizer()


def ids(text: str) -> list[int]:
    return WORDS(text)["input_ids"]


def rollouts() -> list[Rollout]:
    """Two turns that end with a tool's words, one turn, and two turns of which the last was cut."""
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


def test_the_batch_marks_policy_tokens_with_logprobs_and_versions():
    batch = from_rollouts(rollouts())
    policy = [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1]
    assert batch.mask.tolist() == [bool(m) for mask in policy for m in mask] and batch.lengths == (11, 4, 10, 3)
    assert batch.last.tolist() == [9, 14, 24, 27]  # of the first, not the tool's last word
    assert batch.rollout_logprobs is not None and batch.versions is not None
    logprobs, versions = batch.rollout_logprobs[batch.mask], batch.versions[batch.mask]
    assert logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -1, -2, -0.1, -0.2, -0.3, -0.6, -0.7, -3])
    assert versions.tolist() == [3, 3, 4, 4, 4, 0, 0, 3, 3, 4, 4, 5, 0]
    assert not batch.rollout_logprobs[~batch.mask].any() and not batch.versions[~batch.mask].any()
    assert [rollout.length for rollout in rollouts()] == [5, 2, 5, 1]
    assert [rollout.finish for rollout in rollouts()] == ["stop", "stop", "length", "length"]
    masked = batch.with_(mask=batch.mask & (torch.arange(28) > 14))  # samples without targets have a last token still
    assert masked.last.tolist() == [10, 14, 24, 27]
    assert batch.select([2, 0]).last.tolist() == [9, 19]


@pytest.mark.parametrize(
    "turns",
    [
        (),
        (Turn([5]), Turn([6], [-1.0], [0])),
        (Turn([5], [-1.0], [0]), Turn([], [], [])),
        (Turn([5, 6], [-1.0], [0, 0]),),
        (Turn([5, 6], [-1.0, -1.0], [0]),),
    ],
    ids=["none", "the environment first", "no tokens", "too few logprobs", "too few versions"],
)
def test_malformed_rollouts_are_refused_by_their_row(turns):
    with pytest.raises(ValueError, match="rows:7"):
        from_rollouts([Rollout(Prompt(0, [1], "p", source="rows:7"), turns)])


def test_texts_are_of_the_policy_and_the_conversation_is_whole():
    done = rollouts()
    assert response_texts(done, WORDS) == ["hello w1\n\nw2", "b", "hello w1\n\nw2 w3", "c"]
    tool = {"role": "tool", "content": "w5 w6"}
    start = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "hello w1"}, tool]
    whole = [*start, {"role": "assistant", "content": "w2"}, tool]
    assert conversation(done[0], ["hello w1", "w2"]) == whole
    last = completion_of(done[0], ["hello w1", "w2"])  # what a reward model with its own tokenizer scores
    assert (last.messages, last.text, last.finished) == (start, "w2", True)
    columns = [prompt.fields for prompt in with_conversations(done, WORDS)]
    assert columns[0] == {"level": 0, "conversation": whole}
    assert columns[1]["conversation"] == [start[0], {"role": "assistant", "content": "b"}]
    assert with_conversations(done[1:2], WORDS)[0].fields == {"level": 0}  # a batch of single turns has no such column
    bare = dataclasses.replace(done[0], turns=(done[0].turns[0], Turn([5]), done[0].turns[2]))
    with pytest.raises(ValueError, match=r"rows:0: turn 1 "):
        conversation(bare, ["a", "b"])


def test_rows_of_responses_keep_their_turns(tmp_path):
    done = rollouts()
    rewards = [1.0, 0.0, 2.0, -1.0]
    made = make_responses(done, response_texts(done, WORDS), rewards, {"f": rewards})
    pick(made, [r.prompt.index for r in done], "sft")
    write_responses(tmp_path / "rows.jsonl", made)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert ['"mask"' in line for line in lines] == [True, False, True, False]
    assert read_responses(tmp_path / "rows.jsonl") == made
    first, third = picked_samples(made)
    assert bytes(first.mask) == bytes([0, 0, 1, 1, 1, 0, 0, 0, 1, 1])  # up to its last target
    assert bytes(third.mask) == bytes([0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
    write_jsonl(tmp_path / "pairs.jsonl", label_pairs(made, 1).rows)
    pairs = read_sampled_pairs(str(tmp_path / "pairs.jsonl"))
    assert [pair.chosen[:2] for pair in pairs] == [first[:2], third[:2]]
    assert pack_pairs(pairs).last.tolist() == [9, 13, 23, 26]


def numbers() -> tuple[Batch, torch.Tensor]:
    """The batch with float64 logprobs and values out of a seed, and a score for each sample."""
    chance = torch.Generator().manual_seed(5)
    batch = from_rollouts(rollouts())
    draw = lambda: batch.scatter(torch.randn(len(batch.response), generator=chance, dtype=torch.float64))  # noqa: E731
    batch = batch.with_(logprobs=draw(), ref_logprobs=draw(), values=draw(), rollout_logprobs=draw())
    return batch, torch.tensor([1.5, -0.5, 0.25, 2.0], dtype=torch.float64)


def targets_of(batch: Batch, sample: int) -> list[int]:
    """Places of a sample's targets."""
    begin = sum(batch.lengths[:sample])
    return [place for place in range(begin, begin + batch.lengths[sample]) if batch.mask[place]]


def plain_gae(batch: Batch, rewards: list[float], gamma: float, lam: float, gaps: str) -> list[float]:
    """GAE of each token by its definition, sample by sample, from the last token to the first; 0 outside the mask."""
    assert batch.values is not None
    values, advantages, begin = batch.values.tolist(), [0.0] * len(rewards), 0
    for sample, length in enumerate(batch.lengths):
        places = targets_of(batch, sample) if gaps == "carry" else list(range(begin, begin + length))
        value, advantage = 0.0, 0.0
        for place in reversed(places):
            advantage = rewards[place] + gamma * value - values[place] + gamma * lam * advantage
            advantages[place], value = advantage, values[place]
        begin += length
    return [a if m else 0.0 for a, m in zip(advantages, batch.mask.tolist(), strict=True)]


def plain_rewards(batch: Batch, scores: torch.Tensor, kl_coef: float) -> list[float]:
    """-kl_coef k1 at each target and the score at a sample's last one."""
    assert batch.logprobs is not None and batch.ref_logprobs is not None
    rewards = (-kl_coef * (batch.logprobs - batch.ref_logprobs)).tolist()
    for sample, score in enumerate(scores.tolist()):
        rewards[targets_of(batch, sample)[-1]] += score
    return rewards


@pytest.mark.parametrize("gaps", ["carry", "zero"])
def test_gae_across_turns(gaps):
    batch, scores = numbers()
    assert batch.values is not None
    rewards = plain_rewards(batch, scores, 0.1)
    segments = Segments.of_lengths(torch.tensor(batch.lengths), batch.mask)
    told, values = torch.tensor(rewards, dtype=torch.float64), batch.values
    advantages, returns = gae(told, values, segments, batch.cu_seqlens, 0.95, 0.9, gaps)
    expected = torch.tensor(plain_gae(batch, rewards, 0.95, 0.9, gaps), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, torch.where(batch.mask, expected + values, 0), rtol=1e-6, atol=1e-6)


def test_ppo_equals_plain_loops_over_the_samples():
    batch, scores = numbers()
    config = PPOConfig(ppo=PPOOptions(kl_estimator="k1", gamma=0.95))
    made, metrics = with_rewards(batch, scores, config, kl_coef=0.1)
    rewards = plain_rewards(batch, scores, 0.1)
    assert made.rewards is not None and made.rewards.tolist() == pytest.approx(rewards)
    assert batch.logprobs is not None and batch.ref_logprobs is not None and batch.values is not None
    kl = [sum((batch.logprobs - batch.ref_logprobs)[targets_of(batch, i)].tolist()) for i in range(4)]
    assert metrics["kl"] == pytest.approx(sum(kl) / 4)
    made, _ = with_gae(made, config)
    plain = torch.tensor(plain_gae(batch, rewards, 0.95, config.ppo.lam, config.ppo.turn_gaps), dtype=torch.float64)
    own = plain[batch.mask]
    white = (own - own.mean()) / own.var(correction=0).sqrt()
    assert made.advantages is not None and made.returns is not None
    torch.testing.assert_close(made.advantages[batch.mask], white, rtol=1e-5, atol=1e-6)
    assert not made.advantages[~batch.mask].any()
    values, options = batch.values[batch.response], config.critic
    losses, _ = value_loss(values, values, made.returns[batch.response], options.value_clip, options.loss_coef)
    weights = token_weights(
        Segments.of_lengths(torch.tensor(batch.lengths), batch.mask), "sample-mean", dtype=torch.float64
    )
    plain_losses = [(0.5 * plain[targets_of(batch, i)] ** 2).mean().item() for i in range(4)]
    factor = options.loss_coef / 0.5
    assert (losses * weights[batch.mask]).sum().item() == pytest.approx(factor * sum(plain_losses) / 4, rel=1e-5)


def test_grpo_equals_plain_loops_over_the_samples():
    """Every target of a sample has the advantage of its score in its group of two, less nothing: no KL is taken off."""
    batch, scores = numbers()
    batch = batch.with_(ref_logprobs=None)
    config = GRPOConfig(grpo=GRPOOptions())
    made, _ = with_group_advantages(batch.with_(scores=scores, group=torch.tensor([0, 0, 1, 1])), config)
    assert made.advantages is not None
    for sample, (own, other) in enumerate([(1.5, -0.5), (-0.5, 1.5), (0.25, 2.0), (2.0, 0.25)]):
        deviation = abs(own - other) / 2**0.5
        expected = (own - other) / 2 / (deviation + config.grpo.scale_eps)
        places = targets_of(batch, sample)
        assert made.advantages[places].tolist() == pytest.approx([expected] * len(places), rel=1e-6)
    assert not made.advantages[~batch.mask].any()
