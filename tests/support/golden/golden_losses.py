"""Golden vectors of losses, computed by trialign's functions."""

from __future__ import annotations

from typing import Any

import torch
from golden import (
    Case,
    Outputs,
    Rows,
    adapter,
    grpo_options,
    kl_limits,
    loss_and_gradient,
    ppo_config,
    tensor,
    with_gradients,
)
from presets import preset
from trialign.algorithms.config.preference import DPOConfig
from trialign.algorithms.grpo import corrected
from trialign.algorithms.grpo import policy_losses as group_losses
from trialign.algorithms.losses.aggregation import token_weights
from trialign.algorithms.losses.kl import kl_estimate
from trialign.algorithms.losses.policy import importance_weights
from trialign.algorithms.losses.preference import kto_loss, kto_reference, pair_loss, reward_loss
from trialign.algorithms.losses.value import value_loss
from trialign.algorithms.ppo import policy_losses
from trialign.kernels.logprob import logprob

VERL_MODES = {"token-mean": "token-mean", "token-sum": "token-sum", "seq-mean-token-sum": "sample-sum"}
VERL_MODES |= {"seq-mean-token-mean": "sample-mean", "seq-mean-token-sum-norm": "constant"}


def loss_weights(rows: Rows, how: Any, **more) -> torch.Tensor:
    return token_weights(rows.segments, how, dtype=torch.get_default_dtype(), **more)


def given(args: dict, **names: str) -> dict[str, Any]:
    """Options from those arguments of a case that it has; None is 0."""
    return {option: args[name] or 0.0 for option, name in names.items() if name in args}


def verl_weights(rows: Rows, args: dict, preset: str) -> torch.Tensor:
    """Weights by verl's mode, with its counts over all ranks where the case has them."""
    info = args.get("global_batch_info", args)
    how = VERL_MODES[args["loss_agg_mode"]] if "loss_agg_mode" in args else preset
    filled = int((rows.segments.sizes > 0).sum())
    if how == "constant":
        length = args.get("loss_scale_factor", rows.shape[1])
        result = loss_weights(rows, how, constant=length) * rows.segments.count / filled
    else:
        result = loss_weights(rows, how, mean_eps=1e-8 if how == "sample-mean" else 0.0)
    if "dp_size" in info:
        scale = {"token-mean": int(rows.segments.mask.sum()) / info["batch_num_tokens"], "token-sum": 1}
        result = result * info["dp_size"] * scale.get(how, filled / info["global_batch_size"])
    return result


@adapter("verl", "agg_loss")
def aggregation(case: Case) -> Outputs:
    rows = Rows(tensor(case, "loss_mask"))
    weights = verl_weights(rows, case["args"], ppo_config(case).ppo.loss_aggregation)
    return {"loss": (rows.read(case, "loss_mat") * weights).sum()}


@adapter("verl", "compute_policy_loss_vanilla", "compute_policy_loss_gspo", "compute_policy_loss_cispo")
def verl_policy(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "response_mask"))
    clips = given(args, clip_low="clip_ratio_low", clip_high="clip_ratio_high", dual_clip="clip_ratio_c")
    options = grpo_options(case, {"vanilla": "grpo"}.get(args["loss"]) or args["loss"], **clips)
    logp, old = rows.read(case, "log_prob", grad=True), rows.read(case, "old_log_prob")
    losses, _, clipped = group_losses(logp, old, rows.read(case, "advantages"), rows.segments, options)
    if "rollout_is_weights" in case["inputs"]:
        losses = losses * rows.read(case, "rollout_is_weights")
    loss = (losses * verl_weights(rows, args, options.loss_aggregation)).sum()
    fraction = (clipped * loss_weights(rows, "token-mean")).sum()
    return {"pg_clipfrac": fraction} | loss_and_gradient(rows, loss, logp, "grad_log_prob")


