"""Golden vectors of rewards, KL, whitening, GAE and group advantages, computed by trialign's functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from golden import Case, Outputs, Rows, adapter, grpo_options, kl_limits, ppo_config, tensor
from trialign.algorithms import ppo
from trialign.algorithms.advantages import (
    discounted_returns,
    group_advantages,
    soft_overlong_penalty,
    token_rewards,
    whiten,
)
from trialign.algorithms.batch import Batch
from trialign.algorithms.config.conditional import CONDITION
from trialign.algorithms.config.grpo import GRPOOptions
from trialign.algorithms.data.conditional import conditioned, normalized
from trialign.algorithms.data.responses import Scored, best_against_worst, best_of_n
from trialign.algorithms.grpo import estimate_advantages
from trialign.algorithms.losses.kl import KLController, kl_estimate
from trialign.algorithms.rewards.shaping import RewardShaper

SPELLINGS: dict[str, Any] = {"kl": "k1", "low_var_kl": "k3", "mse": "k2"}


@adapter("verl", "kl_penalty")
@adapter("OpenRLHF", "compute_approx_kl")
@adapter("slime", "compute_approx_kl")
@adapter("NeMo-RL", "calculate_kl")
def kl(case: Case) -> Outputs:
    args, names = case["args"], list(case["inputs"])
    logp, ref = tensor(case, names[0]).requires_grad_(), tensor(case, names[1])
    kind: Any = next(args[key] for key in ("kl_penalty", "kl_estimator", "kl_loss_type", "kl_type") if key in args)
    estimator = SPELLINGS.get(kind, kind)
    limits = kl_limits(case, "k3" if estimator == "k3+" else estimator)
    if args.get("input_clamp_value", 0) is None or (case["framework"], kind) == ("slime", "k3"):
        limits = 0.0, 0.0  # slime limits its k3 under the name low_var_kl alone
    ratio = None
    if args.get("unbiased") or "importance_sampling_weights" in args:
        old = tensor(case, "old_log_probs") if "old_log_probs" in case["inputs"] else logp.detach()
        ratio = (logp - old).exp()
    estimate = kl_estimate(logp, ref, estimator, *limits, ratio=ratio)
    (gradient,) = torch.autograd.grad(estimate.sum(), logp)
    return {"kl": estimate, f"grad_{names[0]}": gradient}


@adapter("verl", "AdaptiveKLController")
@adapter("OpenRLHF", "AdaptiveKLController")
def kl_controller(case: Case) -> Outputs:
    args = case["args"]
    controller = KLController(args["init_kl_coef"], args["target"], args["horizon"])
    coefficients = []
    for kl in case["inputs"]["kl"]:
        controller.update(kl, args["n_steps"])
        coefficients.append(controller.coef)
    return {"value": torch.tensor(coefficients)}


def whitened(case: Case, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """x [total] whitened as PPO does under the case's overlay."""
    how: Any = ppo_config(case).ppo.whiten
    return whiten(x, rows.segments, how)


@adapter("TRL", "masked_whiten")
@adapter("verl", "masked_whiten")
@adapter("NeMo-RL", "GeneralizedAdvantageEstimator._reward_whiten")
@adapter("slime", "distributed_masked_whiten")
def whitening(case: Case) -> Outputs:
    rows = Rows(tensor(case, "mask"))
    values = rows.pack(tensor(case, "values"))
    white = whitened(case, values, rows)
    if not case["args"].get("shift_mean", True):
        count = rows.mask.sum() + (1e-8 if case["framework"] == "verl" else 0.0)
        white = white + rows.mask * (values[rows.mask].double().sum() / count).to(values)
    return {"out": rows.unpack(white)}


@adapter("OpenRLHF", "masked_normalize")
def whitening_by_row(case: Case) -> Outputs:
    outputs = []
    for values, mask in zip(tensor(case, "tensor"), tensor(case, "mask"), strict=True):
        rows = Rows(mask[None])
        outputs.append(rows.unpack(whitened(case, rows.pack(values[None]), rows)))
    return {"out": torch.cat(outputs)}


