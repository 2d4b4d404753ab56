"""How the golden vectors of losses are put to ours."""

from __future__ import annotations

from typing import Any

import torch
from golden import Case, Outputs, Rows, adapter, loss_and_gradient, tensor
from trialign.algorithms.advantages import KLRule, kl_estimate
from trialign.algorithms.convention import PRESETS
from trialign.algorithms.policy_loss import cispo_loss, importance_weights, log_ratio, ppo_loss, sequence_log_ratio
from trialign.algorithms.preference import kto_loss, kto_reference, pair_loss, reward_loss
from trialign.algorithms.segments import token_weights
from trialign.kernels.logprob import logprob
from trialign.kernels.ppo_loss import value_loss

VERL_MODES = {
    "token-mean": "token-mean",
    "token-sum": "token-sum",
    "seq-mean-token-sum": "sample-sum",
    "seq-mean-token-mean": "sample-mean",
    "seq-mean-token-sum-norm": "constant",
}


def weights(rows: Rows, how: Any, **more) -> torch.Tensor:
    return token_weights(rows.segments, how, dtype=torch.float64, **more)


def verl_weights(rows: Rows, args: dict) -> torch.Tensor:
    """verl's modes, with its counts over all ranks where they are given."""
    mode = args.get("loss_agg_mode", "token-mean")
    info = args.get("global_batch_info", args)
    how = VERL_MODES[mode]
    filled = int((rows.segments.sizes > 0).sum())
    if how == "constant":
        made = weights(rows, how, constant=args.get("loss_scale_factor", rows.shape[1])) * rows.segments.count / filled
    else:
        made = weights(rows, how, mean_eps=1e-8 if how == "sample-mean" else 0.0)
    if "dp_size" in info:
        there = {"token-mean": int(rows.segments.mask.sum()) / info["batch_num_tokens"], "token-sum": 1}
        made = made * info["dp_size"] * there.get(mode, filled / info["global_batch_size"])
    return made


@adapter("verl", "agg_loss")
def aggregation(case: Case) -> Outputs:
    rows = Rows(tensor(case, "loss_mask"))
    return {"loss": (rows.pack(tensor(case, "loss_mat")) * verl_weights(rows, case["args"])).sum()}


@adapter("verl", "compute_policy_loss_vanilla", "compute_policy_loss_gspo", "compute_policy_loss_cispo")
def verl_policy(case: Case) -> Outputs:
    args, rows, convention = case["args"], Rows(tensor(case, "response_mask")), PRESETS["verl"]
    logp = rows.pack(tensor(case, "log_prob"), grad=True)
    d = log_ratio(logp, rows.pack(tensor(case, "old_log_prob")), convention.log_ratio_limit)
    advantages = rows.pack(tensor(case, "advantages"))
    low, high = args.get("clip_ratio_low", 0.2), args.get("clip_ratio_high", 0.2)
    if args["loss"] == "cispo":
        losses = cispo_loss(logp, d, advantages, max(1 - low, 0), 1 + high)
    elif args["loss"] == "gspo":
        d = logp - rows.pack(tensor(case, "old_log_prob"))
        d = sequence_log_ratio(d, rows.segments, convention.gspo_gradient).clamp(max=10.0)
        losses = ppo_loss(d, advantages, low, high)[0]
    else:
        losses = ppo_loss(d, advantages, low, high, args.get("clip_ratio_c", convention.dual_clip))[0]
    if "rollout_is_weights" in case["inputs"]:
        losses = losses * rows.pack(tensor(case, "rollout_is_weights"))
    return loss_and_gradient(rows, (losses * verl_weights(rows, args)).sum(), logp, "grad_log_prob")


def openrlhf_weights(rows: Rows, by_token: bool) -> torch.Tensor:
    return weights(rows, "token-mean") if by_token else weights(rows, "sample-mean", mean_eps=1e-8)