def mean_weights(rows: Rows, how: Any) -> torch.Tensor:
    """Weights of OpenRLHF and NeMo-RL, which add 1e-8 to a sample's tokens."""
    return loss_weights(rows, how, mean_eps=1e-8 if "sample-mean" in how else 0.0)


@adapter("OpenRLHF", "PolicyLoss")
def openrlhf_policy(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "action_mask"))
    logp, old = rows.read(case, "log_probs", grad=True), rows.read(case, "old_log_probs")
    algorithm = "gspo" if args.get("policy_loss_type") == "gspo" else "grpo"
    changes: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}  # defaults of its function
    changes |= given(args, clip_low="clip_eps_low", clip_high="clip_eps_high", dual_clip="dual_clip")
    sampled = old
    if args.get("enable_vllm_is_correction"):
        sampled = rows.read(case, "rollout_log_probs")
        if algorithm == "gspo":  # its ratio is to the sampler
            old = sampled
        else:
            changes["rollout_correction"] = OPENRLHF_IMPORTANCE[args["vllm_is_correction_type"]]
            low, high = args["vllm_is_truncated_threshold"]
            changes |= {"rollout_ratio_low": low, "rollout_ratio_high": high}
    options = grpo_options(case, algorithm, **changes)
    losses, _, clipped = group_losses(logp, old, rows.read(case, "advantages"), rows.segments, options)
    losses = corrected(losses, old, sampled, rows.segments, options)[0]
    fraction = (clipped * loss_weights(rows, "token-mean")).sum()
    weights = mean_weights(rows, options.loss_aggregation if args.get("token_level_loss", True) else "sample-mean")
    if "batch_num_tokens" in args:
        weights = weights * rows.segments.mask.sum() / args["batch_num_tokens"] * args["dp_size"]
    elif "global_batch_size" in args:
        weights = weights * (rows.segments.sizes > 0).sum() / args["global_batch_size"] * args["dp_size"]
    return {"clip_ratio": fraction} | loss_and_gradient(rows, (losses * weights).sum(), logp, "grad_log_probs")


OPENRLHF_IMPORTANCE = {"tis": "tis", "icepop": "icepop", "seq-mask-tis": "geometric-mask"}


@adapter("OpenRLHF", "ValueLoss")
@adapter("verl", "compute_value_loss")
@adapter("NeMo-RL", "MseValueLossFn")
@adapter("slime", "value_loss_function")
def values(case: Case) -> Outputs:
    args, inputs = case["args"], case["inputs"]
    rows = Rows(tensor(case, next(name for name in inputs if name.endswith("mask"))))
    new, old = ("vpreds", "values") if "vpreds" in inputs else ("values", "old_values")
    leaf = rows.read(case, new, grad=True)
    clip = next(args[key] for key in ("cliprange_value", "cliprange", "clip_eps", "value_clip") if key in args)
    config, framework = ppo_config(case), case["framework"]
    before, returns = rows.read(case, old), rows.read(case, "returns")
    losses, clipped = value_loss(leaf, before, returns, clip or 0.0, config.critic.loss_coef)
    how = config.ppo.loss_aggregation
    if framework == "verl":
        weights = verl_weights(rows, args, how)
    elif framework == "slime":
        weights = slime_weights(rows, args, how)
    else:
        how = how if args.get("token_level_loss", True) else "sample-mean"
        weights = mean_weights(rows, how) * args.get("scale", 1)
    fraction = (clipped * loss_weights(rows, "token-mean")).sum()
    outputs = loss_and_gradient(rows, (losses * weights).sum(), leaf, f"grad_{new}")
    return outputs | {"clipfrac": fraction, "vf_clipfrac": fraction}


def slime_weights(rows: Rows, args: dict, preset: Any) -> torch.Tensor:
    """slime's losses are sums over samples, or tokens; its trainer divides by their number in the global batch."""
    if args["calculate_per_token_loss"]:
        return loss_weights(rows, "token-sum")
    return loss_weights(rows, preset) * rows.segments.filled


