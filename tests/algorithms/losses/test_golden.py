"""Golden vectors: what OpenRLHF, TRL, verl, NeMo-RL and slime compute, under the overlay of each."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import golden_losses as _losses  # noqa: F401 (registers its adapters)
import golden_moe as _moe  # noqa: F401
import golden_rewards as _rewards  # noqa: F401
import pytest
import torch
from golden import ADAPTERS, Case, cases
from torch import Tensor

MASKS = ("action_mask", "response_mask", "mask", "completion_mask", "token_mask", "loss_mask")

OTHER_LOSSES = {"vespo", "luspo", "sapo"}
OTHER_PAIR_LOSSES = {"aot", "aot_unpaired", "bco_pair", "discopop", "nca_pair", "sppo_hard"}

LEFT_OUT = {
    "Megatron-LM": "not one of the conventions",
    "compute_grpo_passk_outcome_advantage": "pass@k advantages are not among the algorithms",
    "compute_gdpo_outcome_advantage": "GDPO is not among the algorithms",
    "compute_opo_outcome_advantage": "OPO is not among the algorithms",
    "compute_gpg_outcome_advantage": "GPG is not among the algorithms",
    "compute_remax_outcome_advantage": "ReMax is not among the algorithms",
    "compute_optimal_token_baseline_advantage": "optimal token baselines are not among the algorithms",
    "compute_multi_turn_optimal_token_baseline_advantage": "optimal token baselines are not among the algorithms",
    "compute_policy_loss_sapo": "SAPO is not among the algorithms",
    "compute_policy_loss_geo_mean": "GMPO is not among the algorithms",
    "compute_policy_loss_dppo_tv": "DPPO is not among the algorithms",
    "compute_policy_loss_dppo_kl": "DPPO is not among the algorithms",
    "compute_policy_loss_gpg": "GPG is not among the algorithms",
    "compute_policy_loss_dro": "DRO is not among the algorithms",
    "compute_policy_loss_kl_cov": "KL-Cov is not among the algorithms",
    "compute_rollout_rejection_mask": "verl's twelve rejection masks are not among the algorithms",
    "compute_offpolicy_metrics": "metrics, not a convention",
    "compute_policy_loss_bypass_mode": "verl's bypass mode is not among the algorithms",
    "apply_stop_properly_penalty": "ProRL's penalty is not among the algorithms",
    "MixtralForCausalLM": "a whole model: test_families_transformers.py puts Mixtral beside transformers itself",
    "VanillaKTOLoss": "lets the gradient into the reference point, which its own authors took back",
}

# Tolerances beyond the case's own, where the peer's arithmetic is narrower than the case's dtype.
WIDER = {
    "TRL PPOTrainer.train (steps 3-6)": (
        1e-7,
        "TRL's Bessel factor is a quotient of integers, which torch makes float32",
    ),
    "verl compute_grpo_vectorized_outcome_advantage": (
        1e-6,
        "verl adds its epsilon to the variance's float32 count there",
    ),
    "verl compute_grpo_outcome_advantage": (1e-6, "verl divides an answer without siblings by a float32 1 + 1e-6"),
}


def why_left_out(case: Case) -> str | None:
    """The reason a case is not put to ours; None where it is."""
    function, args = case["function"].split("::")[1], case["args"]
    for key in (case["framework"], function):
        if key in LEFT_OUT:
            return LEFT_OUT[key]
    if "error" in case["outputs"]:
        return f"{case['framework']} itself fails here: {case['outputs']['error']}"
    if function == "masked_whiten" and case["framework"] == "TRL" and case["kind"] == "only_one":
        return "TRL gives NaN for a single token; ours is 0"
    if args.get("loss_type") in OTHER_LOSSES or args.get("method") in OTHER_PAIR_LOSSES:
        return f"{args.get('loss_type', args.get('method'))} is not among the algorithms"
    if args.get("loss_type") == "apo_zero_unpaired" or args.get("off_policy_mask_threshold") or args.get("use_opsm"):
        return "sequence masks by KL and APO without pairs are not among the algorithms"
    if args.get("length_adaptive_alpha"):
        return "VAPO's length-adaptive lambda is not among the algorithms"
    if args.get("rollout_is_batch_normalize"):
        return "weights normalized over the batch are verl's alone"
    if args.get("multi_objective_aggregation"):
        return "several rewards are summed before they get here (algorithms/rewards/functions.py)"
    rounded = function == "compute_grpo_vectorized_outcome_advantage" and case["kind"] == "zero_var"
    if case.get("kind") == "noise" or rounded:
        return "float32 rounding of equal rewards, which float64 does not have: there are no digits to match"
    return None


FILES = {
    "advantages": 242, "entropy": 9, "filters": 5, "gae": 84, "kl": 39, "kl_controller": 3, "kto": 15,
    "loss_aggregation": 20, "moe_aux": 15, "offpolicy": 111, "overlong": 15, "policy_loss": 149, "preference": 61,
    "reward_model": 11, "sft_loss": 10, "token_rewards": 25, "value_loss": 46, "whitening": 43,
}  # fmt: skip
"""Cases in each file."""
MET = 741
"""Cases that are put to ours."""


# Outputs that nothing of ours is put beside, by name.
A_METRIC = "a metric of the peer's, which is learned from nowhere"
NOT_COMPARED = {
    **dict.fromkeys(
        (
            "approx_entropy", "gen_kl_error", "is_oob_ratio", "js_divergence_error", "probs_ratio",
            "probs_ratio_clamped", "sampling_importance_ratio", "importance_sampling_ratio", "accuracy",
            "rewards_chosen_mean", "rewards_rejected_mean", "rewards_margins_mean", "chosen_logps_mean",
            "chosen_rewards_mean", "rejected_rewards_mean", "ppo_kl", "vllm_kl", "tis", "tis_clipfrac", "current_kl",
            "non_score_reward",
        ),
        A_METRIC,
    ),
    "kl_penalty": "0 where the case asks for no KL in the loss",
    "sft_loss": "0 where the case asks for no such term",
    "cispo_clip_ratio": "TRL counts among the tokens with a positive advantage",
    "pg_clipfrac_lower": "verl counts dual clips apart, ours all clips together",
    "vf_clipfrac": "TRL makes its own in float32, NeMo-RL's is compared",
    "value_clipfrac": "slime counts values beyond the clip, ours those where the clip decided",
    "token_reward_sum": "OpenRLHF's sum has the KL of tokens that do not count",
    "padding_mask": "how TRL says which tokens count",
    "padding_mask_p1": "how TRL says which tokens count",
    **dict.fromkeys(
        ("grad_gate_logits_0", "grad_gate_logits_1", "grad_gate_logits_2"),
        "of several layers, pooled before the product: a number that we log, not what we learn from",
    ),
}  # fmt: skip

# (function, kind) -> outputs that float32 cannot hold, and why.
NOT_IN_FLOAT32 = {
    ("calculate_kl", "huge"): ("grad_logprobs", "k3's is 1 - e^34 + e^34 there, which float32 rounds to nothing"),
}


CASES = list(cases())
PUT = [pytest.param(case, id=name) for name, case in CASES if why_left_out(case) is None]


def counted(case: Case, name: str, theirs: Tensor) -> Tensor:
    """Which entries of an output are said: those of tokens that count, and every gradient."""
    mask = next((m for m in MASKS if m in case["inputs"]), None)
    if mask is not None and not name.startswith("grad"):
        here = torch.tensor(case["inputs"][mask]) > 0
        if here.shape == theirs.shape:
            return here
    return torch.ones_like(theirs, dtype=torch.bool)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("case", PUT)
def test_golden(case: Case, dtype: torch.dtype) -> None:
    case, function = dict(case), case["function"].split("::")[1]
    tolerance = max(case["tol"], WIDER.get(f"{case['framework']} {function}", (0.0,))[0])
    if dtype == torch.float32:
        tolerance = max(tolerance, 1e-5)
    ours = ADAPTERS[case["framework"], function](case)
    left = {name for name in case["outputs"] if name not in ours}
    assert left < case["outputs"].keys(), f"nothing of {list(case['outputs'])} is compared"
    for name in sorted(left):
        assert name in NOT_COMPARED, f"{name} is not compared, and no reason is said"
    rounded = NOT_IN_FLOAT32.get((function, case.get("kind", "")), ("",))[0] if dtype == torch.float32 else ""
    for name in case["outputs"].keys() - left - {rounded}:
        theirs = torch.tensor(case["outputs"][name], dtype=torch.float64)
        mine = torch.as_tensor(ours[name]).detach().double()
        assert mine.shape == theirs.shape, name
        error = ((mine - theirs).abs() / (1 + theirs.abs()))[counted(case, name, theirs)]
        assert not len(error) or error.max() <= tolerance, f"{name}: {error.max():.3g} over {tolerance}"


def test_every_case_is_met_or_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is dropped unseen, in tests/golden or in a folder that TRIALIGN_GOLDEN names."""
    monkeypatch.delenv("TRIALIGN_GOLDEN", raising=False)
    shutil.copytree(Path(__file__).resolve().parents[2] / "golden", tmp_path / "copy")
    shipped = list(cases())
    monkeypatch.setenv("TRIALIGN_GOLDEN", str(tmp_path / "copy"))
    assert [name for name, _ in cases()] == [name for name, _ in shipped]
    assert dict(Counter(name.split("[")[0] for name, _ in shipped)) == FILES
    met = [case for _, case in shipped if why_left_out(case) is None]
    assert (len(shipped), len(met)) == (903, MET)
    assert all((case["framework"], case["function"].split("::")[1]) in ADAPTERS for case in met)
