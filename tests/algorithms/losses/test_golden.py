"""Golden vectors of OpenRLHF, TRL, verl, NeMo-RL and slime, computed under the overlay of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import golden_losses as _losses  # registers its adapters
import golden_moe as _moe  # noqa: F401
import golden_rewards as _rewards
import pytest
import torch
from golden import ADAPTERS, Case, cases
from torch import Tensor
from trialign.algorithms import grpo, ppo

ON_DEVICE_OF_INPUTS = ("trialign.algorithms.losses", "trialign.algorithms.advantages")
MASKS = ("action_mask", "response_mask", "mask", "completion_mask", "token_mask", "loss_mask")

NOT_SUPPORTED = {  # framework or function -> algorithm
    "Megatron-LM": "its router losses alone",
    "MixtralForCausalLM": "a whole model, compared in test_families_transformers.py",
    "VanillaKTOLoss": "a gradient through the reference point, which its authors took back",
    "apply_stop_properly_penalty": "ProRL's penalty",
    "compute_gdpo_outcome_advantage": "GDPO",
    "compute_gpg_outcome_advantage": "GPG",
    "compute_grpo_passk_outcome_advantage": "pass@k advantages",
    "compute_multi_turn_optimal_token_baseline_advantage": "optimal token baselines",
    "compute_offpolicy_metrics": "metrics",
    "compute_opo_outcome_advantage": "OPO",
    "compute_optimal_token_baseline_advantage": "optimal token baselines",
    "compute_policy_loss_bypass_mode": "bypass mode",
    "compute_policy_loss_dppo_kl": "DPPO",
    "compute_policy_loss_dppo_tv": "DPPO",
    "compute_policy_loss_dro": "DRO",
    "compute_policy_loss_geo_mean": "GMPO",
    "compute_policy_loss_gpg": "GPG",
    "compute_policy_loss_kl_cov": "KL-Cov",
    "compute_policy_loss_sapo": "SAPO",
    "compute_remax_outcome_advantage": "ReMax",
    "compute_rollout_rejection_mask": "verl's twelve rejection masks",
}

OTHER_LOSSES = {"vespo", "luspo", "sapo", "apo_zero_unpaired"}
OTHER_LOSSES |= {"aot", "aot_unpaired", "bco_pair", "discopop", "nca_pair", "sppo_hard"}
OTHER_OPTIONS = {
    "off_policy_mask_threshold": "sequence masks by KL",
    "use_opsm": "sequence masks by KL",
    "length_adaptive_alpha": "VAPO's length-adaptive lambda",
    "rollout_is_batch_normalize": "importance weights normalized over the batch",
    "multi_objective_aggregation": "several rewards, which rewards/functions.py has summed before",
}

# Tolerances beyond the case's own, where the framework's arithmetic is narrower than the case's dtype.
WIDER = {
    "TRL PPOTrainer.train (steps 3-6)": 1e-7,  # its Bessel factor is a quotient of integers, which torch makes float32
    "verl compute_grpo_vectorized_outcome_advantage": 1e-6,  # adds its epsilon to the variance's float32 count
    "verl compute_grpo_outcome_advantage": 1e-6,  # divides a response without siblings by a float32 1 + 1e-6
}


def reason_left_out(case: Case) -> str | None:
    """The reason why a case is not computed; None where it is."""
    function, args, kind = case["function"].split("::")[1], case["args"], case.get("kind")
    for name in (case["framework"], function):
        if name in NOT_SUPPORTED:
            return f"not supported: {NOT_SUPPORTED[name]}"
    if "error" in case["outputs"]:
        return f"{case['framework']} itself fails: {case['outputs']['error']}"
    if function == "masked_whiten" and case["framework"] == "TRL" and kind == "only_one":
        return "TRL gives NaN for a single token, trialign 0"
    if loss := OTHER_LOSSES & {args.get("loss_type"), args.get("method")}:
        return f"not supported: {loss}"
    for name, feature in OTHER_OPTIONS.items():
        if args.get(name):
            return f"not supported: {feature}"
    if kind == "noise" or (function == "compute_grpo_vectorized_outcome_advantage" and kind == "zero_var"):
        return "float32 rounding of equal rewards, which float64 does not have"
    return None


COMPARED = 741
"""Number of cases that are compared."""

NOT_COMPARED = {  # output -> reason
    **dict.fromkeys(
        (
            "approx_entropy", "gen_kl_error", "is_oob_ratio", "js_divergence_error", "probs_ratio",
            "probs_ratio_clamped", "sampling_importance_ratio", "importance_sampling_ratio", "accuracy",
            "rewards_chosen_mean", "rewards_rejected_mean", "rewards_margins_mean", "chosen_logps_mean",
            "chosen_rewards_mean", "rejected_rewards_mean", "ppo_kl", "vllm_kl", "tis", "tis_clipfrac", "current_kl",
            "non_score_reward",
        ),
        "a metric of the framework, no part of a loss",
    ),
    "kl_penalty": "0 where the case has no KL in the loss",
    "sft_loss": "0 where the case has no such term",
    "cispo_clip_ratio": "TRL counts among the tokens with a positive advantage",
    "pg_clipfrac_lower": "verl counts dual clips apart, trialign all clips together",
    "vf_clipfrac": "TRL computes it in float32, NeMo-RL's is compared",
    "value_clipfrac": "slime counts values beyond the clip, trialign those where the clip decides",
    "token_reward_sum": "OpenRLHF's sum has the KL of tokens that do not count",
    **dict.fromkeys(("padding_mask", "padding_mask_p1"), "TRL's masks"),
    **dict.fromkeys(
        ("grad_gate_logits_0", "grad_gate_logits_1", "grad_gate_logits_2"),
        "of several layers, pooled before the product: a logged number",
    ),
}  # fmt: skip

# (function, kind) -> an output that float32 cannot hold: k3's gradient is 1 - e^34 + e^34 there.
NOT_IN_FLOAT32 = {("calculate_kl", "huge"): "grad_logprobs"}

CASES = list(cases())
PARAMETERS = [pytest.param(case, id=name) for name, case in CASES if reason_left_out(case) is None]


def counted(case: Case, name: str, expected: Tensor) -> Tensor:
    """Mask of the compared entries of an output: tokens that count, and every gradient."""
    mask = next((m for m in MASKS if m in case["inputs"]), None)
    if mask is not None and not name.startswith("grad"):
        tokens = torch.tensor(case["inputs"][mask]) > 0
        if tokens.shape == expected.shape:
            return tokens
    return torch.ones_like(expected, dtype=torch.bool)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def on_meta(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return function(*args, **options)


@pytest.fixture(autouse=True)
def meta_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and advantages create tensors on the device of their inputs: one on the default device would fail here."""
    for module in (_losses, _rewards, grpo, ppo):
        for name, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and function.__module__.startswith(ON_DEVICE_OF_INPUTS):
                monkeypatch.setattr(module, name, partial(on_meta, function))