@adapter("OpenRLHF", "PolicyLoss")
def openrlhf_policy(case: Case) -> Outputs:
    args, rows, convention = case["args"], Rows(tensor(case, "action_mask")), PRESETS["openrlhf"]
    logp = rows.pack(tensor(case, "log_probs"), grad=True)
    old, gspo = rows.pack(tensor(case, "old_log_probs")), args.get("policy_loss_type") == "gspo"
    corrected = args.get("enable_vllm_is_correction", False)
    sampled = rows.pack(tensor(case, "rollout_log_probs")) if corrected else old
    if gspo:
        d = sequence_log_ratio(logp - (sampled if corrected else old), rows.segments)
    else:
        d = log_ratio(logp, old, convention.log_ratio_limit)
    low, high = args.get("clip_eps_low", 0.2), args.get("clip_eps_high", 0.2)
    losses = ppo_loss(d, rows.pack(tensor(case, "advantages")), low, high, args.get("dual_clip"))[0]
    if corrected and not gspo:
        bounds = dict(zip(("low", "high"), args["vllm_is_truncated_threshold"], strict=True))
        kind = args["vllm_is_correction_type"]
        level = "geometric-mask" if kind == "seq-mask-tis" else "token"
        outside = "zero" if kind == "icepop" else "clamp"
        losses = losses * importance_weights(old, sampled, rows.segments, outside=outside, level=level, **bounds)
    made = openrlhf_weights(rows, args.get("token_level_loss", True) and not gspo)
    if "batch_num_tokens" in args:
        made = made * rows.segments.mask.sum() / args["batch_num_tokens"] * args["dp_size"]
    elif "global_batch_size" in args:
        made = made * (rows.segments.sizes > 0).sum() / args["global_batch_size"] * args["dp_size"]
    return loss_and_gradient(rows, (losses * made).sum(), logp, "grad_log_probs")


@adapter("OpenRLHF", "ValueLoss")
@adapter("verl", "compute_value_loss")
@adapter("NeMo-RL", "MseValueLossFn")
@adapter("slime", "value_loss_function")
def values(case: Case) -> Outputs:
    args, inputs = case["args"], case["inputs"]
    rows = Rows(tensor(case, next(name for name in inputs if name.endswith("mask"))))
    new, old = ("vpreds", "values") if "vpreds" in inputs else ("values", "old_values")
    leaf = rows.pack(tensor(case, new), grad=True)
    clip = next(args[key] for key in ("cliprange_value", "cliprange", "clip_eps", "value_clip") if key in args)
    losses = value_loss(leaf, rows.pack(tensor(case, old)), rows.pack(tensor(case, "returns")), clip)[0]
    framework = case["framework"]
    if framework == "slime":
        losses = losses * PRESETS["slime"].value_loss_factor / 0.5
        made = weights(rows, "token-sum" if args["calculate_per_token_loss"] else "sum-of-sample-means")
    elif framework == "verl":
        made = verl_weights(rows, args)
    else:
        made = openrlhf_weights(rows, args.get("token_level_loss", True)) * args.get("scale", 1)
    return loss_and_gradient(rows, (losses * made).sum(), leaf, f"grad_{new}")


@adapter("OpenRLHF", "DPOLoss")
def openrlhf_pairs(case: Case) -> Outputs:
    args = case["args"]
    chosen = tensor(case, "policy_chosen_logps").requires_grad_()
    rejected = tensor(case, "policy_rejected_logps").requires_grad_()
    ratios = chosen - tensor(case, "reference_chosen_logps"), rejected - tensor(case, "reference_rejected_logps")
    kind = "ipo" if args["method"] == "ipo" else "dpo"
    loss = pair_loss(*ratios, args["beta"], kind, args.get("label_smoothing", 0.0)).mean()
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    return {
        "loss": loss,
        "chosen_rewards": args["beta"] * ratios[0],
        "rejected_rewards": args["beta"] * ratios[1],
        "grad_policy_chosen_logps": gradients[0],
        "grad_policy_rejected_logps": gradients[1],
    }


TRL_PAIRS = {"sigmoid": "dpo", "robust": "robust", "ipo": "ipo", "hinge": "hinge", "exo_pair": "exo"}