@adapter("OpenRLHF", "DPOLoss")
def openrlhf_pairs(case: Case) -> Outputs:
    args = case["args"]
    chosen = tensor(case, "policy_chosen_logps").requires_grad_()
    rejected = tensor(case, "policy_rejected_logps").requires_grad_()
    ratios = chosen - tensor(case, "reference_chosen_logps"), rejected - tensor(case, "reference_rejected_logps")
    kind = "ipo" if args["method"] == "ipo" else "dpo"
    overlay = preset(DPOConfig, "openrlhf", "ipo" if kind == "ipo" else "")
    assert not overlay.loss.average_log_probs  # the inputs are summed
    loss = pair_loss(*ratios, args["beta"], kind, args.get("label_smoothing", 0.0)).mean()
    rewards = {"chosen_rewards": args["beta"] * ratios[0], "rejected_rewards": args["beta"] * ratios[1]}
    return rewards | with_gradients(loss, policy_chosen_logps=chosen, policy_rejected_logps=rejected)


TRL_PAIRS = {"sigmoid": "dpo", "sigmoid_norm": "dpo", "exo_pair": "exo"}
SMOOTHED = ("robust", "exo")


@adapter("TRL", "DPOTrainer._compute_loss")
def trl_pairs(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "mask"))
    logp = rows.read(case, "per_token_logps", grad=True)
    if args["method"] == "sft":  # launch/sft.py's loss on the chosen responses
        chosen = Rows(tensor(case, "mask") * (torch.arange(rows.shape[0]) < rows.shape[0] // 2)[:, None])
        return loss_and_gradient(rows, -(logp * loss_weights(chosen, "token-mean")).sum(), logp, "grad_logps")
    kind: Any = TRL_PAIRS.get(args["method"], args["method"])
    smoothing, beta = args["label_smoothing"] if kind in SMOOTHED else 0.0, args["beta"]
    averaged = preset(DPOConfig, "trl", kind if kind == "ipo" else "").loss.average_log_probs
    d = logp - rows.read(case, "ref_per_token_logps")
    ratios = rows.segments.means(d) if averaged or args["method"] == "sigmoid_norm" else rows.segments.sums(d)
    chosen, rejected = ratios.chunk(2)
    loss = pair_loss(chosen, rejected, beta, kind, smoothing).mean()
    sums = rows.segments.sums(d).chunk(2)  # its rewards are always sums
    rewards = {f"{name}_rewards_mean": beta * x.mean() for name, x in zip(("chosen", "rejected"), sums, strict=True)}
    return rewards | loss_and_gradient(rows, loss, logp, "grad_logps")


@adapter("NeMo-RL", "DPOLossFn")
def nemo_pairs(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "mask"))
    logp = rows.read(case, "logprobs", grad=True)
    d = logp - rows.read(case, "reference_logprobs")
    averaged = args.get("preference_average_log_probs", False)
    sums = (rows.segments.means(d) if averaged else rows.segments.sums(d)).view(-1, 2)
    preference = pair_loss(sums[:, 0], sums[:, 1], args["reference_policy_kl_penalty"]).mean()
    mean = args.get("sft_average_log_probs") or preset(DPOConfig, "nemo_rl").loss.nll_average_log_probs
    summed = rows.segments.means(logp) if mean else rows.segments.sums(logp)
    nll = -summed.view(-1, 2)[:, 0].mean()
    loss = preference + args.get("sft_loss_weight", 0) * nll
    outputs: Outputs = {"preference_loss": preference}
    if args.get("sft_loss_weight"):
        outputs["sft_loss"] = nll
    return outputs | loss_and_gradient(rows, loss, logp, "grad_logprobs")


@adapter("OpenRLHF", "PairWiseLoss", "LogExpLoss")
@adapter("TRL", "RewardTrainer.compute_loss")
def reward_models(case: Case) -> Outputs:
    chosen, rejected = tensor(case, "chosen_reward").requires_grad_(), tensor(case, "reject_reward").requires_grad_()
    margin = tensor(case, "margin") if case["args"]["margin"] else 0.0
    loss = reward_loss(chosen, rejected, margin, case["args"].get("center_rewards_coefficient") or 0.0).mean()
    return with_gradients(loss, chosen_reward=chosen, reject_reward=rejected)


@adapter("NeMo-RL", "PreferenceLossFn")
def nemo_reward_model(case: Case) -> Outputs:
    rewards = tensor(case, "rewards").requires_grad_()
    loss = reward_loss(rewards[0::2, 0], rewards[1::2, 0]).mean()
    return with_gradients(loss, rewards=rewards)


@adapter("OpenRLHF", "SFTLoss")
@adapter("NeMo-RL", "NLLLossFn")
def negative_log_likelihood(case: Case) -> Outputs:
    rows = Rows(tensor(case, "loss_mask"))
    logp = rows.read(case, "per_token_logps", grad=True)
    name = next(name for name in case["outputs"] if name.startswith("grad"))
    result = mean_weights(rows, "token-mean" if case["args"].get("token_level_loss", True) else "sample-mean")
    return loss_and_gradient(rows, -(logp * result).sum(), logp, name)


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
        weights = verl_weights(rows, case["args"], ppo_config(case).ppo.loss_aggregation)
        loss = (rows.pack(entropy.view(labels.shape)) * weights).sum()
        outputs |= {"token_entropy": outputs["entropy"], "loss": loss}
        outputs["grad_logits"] = torch.autograd.grad(loss, logits)[0]
    return outputs


@adapter("TRL", "KTOTrainer._compute_loss")
def trl_kto(case: Case) -> Outputs:
    args = case["args"]
    rows, other = Rows(tensor(case, "mask")), Rows(tensor(case, "KL_mask"))
    logp = rows.read(case, "per_token_logps", grad=True)
    ratios = rows.segments.sums(logp - rows.read(case, "ref_per_token_logps"))
    d = other.read(case, "KL_per_token_logps") - other.read(case, "KL_ref_per_token_logps")
    mismatched = other.segments.sums(d)
    desirable = tensor(case, "label").bool()
    kl = kto_reference(mismatched) if args["loss_type"] == "kto" else torch.zeros(())
    losses = kto_loss(ratios, desirable, kl, args["beta"], args["desirable_weight"], args["undesirable_weight"])
    return {"kl": kl} | loss_and_gradient(rows, losses.mean(), logp, "grad_logps")


@adapter("OpenRLHF-0.9.6", "KTOLoss")
def openrlhf_kto(case: Case) -> Outputs:
    args = case["args"]
    names = ("policy_chosen_logps", "policy_rejected_logps")
    leaves = {name: tensor(case, name).requires_grad_() for name in names}
    ratios = torch.cat([leaves[name] - tensor(case, name.replace("policy", "reference")) for name in names])
    desirable = torch.arange(len(ratios)) < len(leaves[names[0]])
    kl = kto_reference(tensor(case, "policy_KL_logps") - tensor(case, "reference_KL_logps"))
    weights_ = args["desirable_weight"], args["undesirable_weight"]
    loss = kto_loss(ratios, desirable, kl, args["beta"], *weights_).mean()
    rewards = args["beta"] * ratios
    outputs: Outputs = {"kl": kl, "chosen_rewards": rewards[desirable], "rejected_rewards": rewards[~desirable]}
    return outputs | with_gradients(loss, **leaves)


@adapter("TRL", "PPOTrainer.train (losses)")
def trl_ppo(case: Case) -> Outputs:
    args = case["args"]
    response, longer = Rows(~tensor(case, "padding_mask").bool()), Rows(~tensor(case, "padding_mask_p1").bool())
    logp, value = response.read(case, "new_logprobs", grad=True), longer.read(case, "vpred", grad=True)
    old, advantages = response.read(case, "mb_logprobs"), response.read(case, "mb_advantage")
    config = ppo_config(case, clip=args["cliprange"])
    how = config.ppo.loss_aggregation
    losses = policy_losses(logp, old, advantages, response.segments, config.actor)[0]
    policy = (losses * loss_weights(response, how)).sum()
    before, returns = longer.read(case, "mb_values"), longer.read(case, "mb_return")
    losses = value_loss(value, before, returns, args["cliprange_value"], config.critic.loss_coef)[0]
    critic = (losses * loss_weights(longer, how)).sum()
    outputs = with_gradients(policy + args["vf_coef"] * critic, new_logprobs=logp, vpred=value)
    for rows, name in ((response, "grad_new_logprobs"), (longer, "grad_vpred")):
        outputs[name] = rows.unpack(torch.as_tensor(outputs[name]))
    return outputs | {"pg_loss": policy, "vf_loss": critic}


TRL_IMPORTANCE = {
    "token_truncate": "tis",
    "token_mask": "icepop",
    "sequence_truncate": "sequence-tis",
    "sequence_mask": "",  # the overlay's
}


@adapter("TRL", "GRPOTrainer._compute_loss")
def trl_grpo(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "completion_mask"))
    logp = rows.read(case, "per_token_logps", grad=True)
    old = rows.read(case, "old_per_token_logps") if "old_per_token_logps" in case["inputs"] else logp.detach()
    algorithm = "gspo" if args["importance_sampling_level"] == "sequence" else "grpo"
    changes = given(args, clip_low="epsilon_low", clip_high="epsilon_high", dual_clip="delta")
    if args["loss_type"] == "cispo":  # its upper bound alone
        algorithm, changes["clip_low"], changes["clip_high"] = "cispo", 1.0, changes["clip_high"] - 1
    sampled = old
    if "vllm_importance_sampling_mode" in args:
        sampled = rows.read(case, "sampling_per_token_logps")
        if kind := TRL_IMPORTANCE[args["vllm_importance_sampling_mode"]]:
            changes["rollout_correction"] = kind
        changes |= given(args, rollout_ratio_low="clip_min", rollout_ratio_high="clip_max")
    options = grpo_options(case, algorithm, **changes)
    losses, _, clipped = group_losses(logp, old, rows.read(case, "advantages"), rows.segments, options)
    losses = corrected(losses, old, sampled, rows.segments, options)[0]
    fraction = (clipped * loss_weights(rows, "sample-mean" if algorithm == "gspo" else "token-mean")).sum()
    outputs: Outputs = {} if algorithm == "cispo" else {"clip_ratio/region_mean": fraction}
    if args["beta"]:
        ref = rows.read(case, "ref_per_token_logps")
        ratio = (logp - old.detach()).exp() if args.get("use_bias_correction_kl") else None
        kl = kl_estimate(logp, ref, options.kl_estimator, *kl_limits(case, options.kl_estimator), ratio=ratio)
        losses = losses + args["beta"] * kl
        outputs["kl"] = (kl * loss_weights(rows, "token-mean")).sum()
    weights = {
        "grpo": lambda: loss_weights(rows, "sample-mean") * (rows.segments.sizes > 0).sum() / rows.segments.count,
        "bnpo": lambda: loss_weights(rows, "token-mean"),
        "dr_grpo": lambda: loss_weights(rows, "constant", constant=args["max_completion_length"]),
        "dapo": lambda: loss_weights(rows, "token-sum") / args["num_items_in_batch"],
        "cispo": lambda: loss_weights(rows, "token-sum") / args["num_items_in_batch"],
    }[args["loss_type"]]()
    return outputs | loss_and_gradient(rows, (losses * weights).sum(), logp, "grad_per_token_logps")