@adapter("verl", "apply_kl_penalty")
def penalized_scores(case: Case) -> Outputs:
    rows, args = Rows(tensor(case, "response_mask")), case["args"]
    kind: Any = SPELLINGS.get(args["kl_penalty"], args["kl_penalty"])
    kl = kl_estimate(tensor(case, "old_log_probs"), tensor(case, "ref_log_prob"), kind, *kl_limits(case, kind))
    penalty = token_rewards(torch.zeros(rows.shape[0]), rows.pack(kl), rows.segments, args["kl_coef"])
    return {"token_level_rewards": tensor(case, "token_level_scores") + rows.unpack(penalty)}


@adapter("NeMo-RL", "GeneralizedAdvantageEstimator._build_token_level_rewards")
@adapter("OpenRLHF", "compute_reward")
def scores_and_kl(case: Case) -> Outputs:
    args = case["args"]
    if case["framework"] == "OpenRLHF":
        rows, kl, scores = Rows(tensor(case, "action_mask")), tensor(case, "kl"), tensor(case, "r")
        assert ppo_config(case).reward.clip_at == "token"
        clip = args["reward_clip_range"][1] if args["reward_clip_range"] else 0.0
    else:
        rows, scores, clip = Rows(tensor(case, "mask")), tensor(case, "rewards"), ppo_config(case).reward.token_clip
        logp, ref = tensor(case, "logprobs"), tensor(case, "reference_logprobs")
        kl = kl_estimate(logp, ref, args["kl_type"], *kl_limits(case, args["kl_type"]))
    return {"reward": rows.unpack(token_rewards(scores, rows.pack(kl), rows.segments, args["kl_coef"], clip=clip))}


@adapter("verl", "compute_gae_advantage_return")
@adapter("NeMo-RL", "GeneralizedAdvantageEstimator._compute_gae")
@adapter("OpenRLHF", "RemoteExperienceMaker.get_advantages_and_returns")
@adapter("slime", "get_advantages_and_returns_batch")
def estimated(case: Case) -> Outputs:
    args, names = case["args"], list(case["inputs"])
    masks = [tensor(case, name) for name in names if name.endswith("mask")] or [prefix_mask(case, "rewards")]
    rows = Rows(masks[0])
    rewards = rows.pack(tensor(case, next(name for name in names if name.endswith("rewards"))))
    lam = next(args[key] for key in ("lam", "gae_lambda", "lambd") if key in args)
    config = ppo_config(case, lam=lam, gamma=args.get("gamma", args.get("gae_gamma")))
    values = rows.read(case, "values")
    advantages, returns = ppo.estimate_advantages(rows.batch(rewards=rewards), values, config)
    if case["framework"] == "verl":  # whitened in the same function
        advantages = whitened(case, advantages, rows)
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}


def experience(rows: Rows, batch: Batch) -> Outputs:
    assert batch.advantages is not None and batch.returns is not None
    return {"advantages": rows.unpack(batch.advantages), "returns": rows.unpack(batch.returns)}


@adapter("OpenRLHF", "RemoteExperienceMaker.get_cumulative_returns")
def cumulative(case: Case) -> Outputs:
    rows = Rows(tensor(case, "action_mask"))
    rewards = rows.pack(tensor(case, "rewards"))
    how: Any = case["args"]["gamma"], grpo_options(case).turn_gaps
    returns = discounted_returns(rewards, rows.segments, rows.cu_seqlens, *how)
    return {"returns": rows.unpack(returns)}


def prefix_mask(case: Case, like: str) -> torch.Tensor:
    """[rows, tokens]: the first `response_lengths` places of each row."""
    width = tensor(case, like).shape[1]
    return (torch.arange(width)[None] < tensor(case, "response_lengths")[:, None]).double()