@adapter("TRL", "DPOTrainer._compute_loss")
def trl_pairs(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "mask"))
    logp = rows.pack(tensor(case, "per_token_logps"), grad=True)
    d = logp - rows.pack(tensor(case, "ref_per_token_logps"))
    sums = rows.segments.means(d) if args["method"] == "ipo" else rows.segments.sums(d)
    chosen, rejected = sums.chunk(2)
    kind: Any = TRL_PAIRS.get(args["method"], args["method"])
    smoothing = 0.0 if kind in ("dpo", "ipo", "hinge", "apo_zero", "apo_down") else args["label_smoothing"]
    loss = pair_loss(chosen, rejected, args["beta"], kind, smoothing).mean()
    return loss_and_gradient(rows, loss, logp, "grad_logps")


@adapter("NeMo-RL", "DPOLossFn")
def nemo_pairs(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "mask"))
    logp = rows.pack(tensor(case, "logprobs"), grad=True)
    d = logp - rows.pack(tensor(case, "reference_logprobs"))
    averaged = args.get("preference_average_log_probs", False)
    sums = (rows.segments.means(d) if averaged else rows.segments.sums(d)).view(-1, 2)
    preference = pair_loss(sums[:, 0], sums[:, 1], args["reference_policy_kl_penalty"]).mean()
    told = rows.segments.means(logp) if args.get("sft_average_log_probs") else rows.segments.sums(logp)
    loss = preference - args.get("sft_loss_weight", 0) * told.view(-1, 2)[:, 0].mean()
    return {"preference_loss": preference} | loss_and_gradient(rows, loss, logp, "grad_logprobs")


@adapter("OpenRLHF", "PairWiseLoss", "LogExpLoss")
@adapter("TRL", "RewardTrainer.compute_loss")
def reward_models(case: Case) -> Outputs:
    chosen, rejected = tensor(case, "chosen_reward").requires_grad_(), tensor(case, "reject_reward").requires_grad_()
    margin = tensor(case, "margin") if case["args"]["margin"] else 0.0
    loss = reward_loss(chosen, rejected, margin, case["args"].get("center_rewards_coefficient") or 0.0).mean()
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    return {"loss": loss, "grad_chosen_reward": gradients[0], "grad_reject_reward": gradients[1]}


@adapter("NeMo-RL", "PreferenceLossFn")
def nemo_reward_model(case: Case) -> Outputs:
    rewards = tensor(case, "rewards").requires_grad_()
    loss = reward_loss(rewards[0::2, 0], rewards[1::2, 0]).mean()
    return {"loss": loss, "grad_rewards": torch.autograd.grad(loss, rewards)[0]}


@adapter("OpenRLHF", "SFTLoss")
@adapter("NeMo-RL", "NLLLossFn")
def told(case: Case) -> Outputs:
    rows = Rows(tensor(case, "loss_mask"))
    logp = rows.pack(tensor(case, "per_token_logps"), grad=True)
    name = next(name for name in case["outputs"] if name.startswith("grad"))
    made = openrlhf_weights(rows, case["args"].get("token_level_loss", True))
    return loss_and_gradient(rows, -(logp * made).sum(), logp, name)


@adapter("TRL", "entropy_from_logits", "selective_log_softmax")
@adapter("OpenRLHF", "compute_entropy", "log_probs_from_logits")
@adapter("slime", "calculate_log_probs_and_entropy")
@adapter("verl", "compute_entropy_loss")
def entropies(case: Case) -> Outputs:
    logits = tensor(case, "logits").requires_grad_()
    labels = tensor(case, "labels") if "labels" in case["inputs"] else torch.zeros(logits.shape[:-1], dtype=torch.int64)
    flat = logits.flatten(0, -2)
    logp, entropy = logprob(flat, labels.flatten(), 1 / case["args"].get("temperature", 1))
    outputs: Outputs = {"log_probs": logp.view(labels.shape), "entropy": entropy.view(labels.shape)}
    if case["framework"] == "slime":
        outputs["grad_logits"] = torch.autograd.grad(logp.sum() + 0.5 * entropy.sum(), logits)[0]
    if case["framework"] == "verl":
        rows = Rows(tensor(case, "response_mask"))
        loss = (entropy * verl_weights(rows, case["args"])).sum()
        outputs |= {"token_entropy": outputs["entropy"], "loss": loss}
        outputs["grad_logits"] = torch.autograd.grad(loss, logits)[0]
    return outputs