@adapter("TRL", "RLOOTrainer._compute_loss")
def trl_rloo(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "completion_mask"))
    logp = rows.read(case, "per_token_logps", grad=True)
    old = rows.pack(tensor(case, "old_logps") / rows.segments.sizes)  # the case has those of whole responses
    options = grpo_options(case, "rloo", **given(args, clip_low="epsilon_low", clip_high="epsilon_high"))
    losses = group_losses(logp, old, rows.read(case, "advantages"), rows.segments, options)[0]
    loss = (losses * loss_weights(rows, options.loss_aggregation)).sum()
    return loss_and_gradient(rows, loss, logp, "grad_per_token_logps")


NEMO_IMPORTANCE = {None: "tis", "tis": "tis", "icepop": "icepop", "seq-mask-tis": "geometric-mask"}


@adapter("NeMo-RL", "ClippedPGLossFn")
def nemo_policy(case: Case) -> Outputs:
    args = case["args"]
    rows = Rows(tensor(case, "token_mask") * tensor(case, "sample_mask")[:, None])
    logp = rows.read(case, "log_probs", grad=True)
    prior, sampled = rows.read(case, "prev_logprobs"), rows.read(case, "generation_logprobs")
    old = logp.detach() if args.get("force_on_policy_ratio") else prior
    by_sequence = args.get("sequence_level_importance_ratios", False)
    algorithm = "gspo" if by_sequence else "cispo" if args.get("use_cispo") else "grpo"
    changes = given(args, clip_low="ratio_clip_min", clip_high="ratio_clip_max", dual_clip="ratio_clip_c")
    if args.get("disable_ppo_ratio"):  # -A log π: CISPO whose weights are 1
        algorithm, changes["clip_low"], changes["clip_high"] = "cispo", 0.0, 0.0
    if args.get("use_importance_sampling_correction"):
        kind = args.get("truncated_importance_sampling_type")
        whole = "sequence-icepop" if kind == "icepop" else "sequence-tis"
        changes["rollout_correction"] = whole if by_sequence else NEMO_IMPORTANCE[kind]
        changes |= {"rollout_ratio_low": 0.0, "rollout_ratio_high": float("inf")}
        if kind is not None:
            changes["rollout_ratio_low"] = args["truncated_importance_sampling_ratio_min"] or 0.0
            changes["rollout_ratio_high"] = args["truncated_importance_sampling_ratio"]
    options = grpo_options(case, algorithm, **changes)
    losses = group_losses(logp, old, rows.read(case, "advantages"), rows.segments, options)[0]
    losses, outputs = corrected(losses, prior, sampled, rows.segments, options)[0], {}
    if args["token_level_loss"]:
        weights = loss_weights(rows, "token-sum") / (args["global_valid_toks"] + 1e-8)
    else:
        weights = mean_weights(rows, "sum-of-sample-means") / (args["global_valid_seqs"] + 1e-8)
    if args["reference_policy_kl_penalty"]:
        before = sampled if args.get("use_on_policy_kl_approximation") else logp
        ref = rows.read(case, "reference_policy_logprobs")
        assert options.kl_unbiased
        ratio = (logp - before.detach()).exp()
        kl = kl_estimate(logp, ref, options.kl_estimator, *kl_limits(case, options.kl_estimator), ratio=ratio)
        losses = losses + args["reference_policy_kl_penalty"] * kl
        outputs = {"kl_penalty": (kl * weights).sum()}
    return outputs | loss_and_gradient(rows, (losses * weights).sum(), logp, "grad_next_token_logprobs")