@pytest.mark.parametrize("case", PARAMETERS)
def test_golden(case: Case, dtype: torch.dtype) -> None:
    case, function = dict(case), case["function"].split("::")[1]
    tolerance = max(case["tol"], WIDER.get(f"{case['framework']} {function}", 0.0))
    if dtype == torch.float32:
        tolerance = max(tolerance, 1e-5)
    outputs = ADAPTERS[case["framework"], function](case)
    left_out = case["outputs"].keys() - outputs.keys()
    assert left_out < case["outputs"].keys(), f"none of {list(case['outputs'])} is compared"
    assert left_out <= NOT_COMPARED.keys()
    if dtype == torch.float32:
        left_out |= {NOT_IN_FLOAT32.get((function, case.get("kind", "")), "")}
    for name in case["outputs"].keys() - left_out:
        expected = torch.tensor(case["outputs"][name], dtype=torch.float64)
        got = torch.as_tensor(outputs[name]).detach().double()
        assert got.shape == expected.shape, name
        error = ((got - expected).abs() / (1 + expected.abs()))[counted(case, name, expected)]
        assert not len(error) or error.max() <= tolerance, f"{name}: {error.max():.3g} over {tolerance}"


def test_every_case_is_compared_or_has_a_reason() -> None:
    compared = [case for _, case in CASES if reason_left_out(case) is None]
    assert (len(CASES), len(compared)) == (903, COMPARED)
    assert all((case["framework"], case["function"].split("::")[1]) in ADAPTERS for case in compared)