def against_group(rewards: torch.Tensor, group: torch.Tensor, options: GRPOOptions) -> torch.Tensor:
    how: Any = options.baseline, options.scale_rewards, options.scale_eps, options.single_response
    return group_advantages(rewards, group, *how)


@adapter("TRL", "GRPOTrainer._generate_and_score_completions")
def trl_groups(case: Case) -> Outputs:
    args, rewards = case["args"], tensor(case, "rewards")
    scale: Any = {"group": "unbiased", "batch": "batch", "none": "none"}[str(args["scale_rewards"])]
    group = torch.arange(len(rewards)) // args["num_generations"]
    return {"advantages": against_group(rewards, group, grpo_options(case, scale_rewards=scale))}


@adapter("slime", "RolloutManager._post_process_rewards")
def slime_groups(case: Case) -> Outputs:
    args, rewards = case["args"], tensor(case, "rewards")
    group = torch.arange(len(rewards)) // args["n_samples_per_prompt"]
    plain = args["estimator"] == "grpo" and not args["grpo_std_normalization"]
    algorithm = {"reinforce_plus_plus": "reinforce++", "reinforce_plus_plus_baseline": "reinforce++_baseline"}.get(
        args["estimator"], "dr_grpo" if plain else "grpo"
    )
    return {"advantages": against_group(rewards, group, grpo_options(case, algorithm))}


@adapter("verl", "compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage")
@adapter("verl", "compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage")
def verl_groups(case: Case) -> Outputs:
    args, mask = case["args"], tensor(case, "response_mask")
    scores = tensor(case, "token_level_rewards").sum(1)
    plain = not args.get("norm_adv_by_std_in_grpo", True)
    algorithm = "rloo" if "rloo" in args["estimator"] else "dr_grpo" if plain else "grpo"
    advantages = against_group(scores, tensor(case, "index"), grpo_options(case, algorithm))
    return {"advantages": advantages[:, None] * mask, "returns": advantages[:, None] * mask}


@adapter("NeMo-RL", "GRPOAdvantageEstimator.compute_advantage")
def nemo_groups(case: Case) -> Outputs:
    args, rewards, prompts = case["args"], tensor(case, "rewards"), tensor(case, "prompt_ids")
    others = args["use_leave_one_out_baseline"]
    options = grpo_options(case) if others else grpo_options(case, baseline="mean", scale_rewards="unbiased")
    if not args["normalize_rewards"]:
        options = replace(options, scale_rewards="none")
    group = prompts.unique(dim=0, return_inverse=True)[1]
    return {"advantages": against_group(rewards, group, options)}


@adapter("verl", "compute_reinforce_plus_plus_outcome_advantage")
def verl_returns(case: Case) -> Outputs:
    rows = Rows(tensor(case, "response_mask"))
    rewards = rows.pack(tensor(case, "token_level_rewards"))
    made = grpo_options(case, "reinforce++")
    returns = discounted_returns(rewards, rows.segments, rows.cu_seqlens, case["args"]["gamma"], made.turn_gaps)
    white = whiten(returns, rows.segments, made.whiten)  # pyright: ignore[reportArgumentType]
    return {"advantages": rows.unpack(white), "returns": rows.unpack(returns)}


@adapter("verl", "compute_reinforce_plus_plus_baseline_outcome_advantage")
def verl_baseline(case: Case) -> Outputs:
    rows = Rows(tensor(case, "response_mask"))
    scores, made = tensor(case, "token_level_rewards").sum(1), grpo_options(case, "reinforce++_baseline")
    no_kl = torch.zeros_like(rows.mask, dtype=scores.dtype)
    advantages = estimate_advantages(scores, tensor(case, "index"), no_kl, rows.segments, rows.cu_seqlens, made)[1]
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(advantages)}