@adapter("slime", "policy_loss_function")
def slime_policy(case: Case) -> Outputs:
    args, mask = case["args"], tensor(case, "mask")
    here = torch.arange(mask.shape[1])[None] < tensor(case, "response_lengths")[:, None]
    rows = Rows(mask * here)
    logp = rows.read(case, "log_probs", grad=True)
    old = rows.read(case, "old_log_probs")
    changes, sampled = given(args, clip_low="eps_clip", clip_high="eps_clip_high", dual_clip="eps_clip_c"), old
    if args.get("use_tis"):
        sampled = rows.read(case, "rollout_log_probs")
        changes["rollout_correction"] = "icepop" if args.get("tis_function") == "icepop_function" else "tis"
        changes |= given(args, rollout_ratio_low="tis_clip_low", rollout_ratio_high="tis_clip")
    options = grpo_options(case, args["advantage_estimator"], **changes)
    losses, _, clipped = group_losses(logp, old, rows.read(case, "advantages"), rows.segments, options)
    losses, outputs = corrected(losses, old, sampled, rows.segments, options)[0], {}
    weights = slime_weights(rows, args, options.loss_aggregation)
    if args.get("use_kl_loss"):
        kind: Any = {"low_var_kl": "k3"}.get(args.get("kl_loss_type", "low_var_kl"), args.get("kl_loss_type"))
        limits = kl_limits(case, "k3" if args.get("kl_loss_type", "low_var_kl") == "low_var_kl" else "")
        ratio = (logp - old.detach()).exp() if args.get("use_unbiased_kl") else None
        kl = kl_estimate(logp, rows.read(case, "ref_log_probs"), kind, *limits, ratio=ratio)
        losses = losses + args.get("kl_loss_coef", 0.01) * kl
        outputs = {"kl_loss": (kl * weights).sum()}
    outputs |= {"pg_clipfrac": (clipped * weights).sum()}
    return outputs | loss_and_gradient(rows, (losses * weights).sum(), logp, "grad_log_probs")