@adapter("TRL", "KTOTrainer._compute_loss")
def trl_kto(case: Case) -> Outputs:
    args = case["args"]
    rows, other = Rows(tensor(case, "mask")), Rows(tensor(case, "KL_mask"))
    logp = rows.pack(tensor(case, "per_token_logps"), grad=True)
    ratios = rows.segments.sums(logp - rows.pack(tensor(case, "ref_per_token_logps")))
    mismatched = other.segments.sums(
        other.pack(tensor(case, "KL_per_token_logps")) - other.pack(tensor(case, "KL_ref_per_token_logps"))
    )
    desirable = tensor(case, "label").bool()
    kl = kto_reference(mismatched) if args["loss_type"] == "kto" else torch.zeros(())
    losses = kto_loss(ratios, desirable, kl, args["beta"], args["desirable_weight"], args["undesirable_weight"])
    return {"kl": kl} | loss_and_gradient(rows, losses.mean(), logp, "grad_logps")


@adapter("OpenRLHF-0.9.6", "KTOLoss")
def openrlhf_kto(case: Case) -> Outputs:
    args = case["args"]
    names = ("policy_chosen_logps", "policy_rejected_logps")
    leaves = [tensor(case, name).requires_grad_() for name in names]
    references = [tensor(case, name.replace("policy", "reference")) for name in names]
    ratios = torch.cat([leaf - reference for leaf, reference in zip(leaves, references, strict=True)])
    desirable = torch.arange(len(ratios)) < len(leaves[0])
    kl = kto_reference(tensor(case, "policy_KL_logps") - tensor(case, "reference_KL_logps"))
    weights_ = args["desirable_weight"], args["undesirable_weight"]
    loss = kto_loss(ratios, desirable, kl, args["beta"], *weights_).mean()
    gradients = torch.autograd.grad(loss, leaves)
    rewards = args["beta"] * ratios
    return {
        "loss": loss,
        "kl": kl,
        "chosen_rewards": rewards[desirable],
        "rejected_rewards": rewards[~desirable],
        **{f"grad_{name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }


@adapter("TRL", "PPOTrainer.train (losses)")
def trl_ppo(case: Case) -> Outputs:
    args = case["args"]
    answer, longer = Rows(~tensor(case, "padding_mask").bool()), Rows(~tensor(case, "padding_mask_p1").bool())
    logp, value = answer.pack(tensor(case, "new_logprobs"), grad=True), longer.pack(tensor(case, "vpred"), grad=True)
    d = log_ratio(logp, answer.pack(tensor(case, "mb_logprobs")))
    clip = args["cliprange"]
    losses = ppo_loss(d, answer.pack(tensor(case, "mb_advantage")), clip, clip)[0]
    policy = (losses * weights(answer, "token-mean")).sum()
    old, returns = longer.pack(tensor(case, "mb_values")), longer.pack(tensor(case, "mb_return"))
    critic = (value_loss(value, old, returns, args["cliprange_value"])[0] * weights(longer, "token-mean")).sum()
    loss = policy + args["vf_coef"] * critic
    gradients = torch.autograd.grad(loss, (logp, value))
    return {
        "loss": loss,
        "pg_loss": policy,
        "vf_loss": critic,
        "grad_new_logprobs": answer.unpack(gradients[0]),
        "grad_vpred": longer.unpack(gradients[1]),
    }


TRL_IMPORTANCE = {
    "token_truncate": ("token", "clamp"),
    "token_mask": ("token", "zero"),
    "sequence_truncate": ("sequence", "clamp"),
    "sequence_mask": ("sequence", "zero"),
}


@adapter("TRL", "GRPOTrainer._compute_loss")
def trl_grpo(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "completion_mask"))
    logp = rows.pack(tensor(case, "per_token_logps"), grad=True)
    old = rows.pack(tensor(case, "old_per_token_logps")) if "old_per_token_logps" in case["inputs"] else logp.detach()
    d = log_ratio(logp, old)
    if args["importance_sampling_level"] == "sequence":
        d = sequence_log_ratio(d, rows.segments)
    advantages = rows.pack(tensor(case, "advantages"))
    if args["loss_type"] == "cispo":
        losses = cispo_loss(logp, d, advantages, 0.0, args["epsilon_high"])
    else:
        losses = ppo_loss(d, advantages, args["epsilon_low"], args["epsilon_high"], args["delta"])[0]
    if "vllm_importance_sampling_mode" in args:
        sampled = rows.pack(tensor(case, "sampling_per_token_logps"))
        level: Any
        outside: Any
        level, outside = TRL_IMPORTANCE[args["vllm_importance_sampling_mode"]]
        bounds = {"low": args["clip_min"] or 0.0, "high": args["clip_max"]}
        losses = losses * importance_weights(old, sampled, rows.segments, level=level, outside=outside, **bounds)
    if args["beta"]:
        ref = rows.pack(tensor(case, "ref_per_token_logps"))
        kl = kl_estimate(logp, ref, "k3", KLRule(weighted=args.get("use_bias_correction_kl", False)), old)
        losses = losses + args["beta"] * kl
    made = {
        "grpo": lambda: weights(rows, "sample-mean") * (rows.segments.sizes > 0).sum() / rows.segments.count,
        "bnpo": lambda: weights(rows, "token-mean"),
        "dr_grpo": lambda: weights(rows, "constant", constant=args["max_completion_length"]),
        "dapo": lambda: weights(rows, "token-sum") / args["num_items_in_batch"],
        "cispo": lambda: weights(rows, "token-sum") / args["num_items_in_batch"],
    }[args["loss_type"]]()
    return loss_and_gradient(rows, (losses * made).sum(), logp, "grad_per_token_logps")


@adapter("TRL", "RLOOTrainer._compute_loss")
def trl_rloo(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "completion_mask"))
    logp = rows.pack(tensor(case, "per_token_logps"), grad=True)
    ratio = rows.segments.sums(logp) - tensor(case, "old_logps")  # of whole sequences
    losses = ppo_loss(ratio, tensor(case, "advantages"), args["epsilon_low"], args["epsilon_high"])[0]
    return loss_and_gradient(rows, losses.mean(), logp, "grad_per_token_logps")