# Its KL is in the token rewards under every estimator.
OPENRLHF_ESTIMATORS: dict[str, dict[str, Any]] = {
    "rloo": {"algorithm": "rloo"},
    "reinforce": {"algorithm": "reinforce++"},
    "reinforce_baseline": {"algorithm": "reinforce++_baseline"},
    "group_norm": {"algorithm": "grpo", "kl_in": "reward"},
    "dr_grpo": {"algorithm": "dr_grpo", "kl_in": "reward"},
}


@adapter("OpenRLHF", "RemoteExperienceMaker.compute_advantages_and_returns")
def openrlhf_experience(case: Case) -> Outputs:
    args, rows, scores = case["args"], Rows(tensor(case, "action_mask")), tensor(case, "rewards")
    kl, segments = rows.pack(tensor(case, "kl")), rows.segments
    clip = ppo_config(case).reward.token_clip
    assert tuple(args["reward_clip_range"]) == (-clip, clip)
    if args["estimator"] == "gae":
        config = ppo_config(case, gamma=args["gamma"], lam=args["lambd"])
        values = rows.read(case, "values")
        batch = rows.batch(logprobs=kl, ref_logprobs=torch.zeros_like(kl), values=values)
        batch, _ = ppo.with_rewards(batch, scores, config, args["kl_coef"])
        outputs = experience(rows, ppo.with_gae(batch, config)[0])
        if args["no_std_norm"]:
            outputs["advantages"] = rows.unpack(centered(ppo.estimate_advantages(batch, values, config)[0], rows))
        return outputs
    group = torch.arange(len(scores)) // args["n_samples_per_prompt"]
    changes = OPENRLHF_ESTIMATORS[args["estimator"]] | {"kl_coef": args["kl_coef"], "gamma": args["gamma"]}
    made = grpo_options(case, **changes)
    given = scores, group, kl, segments, rows.cu_seqlens
    returns = estimate_advantages(*given, replace(made, whiten="off"), clip)[1]
    advantages = estimate_advantages(*given, made, clip)[1]
    if args["no_std_norm"] and made.whiten != "off":
        advantages = centered(returns, rows)
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}


def centered(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """x [total] less its mean over the counted tokens: whitening without its deviation, which `whiten` always has."""
    deviation = x[rows.mask].double().var(correction=0).clamp(min=1e-8).sqrt()
    return (whiten(x, rows.segments).double() * deviation).to(x)


@adapter("slime", "compute_advantages_and_returns")
def slime_experience(case: Case) -> Outputs:
    args, scores = case["args"], tensor(case, "rewards")
    here = prefix_mask(case, "log_probs")
    rows, counted = Rows(here), Rows(here * tensor(case, "mask"))
    kl = rows.pack(kl_estimate(tensor(case, "log_probs"), tensor(case, "ref_log_probs"), args["kl_loss_type"]))
    whole = args["normalize_advantages"]
    if args["estimator"] == "ppo":
        config = ppo_config(case, gamma=args["gamma"], lam=args["lambd"])
        rewards = token_rewards(scores, kl, rows.segments, args["kl_coef"], clip=config.reward.token_clip)
        values = rows.read(case, "values")
        advantages, returns = ppo.estimate_advantages(rows.batch(rewards=rewards), values, config)
        if whole:
            advantages = whitened(case, advantages, counted)
        return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}
    algorithm, changes = {
        "reinforce_plus_plus": ("reinforce++", {}),
        "reinforce_plus_plus_baseline": ("reinforce++_baseline", {}),
    }.get(args["estimator"], ("grpo", {"kl_in": "off"}))
    changes |= {"baseline": "none", "scale_rewards": "none", "kl_coef": args["kl_coef"], "gamma": args["gamma"]}
    # The baseline is taken off before, in RolloutManager._post_process_rewards.
    made = grpo_options(case, algorithm, **changes)
    group = torch.arange(len(scores))
    given = scores, group, kl, counted.segments, rows.cu_seqlens
    returns = estimate_advantages(*given, replace(made, whiten="off"))[1]
    advantages = estimate_advantages(*given, replace(made, whiten="unbiased" if whole else "off"))[1]
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}