@adapter("slime", "compute_policy_loss")
def slime_tokens(case: Case) -> Outputs:
    args, advantages = case["args"], tensor(case, "advantages")
    rows = Rows(torch.ones_like(advantages).reshape(-1, advantages.shape[-1]))
    if "ppo_kl" in case["inputs"]:
        logp, old = -tensor(case, "ppo_kl"), torch.zeros_like(advantages)
    else:
        logp, old = tensor(case, "log_probs"), tensor(case, "old_log_probs")
    clips = given(args, clip_low="eps_clip", clip_high="eps_clip_high", dual_clip="eps_clip_c")
    options = grpo_options(case, "grpo", **clips)
    packed = (rows.pack(x.reshape(rows.shape)) for x in (logp, old, advantages))
    losses, _, clipped = group_losses(*packed, rows.segments, options)
    outputs = {"pg_losses": losses, "clipfrac": clipped}
    return {name: rows.unpack(x).reshape(advantages.shape) for name, x in outputs.items()}


def verl_bounds(threshold: float | str) -> dict:
    """Of verl's thresholds one number truncates, "low_high" drops ratios outside."""
    if isinstance(threshold, str) and "_" in threshold:
        low, high = map(float, threshold.split("_"))
        return {"low": low, "high": high, "outside": "zero"}
    return {"high": float(threshold)}


@adapter("verl", "compute_rollout_correction_weights")
def verl_importance(case: Case) -> Outputs:
    args, rows = case["args"], Rows(tensor(case, "response_mask"))
    old, sampled = rows.read(case, "old_log_prob"), rows.read(case, "rollout_log_prob")
    bounds = verl_bounds(args["rollout_is_threshold"])
    result = importance_weights(old, sampled, rows.segments, level=args["rollout_is"], limit=20.0, **bounds)
    return {"weights": rows.unpack(result)}


@adapter("OpenRLHF", "DPOTrainer._get_batch_logps")
def summed(case: Case) -> Outputs:
    logp = tensor(case, "per_token_logps")
    starts = torch.tensor(case["inputs"]["prompt_id_lens"])[:, None] - 1
    rows = Rows(tensor(case, "attention_mask")[:, 1:] * (torch.arange(logp.shape[1])[None] >= starts))
    return {"sums": rows.segments.sums(rows.pack(logp)), "means": rows.segments.means(rows.pack(logp))}