@adapter("NeMo-RL", "ClippedPGLossFn")
def nemo_policy(case: Case) -> Outputs:
    args = case["args"]
    rows = Rows(tensor(case, "token_mask") * tensor(case, "sample_mask")[:, None])
    logp = rows.pack(tensor(case, "log_probs"), grad=True)
    old = logp.detach() if args.get("force_on_policy_ratio") else rows.pack(tensor(case, "prev_logprobs"))
    sampled, advantages = rows.pack(tensor(case, "generation_logprobs")), rows.pack(tensor(case, "advantages"))
    by_sequence = args.get("sequence_level_importance_ratios", False)
    d = sequence_log_ratio(log_ratio(logp, old), rows.segments) if by_sequence else log_ratio(logp, old)
    low, high = args["ratio_clip_min"], args["ratio_clip_max"]
    if args.get("use_cispo"):
        losses = cispo_loss(logp, d, advantages, 1 - low, 1 + high)
    elif args.get("disable_ppo_ratio"):
        losses = -logp * advantages
    else:
        losses = ppo_loss(d, advantages, low, high, args["ratio_clip_c"])[0]
    if args.get("use_importance_sampling_correction"):
        kind = args.get("truncated_importance_sampling_type")
        bounds = (
            {}
            if kind is None
            else {
                "low": args["truncated_importance_sampling_ratio_min"] or 0.0,
                "high": args["truncated_importance_sampling_ratio"],
            }
        )
        level = "sequence" if by_sequence else "geometric-mask" if kind == "seq-mask-tis" else "token"
        outside = "zero" if kind == "icepop" else "clamp"
        prior = rows.pack(tensor(case, "prev_logprobs"))
        losses = losses * importance_weights(prior, sampled, rows.segments, level=level, outside=outside, **bounds)
    if args["token_level_loss"]:
        made = weights(rows, "token-sum") / (args["global_valid_toks"] + 1e-8)
    else:
        made = weights(rows, "sum-of-sample-means", mean_eps=1e-8) / (args["global_valid_seqs"] + 1e-8)
    if args["reference_policy_kl_penalty"]:
        before = sampled if args.get("use_on_policy_kl_approximation") else None
        ref = rows.pack(tensor(case, "reference_policy_logprobs"))
        kl = kl_estimate(logp, ref, "k3", PRESETS["nemo"].kl, before)
        losses = losses + args["reference_policy_kl_penalty"] * kl
    return loss_and_gradient(rows, (losses * made).sum(), logp, "grad_next_token_logprobs")