@adapter("NeMo-RL", "ReinforcePlusPlusAdvantageEstimator.compute_advantage")
def nemo_reinforce(case: Case) -> Outputs:
    args, rows, scores = case["args"], Rows(tensor(case, "mask")), tensor(case, "rewards")
    algorithm = "reinforce++_baseline" if args["minus_baseline"] else "reinforce++"
    made = grpo_options(case, algorithm, kl_coef=args["kl_coef"])
    made = made if args["use_kl_in_reward"] else replace(made, kl_in="off")
    logp, ref = tensor(case, "logprobs_policy"), tensor(case, "logprobs_reference")
    kl = rows.pack(kl_estimate(logp, ref, args["kl_type"], *kl_limits(case, args["kl_type"])))
    group = tensor(case, "prompt_ids").unique(return_inverse=True)[1]
    return {"advantages": rows.unpack(estimate_advantages(scores, group, kl, rows.segments, rows.cu_seqlens, made)[1])}


@adapter("NeMo-RL", "RawRewardAdvantageEstimator.compute_advantage")
def nemo_raw(case: Case) -> Outputs:
    rows = Rows(tensor(case, "mask"))
    rewards = rows.pack(tensor(case, "rewards"))
    how: Any = grpo_options(case, "reinforce++").whiten
    return {"advantages": rows.unpack(whiten(rewards, rows.segments, how))}


@adapter("NeMo-RL", "GeneralizedAdvantageEstimator.compute_advantage")
def nemo_experience(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "mask"))
    logp, ref = tensor(case, "logprobs"), tensor(case, "reference_logprobs")
    coef = args["reference_policy_kl_penalty"] if args["use_kl_in_reward"] else 0.0
    packed = {"logprobs": logp, "ref_logprobs": ref, "values": tensor(case, "values")}
    batch = rows.batch(**{name: rows.pack(x) for name, x in packed.items()})

    def at(lam: float) -> Batch:
        config = ppo_config(
            case, gamma=args["gae_gamma"], lam=lam, kl_estimator=args["reference_policy_kl_type"], whiten="off"
        )
        rewarded, _ = ppo.with_rewards(batch, tensor(case, "rewards"), config, coef)
        made = ppo.with_gae(rewarded, config)[0]
        assert made.advantages is not None
        return made.with_(advantages=whitened(case, made.advantages, rows))

    outputs = experience(rows, at(args["gae_lambda_policy"] or args["gae_lambda"]))
    if args["gae_lambda_value"]:  # a lambda of its own
        outputs["returns"] = experience(rows, at(args["gae_lambda_value"]))["returns"]
    return outputs


@adapter("TRL", "PPOTrainer.train (steps 3-6)")
def trl_experience(case: Case) -> Outputs:
    args, ends = case["args"], tensor(case, "sequence_lengths")
    logp, ref, values = (tensor(case, name) for name in ("logprobs", "ref_logprobs", "values"))
    place = torch.arange(logp.shape[1])[None]
    answer, longer = Rows(place <= ends[:, None]), Rows(place <= ends[:, None] + 1)
    kl = torch.where(place <= ends[:, None], kl_estimate(logp, ref, args["kl_estimator"]), 0)
    # The score comes one token after the answer, where there is room for it.
    rewards = token_rewards(tensor(case, "scores"), longer.pack(kl), longer.segments, args["kl_coef"])
    config = ppo_config(case, gamma=args["gamma"], lam=args["lam"])
    if args["whiten_rewards"]:  # their mean stays
        rewards = whitened(case, rewards, longer) + longer.mask * rewards[longer.mask].mean()
    advantages, returns = ppo.estimate_advantages(longer.batch(rewards=rewards), longer.pack(values), config)
    return {
        "rewards": longer.unpack(rewards),
        "advantages": answer.unpack(whitened(case, advantages, answer)),
        "returns": longer.unpack(returns),
    }


