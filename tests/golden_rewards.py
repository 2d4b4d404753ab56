"""How the golden vectors of rewards, KL, whitening, GAE and group advantages are put to ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from golden import Case, Outputs, Rows, adapter, tensor
from trialign.algorithms.advantages import (
    GroupRule,
    WhitenRule,
    discounted_returns,
    gae,
    group_advantages,
    kl_estimate,
    soft_overlong_penalty,
    token_rewards,
    whiten,
)
from trialign.algorithms.convention import PRESETS
from trialign.algorithms.kl import KLController
from trialign.algorithms.selection import CONDITION, Scored, best_against_worst, best_of_n, conditioned

SPELLINGS: dict[str, Any] = {"kl": "k1", "low_var_kl": "k3", "mse": "k2"}


@adapter("verl", "kl_penalty")
@adapter("OpenRLHF", "compute_approx_kl")
@adapter("slime", "compute_approx_kl")
@adapter("NeMo-RL", "calculate_kl")
def kl(case: Case) -> Outputs:
    args, names = case["args"], list(case["inputs"])
    logp, ref = tensor(case, names[0]).requires_grad_(), tensor(case, names[1])
    kind: Any = next(args[key] for key in ("kl_penalty", "kl_estimator", "kl_loss_type", "kl_type") if key in args)
    rule = PRESETS[case["framework"].lower().removesuffix("-rl")].kl
    if args.get("input_clamp_value", 0) is None:
        rule = replace(rule, clamped=())
    if case["framework"] == "slime":  # its k3 under its own name has no limit
        rule = replace(rule, weighted=args.get("unbiased", False), clamped=() if kind == "k3" else rule.clamped)
    old = tensor(case, "old_log_probs") if "old_log_probs" in case["inputs"] else None
    estimate = kl_estimate(logp, ref, SPELLINGS.get(kind, kind), rule, old)
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
    return {"value": torch.tensor(coefficients, dtype=torch.float64)}


@adapter("TRL", "masked_whiten")
@adapter("verl", "masked_whiten")
@adapter("NeMo-RL", "GeneralizedAdvantageEstimator._reward_whiten")
@adapter("slime", "distributed_masked_whiten")
def whitening(case: Case) -> Outputs:
    rows = Rows(tensor(case, "mask"))
    rule = PRESETS[case["framework"].lower().removesuffix("-rl")].whiten
    shift = case["args"].get("shift_mean", True)
    return {"out": rows.unpack(whiten(rows.pack(tensor(case, "values")), rows.segments, rule, shift_mean=shift))}


@adapter("OpenRLHF", "masked_normalize")
def whitening_by_row(case: Case) -> Outputs:
    outputs = []
    for values, mask in zip(tensor(case, "tensor"), tensor(case, "mask"), strict=True):
        rows = Rows(mask[None])
        outputs.append(whiten(values, rows.segments, PRESETS["openrlhf"].whiten))
    return {"out": torch.stack(outputs)}


@adapter("verl", "apply_kl_penalty")
def penalised_scores(case: Case) -> Outputs:
    rows, args = Rows(tensor(case, "response_mask")), case["args"]
    kind: Any = SPELLINGS.get(args["kl_penalty"], args["kl_penalty"])
    kl = kl_estimate(tensor(case, "old_log_probs"), tensor(case, "ref_log_prob"), kind, PRESETS["verl"].kl)
    penalty = token_rewards(torch.zeros(rows.shape[0]), rows.pack(kl), rows.segments, args["kl_coef"])
    return {"token_level_rewards": tensor(case, "token_level_scores") + rows.unpack(penalty)}


@adapter("NeMo-RL", "GeneralizedAdvantageEstimator._build_token_level_rewards")
@adapter("OpenRLHF", "compute_reward")
def scores_and_kl(case: Case) -> Outputs:
    args = case["args"]
    if case["framework"] == "OpenRLHF":
        rows, kl, scores = Rows(tensor(case, "action_mask")), tensor(case, "kl"), tensor(case, "r")
        clip = args["reward_clip_range"] and tuple(args["reward_clip_range"])
    else:
        rows, scores, clip = Rows(tensor(case, "mask")), tensor(case, "rewards"), None
        logp, ref = tensor(case, "logprobs"), tensor(case, "reference_logprobs")
        kl = kl_estimate(logp, ref, args["kl_type"], replace(PRESETS["nemo"].kl, weighted=False))
    return {"reward": rows.unpack(token_rewards(scores, rows.pack(kl), rows.segments, args["kl_coef"], clip=clip))}


@adapter("verl", "compute_gae_advantage_return")
@adapter("NeMo-RL", "GeneralizedAdvantageEstimator._compute_gae")
@adapter("OpenRLHF", "RemoteExperienceMaker.get_advantages_and_returns")
def estimated(case: Case) -> Outputs:
    args, names = case["args"], list(case["inputs"])
    convention = PRESETS[case["framework"].lower().removesuffix("-rl")]
    rows = Rows(tensor(case, next(name for name in names if name.endswith("mask"))))
    rewards = tensor(case, next(name for name in names if name.endswith("rewards")))
    lam = next(args[key] for key in ("lam", "gae_lambda", "lambd") if key in args)
    gamma = args.get("gamma", args.get("gae_gamma"))
    advantages, returns = gae(
        rows.pack(rewards),
        rows.pack(tensor(case, "values")),
        rows.segments,
        rows.cu_seqlens,
        gamma,
        lam,
        convention.gaps,
    )
    if case["framework"] == "verl":
        advantages = whiten(advantages, rows.segments, convention.whiten)
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}


@adapter("OpenRLHF", "RemoteExperienceMaker.get_cumulative_returns")
def cumulative(case: Case) -> Outputs:
    rows = Rows(tensor(case, "action_mask"))
    rewards = rows.pack(tensor(case, "rewards"))
    returns = discounted_returns(rewards, rows.segments, rows.cu_seqlens, case["args"]["gamma"], "zero")
    return {"returns": rows.unpack(returns)}


def prefix_mask(case: Case, like: str) -> torch.Tensor:
    """[rows, tokens]: the first `response_lengths` places of each row."""
    width = tensor(case, like).shape[1]
    return (torch.arange(width)[None] < tensor(case, "response_lengths")[:, None]).double()


@adapter("slime", "get_advantages_and_returns_batch")
def estimated_by_length(case: Case) -> Outputs:
    rows, args = Rows(prefix_mask(case, "rewards")), case["args"]
    rewards, values = rows.pack(tensor(case, "rewards")), rows.pack(tensor(case, "values"))
    advantages, returns = gae(rewards, values, rows.segments, rows.cu_seqlens, args["gamma"], args["lambd"])
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}


@adapter("TRL", "GRPOTrainer._generate_and_score_completions")
def trl_groups(case: Case) -> Outputs:
    args, rewards = case["args"], tensor(case, "rewards")
    scale: Any = {"group": "unbiased", "batch": "batch", "none": "none"}[str(args["scale_rewards"])]
    group = torch.arange(len(rewards)) // args["num_generations"]
    return {"advantages": group_advantages(rewards, group, GroupRule(scale=scale, eps=1e-4))}


@adapter("slime", "RolloutManager._post_process_rewards")
def slime_groups(case: Case) -> Outputs:
    args, rewards = case["args"], tensor(case, "rewards")
    scaled = args["grpo_std_normalization"] and args["estimator"] in ("grpo", "gspo", "cispo")
    group = torch.arange(len(rewards)) // args["n_samples_per_prompt"]
    baseline = "none" if args["estimator"] == "reinforce_plus_plus" else "mean"
    rule = GroupRule(baseline, "unbiased" if scaled else "none", eps=1e-6)
    return {"advantages": group_advantages(rewards, group, rule)}


@adapter("verl", "compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage")
@adapter("verl", "compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage")
def verl_groups(case: Case) -> Outputs:
    args, mask = case["args"], tensor(case, "response_mask")
    scores = tensor(case, "token_level_rewards").sum(1)
    if "rloo" in args["estimator"]:
        rule = GroupRule("others", "none", alone="reward")
    else:
        scaled = args.get("norm_adv_by_std_in_grpo", True)
        rule = GroupRule(scale="unbiased" if scaled else "none", eps=1e-6, alone="reward")
    return {"advantages": group_advantages(scores, tensor(case, "index"), rule)[:, None] * mask}


@adapter("NeMo-RL", "GRPOAdvantageEstimator.compute_advantage")
def nemo_groups(case: Case) -> Outputs:
    args, rewards, prompts = case["args"], tensor(case, "rewards"), tensor(case, "prompt_ids")
    others = args["use_leave_one_out_baseline"]
    scale: Any = ("others" if others else "unbiased") if args["normalize_rewards"] else "none"
    rule = GroupRule("others" if others else "mean", scale, eps=1e-6, unscaled_at_zero=True)
    group = (
        prompts.unique(return_inverse=True)[1] if prompts.dim() == 1 else prompts.unique(dim=0, return_inverse=True)[1]
    )
    return {"advantages": group_advantages(rewards, group, rule)}


@adapter("verl", "compute_reinforce_plus_plus_outcome_advantage")
def verl_returns(case: Case) -> Outputs:
    rows = Rows(tensor(case, "response_mask"))
    rewards = rows.pack(tensor(case, "token_level_rewards"))
    returns = discounted_returns(rewards, rows.segments, rows.cu_seqlens, case["args"]["gamma"], "carry")
    white = whiten(returns, rows.segments, PRESETS["verl"].whiten)
    return {"advantages": rows.unpack(white), "returns": rows.unpack(returns)}


@adapter("verl", "compute_reinforce_plus_plus_baseline_outcome_advantage")
def verl_baseline(case: Case) -> Outputs:
    rows = Rows(tensor(case, "response_mask"))
    rule = GroupRule("mean", "none", alone="reward")
    scores = group_advantages(tensor(case, "token_level_rewards").sum(1), tensor(case, "index"), rule)
    return {"advantages": rows.unpack(whiten(rows.pack(scores), rows.segments, PRESETS["verl"].whiten))}


OPENRLHF_BASELINES = {
    "rloo": GroupRule("others", "none"),
    "reinforce_baseline": GroupRule("mean", "none"),
    "group_norm": PRESETS["openrlhf"].group,
    "dr_grpo": GroupRule("mean", "none"),
}


@adapter("OpenRLHF", "RemoteExperienceMaker.compute_advantages_and_returns")
def openrlhf_experience(case: Case) -> Outputs:
    args, rows, scores = case["args"], Rows(tensor(case, "action_mask")), tensor(case, "rewards")
    estimator, segments = args["estimator"], rows.segments
    if estimator in OPENRLHF_BASELINES:
        group = torch.arange(len(scores)) // args["n_samples_per_prompt"]
        scores = group_advantages(scores, group, OPENRLHF_BASELINES[estimator])
    kl, clip = rows.pack(tensor(case, "kl")), tuple(args["reward_clip_range"])
    rewards = token_rewards(scores, kl, segments, args["kl_coef"], clip=clip)
    if estimator == "gae":
        values = rows.pack(tensor(case, "values"))
        advantages, returns = gae(rewards, values, segments, rows.cu_seqlens, args["gamma"], args["lambd"], "zero")
    else:
        advantages = returns = discounted_returns(rewards, segments, rows.cu_seqlens, args["gamma"], "zero")
    if estimator in ("gae", "reinforce", "reinforce_baseline"):
        rule = replace(PRESETS["openrlhf"].whiten, scale=not args["no_std_norm"])
        advantages = whiten(advantages, segments, rule)
    return {
        "advantages": rows.unpack(advantages),
        "returns": rows.unpack(returns),
    }


@adapter("slime", "compute_advantages_and_returns")
def slime_experience(case: Case) -> Outputs:
    args, scores = case["args"], tensor(case, "rewards")
    here = prefix_mask(case, "log_probs")
    rows, counted = Rows(here), Rows(here * tensor(case, "mask"))
    kl = rows.pack(kl_estimate(tensor(case, "log_probs"), tensor(case, "ref_log_probs"), args["kl_loss_type"]))
    estimator, coef = args["estimator"], args["kl_coef"]
    if estimator == "ppo":
        rewards = token_rewards(scores, kl, rows.segments, coef)
        values = rows.pack(tensor(case, "values"))
        advantages, returns = gae(rewards, values, rows.segments, rows.cu_seqlens, args["gamma"], args["lambd"])
    elif estimator == "reinforce_plus_plus":
        rewards = token_rewards(scores, kl, counted.segments, coef)
        advantages = returns = discounted_returns(rewards, rows.segments, rows.cu_seqlens, args["gamma"])
    else:
        penalty = coef * kl if estimator == "reinforce_plus_plus_baseline" else 0
        advantages = returns = rows.pack(scores) - penalty
    if args["normalize_advantages"]:
        advantages = whiten(advantages, counted.segments, PRESETS["slime"].whiten)
    return {"advantages": rows.unpack(advantages), "returns": rows.unpack(returns)}


@adapter("NeMo-RL", "ReinforcePlusPlusAdvantageEstimator.compute_advantage")
def nemo_reinforce(case: Case) -> Outputs:
    args, rows, scores = case["args"], Rows(tensor(case, "mask")), tensor(case, "rewards")
    if args["minus_baseline"]:
        group = tensor(case, "prompt_ids").unique(return_inverse=True)[1]
        scores = group_advantages(scores, group, GroupRule("mean", "none"))
    advantages = rows.pack(scores)
    if args["use_kl_in_reward"]:
        logp, ref = tensor(case, "logprobs_policy"), tensor(case, "logprobs_reference")
        rule = replace(PRESETS["nemo"].kl, weighted=False)
        advantages = advantages - args["kl_coef"] * rows.pack(kl_estimate(logp, ref, args["kl_type"], rule))
    return {"advantages": rows.unpack(whiten(advantages, rows.segments, WhitenRule(eps=1e-8)))}


@adapter("NeMo-RL", "RawRewardAdvantageEstimator.compute_advantage")
def nemo_raw(case: Case) -> Outputs:
    rows = Rows(tensor(case, "mask"))
    return {"advantages": rows.unpack(whiten(rows.pack(tensor(case, "rewards")), rows.segments, WhitenRule()))}


@adapter("NeMo-RL", "GeneralizedAdvantageEstimator.compute_advantage")
def nemo_experience(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "mask"))
    logp, ref = tensor(case, "logprobs"), tensor(case, "reference_logprobs")
    kl = kl_estimate(logp, ref, args["reference_policy_kl_type"], replace(PRESETS["nemo"].kl, weighted=False))
    coef = args["reference_policy_kl_penalty"] if args["use_kl_in_reward"] else 0.0
    rewards = token_rewards(tensor(case, "rewards"), rows.pack(kl), rows.segments, coef)
    values, gamma = rows.pack(tensor(case, "values")), args["gae_gamma"]
    lam = args["gae_lambda_policy"] or args["gae_lambda"]
    advantages, returns = gae(rewards, values, rows.segments, rows.cu_seqlens, gamma, lam)
    if args["gae_lambda_value"]:
        returns = gae(rewards, values, rows.segments, rows.cu_seqlens, gamma, args["gae_lambda_value"])[1]
    return {
        "advantages": rows.unpack(whiten(advantages, rows.segments, PRESETS["nemo"].whiten)),
        "returns": rows.unpack(returns),
    }


@adapter("TRL", "PPOTrainer.train (steps 3-6)")
def trl_experience(case: Case) -> Outputs:
    args, ends = case["args"], tensor(case, "sequence_lengths")
    logp, ref, values = (tensor(case, name) for name in ("logprobs", "ref_logprobs", "values"))
    place = torch.arange(logp.shape[1])[None]
    answer, longer = Rows(place <= ends[:, None]), Rows(place <= ends[:, None] + 1)
    kl = torch.where(place <= ends[:, None], kl_estimate(logp, ref, args["kl_estimator"]), 0)
    # The score comes one token after the answer, where there is room for it.
    rewards = token_rewards(tensor(case, "scores"), longer.pack(kl), longer.segments, args["kl_coef"])
    rule = PRESETS["trl"].whiten
    if args["whiten_rewards"]:
        rewards = whiten(rewards, longer.segments, rule, shift_mean=False)
    advantages, returns = gae(
        rewards, longer.pack(values), longer.segments, longer.cu_seqlens, args["gamma"], args["lam"]
    )
    return {
        "rewards": longer.unpack(rewards),
        "advantages": answer.unpack(whiten(advantages, answer.segments, rule)),
        "returns": longer.unpack(returns),
    }


@adapter("TRL", "RLOOTrainer._generate_and_score_completions")
def trl_rloo(case: Case) -> Outputs:
    args = case["args"]
    rewards = tensor(case, "rewards").clamp(*args["reward_clip_range"])
    if args["beta"]:
        rows = Rows(tensor(case, "completion_mask"))
        kl = kl_estimate(tensor(case, "old_per_token_logps"), tensor(case, "ref_per_token_logps"), "k1")
        rewards = rewards - args["beta"] * rows.segments.sums(rows.pack(kl))
    group = torch.arange(len(rewards)) // args["num_generations"]
    advantages = group_advantages(rewards, group, GroupRule("others", "none"))
    if args["normalize_advantages"]:
        advantages = group_advantages(advantages, torch.zeros_like(group), GroupRule("mean", "unbiased", eps=1e-4))
    return {"advantages": advantages}


@adapter("OpenRLHF-0.9.6", "get_processor")
def selection(case: Case) -> Outputs:
    """Text, not numbers: compared here, so that the numbers' test has the rewards left to compare."""
    args, told = case["args"], case["outputs"]["objs"]
    answers = [Scored(row["input"], row["output"], row["reward"]) for row in case["inputs"]["objs"]]
    if args["name"] == "rs":
        made = [{"input": a.prompt, "output": a.answer, "reward": a.reward} for a in best_of_n(answers)]
    elif args["name"] == "iter_dpo":
        made = [
            {
                "prompt": pair.chosen.prompt,
                "chosen": pair.chosen.answer,
                "chosen_reward": pair.chosen.reward,
                "rejected": pair.rejected.answer,
                "rejected_reward": pair.rejected.reward,
            }
            for pair in best_against_worst(answers)
        ]
    else:
        given = conditioned(answers, args["normalize_reward"], args.get("reward_template", CONDITION))
        made = [{"input": a.prompt, "output": a.answer, "reward": a.reward} for a in given]
    names = [name for name in told[0] if "reward" not in name]
    assert [[row[n] for n in names] for row in made] == [[row[n] for n in names] for row in told]
    numbers = [[value for name, value in row.items() if "reward" in name] for row in made]
    case["outputs"] = {"rewards": [[value for name, value in row.items() if "reward" in name] for row in told]}
    return {"rewards": torch.tensor(numbers, dtype=torch.float64)}


@adapter("TRL", "get_soft_overlong_punishment")
def trl_overlong(case: Case) -> Outputs:
    args, lengths = case["args"], tensor(case, "response_length")
    return {"penalty": soft_overlong_penalty(lengths, args["max_completion_len"], args["soft_punish_cache"], floor=-1)}


@adapter("verl", "DAPORewardManager.__call__")
@adapter("NeMo-RL", "apply_reward_shaping")
@adapter("OpenRLHF", "apply_overlong_penalty")
def overlong(case: Case) -> Outputs:
    args = list(case["args"].values())
    limit, buffer, factor = args
    floor = -factor if case["framework"] == "OpenRLHF" else 0.0
    penalty = soft_overlong_penalty(tensor(case, "response_length"), limit, buffer, factor, floor)
    return {"rewards": tensor(case, "rewards") + penalty}
