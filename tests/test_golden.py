"""Golden vectors: what OpenRLHF, TRL, verl, NeMo-RL and slime compute themselves, met under the preset of each."""

from __future__ import annotations

import golden_losses as _losses  # noqa: F401 (registers its adapters)
import golden_rewards as _rewards  # noqa: F401
import pytest
import torch
from golden import ADAPTERS, Case, cases
from torch import Tensor

MASKS = ("action_mask", "response_mask", "mask", "completion_mask", "token_mask", "loss_mask")

OTHER_LOSSES = {"vespo", "luspo", "sapo"}
OTHER_PAIR_LOSSES = {
    "aot", "aot_unpaired", "bco_pair", "discopop", "nca_pair", "sft", "sigmoid_norm", "sppo_hard"
}  # fmt: skip

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
    "VanillaKTOLoss": "lets the gradient into the reference point, which its own authors took back",
}

# Tolerances beyond the case's own, where the peer's arithmetic is narrower than the case's dtype.
WIDER = {
    "PPOTrainer.train (steps 3-6)": (1e-7, "TRL's Bessel factor is a quotient of integers, which torch makes float32"),
    "compute_grpo_vectorized_outcome_advantage": (1e-6, "verl adds its epsilon to the variance's float32 count there"),
    "compute_grpo_outcome_advantage": (1e-6, "verl divides an answer without siblings by a float32 1 + 1e-6"),
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
        return "weights normalised over the batch are verl's alone"
    if args.get("multi_objective_aggregation"):
        return "several rewards are summed before they get here (algorithms/rewards.py)"
    rounded = function == "compute_grpo_vectorized_outcome_advantage" and case["kind"] == "zero_var"
    if case.get("kind") == "noise" or rounded:
        return "float32 rounding of equal rewards, which float64 does not have: there are no digits to match"
    return None


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


@pytest.mark.parametrize("case", PUT)
def test_golden(case: Case) -> None:
    function = case["function"].split("::")[1]
    ours = ADAPTERS[case["framework"], function](case)
    tolerance = max(case["tol"], WIDER.get(function, (0.0,))[0])
    met = set()
    for name in ours.keys() & case["outputs"].keys():
        theirs = torch.tensor(case["outputs"][name], dtype=torch.float64)
        mine = torch.as_tensor(ours[name]).detach().double()
        assert mine.shape == theirs.shape, name
        error = ((mine - theirs).abs() / (1 + theirs.abs()))[counted(case, name, theirs)]
        assert not len(error) or error.max() <= tolerance, f"{name}: {error.max():.3g} over {tolerance}"
        met.add(name)
    assert met, f"nothing of {list(case['outputs'])} is compared"


def test_most_cases_are_met() -> None:
    """The shipped vectors are all there, and no case is dropped without a reason."""
    assert len(CASES) == 888
    assert len(PUT) >= 650
    assert all(
        why_left_out(case) for _, case in CASES if (case["framework"], case["function"].split("::")[1]) not in ADAPTERS
    )