@adapter("TRL", "RLOOTrainer._generate_and_score_completions")
def trl_rloo(case: Case) -> Outputs:
    args = case["args"]
    made = grpo_options(case, "rloo", kl_coef=args["beta"])
    shaper = RewardShaper(args["reward_clip_range"][1])
    rewards = tensor(case, "rewards")
    rewards = rewards.new_tensor(shaper(rewards.tolist(), [True] * len(rewards)))
    rows = Rows(tensor(case, "completion_mask") if args["beta"] else torch.ones(len(rewards), 1))
    kl = torch.zeros_like(rows.mask, dtype=rewards.dtype)
    if args["beta"]:
        logp, ref = tensor(case, "old_per_token_logps"), tensor(case, "ref_per_token_logps")
        kl = rows.pack(kl_estimate(logp, ref, made.kl_estimator))
    group = torch.arange(len(rewards)) // args["num_generations"]
    each = estimate_advantages(rewards, group, kl, rows.segments, rows.cu_seqlens, made)[1]
    advantages = rows.segments.means(each)
    if args["normalize_advantages"]:
        advantages = group_advantages(advantages, torch.zeros_like(group), "mean", "unbiased", 1e-4)  # of the batch
    return {"advantages": advantages}


@adapter("OpenRLHF-0.9.6", "get_processor")
def selection(case: Case) -> Outputs:
    """Text, not numbers: compared here, so that the numbers' test has the rewards left to compare."""
    args, expected = case["args"], case["outputs"]["objs"]
    answers = [Scored(row["input"], row["output"], row["reward"]) for row in case["inputs"]["objs"]]
    if args["name"] == "rs":
        made = [{"input": a.prompt, "output": a.response, "reward": a.reward} for a in best_of_n(answers)]
    elif args["name"] == "iter_dpo":
        names = "prompt", "chosen", "chosen_reward", "rejected", "rejected_reward"
        made = [
            dict(zip(names, (best.prompt, best.response, best.reward, worst.response, worst.reward), strict=True))
            for best, worst in best_against_worst(answers)
        ]
    else:
        rewards, template = [answer.reward for answer in answers], args.get("reward_template", CONDITION)
        rewards = normalized(rewards) if args["normalize_reward"] else rewards
        made = [
            {"input": conditioned(template, a.prompt, f"{reward:.2f}"), "output": a.response, "reward": reward}
            for a, reward in zip(answers, rewards, strict=True)
        ]
    names = [name for name in expected[0] if "reward" not in name]
    assert [[row[n] for n in names] for row in made] == [[row[n] for n in names] for row in expected]
    numbers = [[value for name, value in row.items() if "reward" in name] for row in made]
    case["outputs"] = {"rewards": [[value for name, value in row.items() if "reward" in name] for row in expected]}
    return {"rewards": torch.tensor(numbers)}


@adapter("TRL", "get_soft_overlong_punishment")
def trl_overlong(case: Case) -> Outputs:
    args, lengths = case["args"], tensor(case, "response_length")
    penalty = soft_overlong_penalty(lengths, args["max_completion_len"], args["soft_punish_cache"])
    return {"penalty": penalty.clamp(min=-1)}  # longer responses than the limit are truncated here


@adapter("verl", "DAPORewardManager.__call__")
@adapter("NeMo-RL", "apply_reward_shaping")
@adapter("OpenRLHF", "apply_overlong_penalty")
def overlong(case: Case) -> Outputs:
    limit, buffer, factor = case["args"].values()
    penalty = soft_overlong_penalty(tensor(case, "response_length"), limit, buffer, factor)
    penalty = penalty.clamp(min=-factor) if case["framework"] == "OpenRLHF" else penalty
    return {"rewards": tensor(case, "rewards") + penalty}