@adapter("slime", "policy_loss_function")
def slime_policy(case: Case) -> Outputs:
    args, mask = case["args"], tensor(case, "mask")
    here = torch.arange(mask.shape[1])[None] < tensor(case, "response_lengths")[:, None]
    rows = Rows(mask * here)
    logp = rows.pack(tensor(case, "log_probs"), grad=True)
    old, estimator = rows.pack(tensor(case, "old_log_probs")), args["advantage_estimator"]
    d, advantages = log_ratio(logp, old), rows.pack(tensor(case, "advantages"))
    if estimator == "gspo":
        d = sequence_log_ratio(d, rows.segments)
    low, high = args["eps_clip"], args["eps_clip_high"]
    if estimator == "cispo":
        losses = cispo_loss(logp, d, advantages, 1 - low, 1 + high)
    else:
        losses = ppo_loss(d, advantages, low, high, args["eps_clip_c"])[0]
    if args.get("use_tis"):
        outside = "zero" if args.get("tis_function") == "icepop_function" else "clamp"
        sampled = rows.pack(tensor(case, "rollout_log_probs"))
        bounds = {"low": args.get("tis_clip_low", 0.0), "high": args.get("tis_clip", 2.0)}
        losses = losses * importance_weights(old, sampled, rows.segments, outside=outside, **bounds)
    if args.get("use_kl_loss"):
        kind: Any = {"low_var_kl": "k3"}.get(args.get("kl_loss_type", "low_var_kl"), args.get("kl_loss_type"))
        rule = KLRule(weighted=args.get("use_unbiased_kl", False))
        kl = kl_estimate(logp, rows.pack(tensor(case, "ref_log_probs")), kind, rule, old)
        losses = losses + args.get("kl_loss_coef", 0.01) * kl
    made = weights(rows, "token-sum" if args["calculate_per_token_loss"] else "sum-of-sample-means")
    return loss_and_gradient(rows, (losses * made).sum(), logp, "grad_log_probs")


@adapter("slime", "compute_policy_loss")
def slime_tokens(case: Case) -> Outputs:
    args = case["args"]
    d = tensor(case, "log_probs") - tensor(case, "old_log_probs")
    if "ppo_kl" in case["inputs"]:
        d = -tensor(case, "ppo_kl")
    losses, _, _ = ppo_loss(d, tensor(case, "advantages"), args["eps_clip"], args["eps_clip_high"], args["eps_clip_c"])
    return {"pg_losses": losses}


def verl_bounds(threshold: float | str) -> dict:
    """verl's one number truncates, its "low_high" drops what is outside."""
    if isinstance(threshold, str) and "_" in threshold:
        low, high = map(float, threshold.split("_"))
        return {"low": low, "high": high, "outside": "zero"}
    return {"high": float(threshold)}


@adapter("verl", "compute_rollout_correction_weights")
def verl_importance(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "response_mask"))
    old, sampled = rows.pack(tensor(case, "old_log_prob")), rows.pack(tensor(case, "rollout_log_prob"))
    made = importance_weights(
        old, sampled, rows.segments, level=args["rollout_is"], limit=20.0, **verl_bounds(args["rollout_is_threshold"])
    )
    return {"weights": rows.unpack(made)}


@adapter("OpenRLHF", "DPOTrainer._get_batch_logps")
def summed(case: Case) -> Outputs:
    logp = tensor(case, "per_token_logps")
    place = torch.arange(logp.shape[1])[None]
    mask = tensor(case, "attention_mask")[:, 1:] * (
        place >= torch.tensor(case["inputs"]["prompt_id_lens"])[:, None] - 1
    )
    rows = Rows(mask)
    return {"sums": rows.segments.sums(rows.pack(logp)), "means": rows.segments.means(rows.pack(logp))}
