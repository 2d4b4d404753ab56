"""Panels of each script's plot: the metrics it shows over the steps."""

from __future__ import annotations

from typing import NamedTuple

TEAL, RED, INDIGO, AMBER, GRAY = "#0f766e", "#be123c", "#4338ca", "#b45309", "#475569"


class Line(NamedTuple):
    """One metric in a panel."""

    metric: str
    color: str
    label: str = ""  # where a panel has several
    exact: bool = False  # drawn without smoothing: no noise, or too few points


class Panel(NamedTuple):
    """One plot over the steps."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def train_and_eval(title: str, unit: str, metric: str) -> Panel:
    """A panel of a metric of the training batches and of the eval split."""
    return Panel(title, unit, (Line(metric, TEAL, "training"), Line(f"eval_{metric}", RED, "eval", exact=True)))


def chosen_and_rejected(title: str, unit: str, chosen: str = "chosen", rejected: str = "rejected") -> Panel:
    """A panel of the metrics chosen and rejected under these labels."""
    return Panel(title, unit, (Line("chosen", INDIGO, chosen), Line("rejected", AMBER, rejected)))


ENTROPY = Panel("Entropy", "nats a token", (Line("entropy", INDIGO),))
GRAD_NORM = Panel("Gradient norm", "before clipping", (Line("grad_norm", GRAY),))
POLICY = (
    Panel("Reward", "mean over the batch", (Line("reward", TEAL),)),
    Panel("KL to the reference", "nats a response", (Line("kl", AMBER),)),
    ENTROPY,
)
PPO_PANELS = (*POLICY, Panel("Value loss", "half squared error, clipped", (Line("value_loss", RED),)))
GRPO_PANELS = (*POLICY, Panel("Groups with a spread of rewards", "fraction", (Line("groups_with_spread", RED),)))
SFT_PANELS = (
    train_and_eval("Loss", "nats a target token", "loss"),
    ENTROPY,
    GRAD_NORM,
    Panel("Learning rate", "of the step", (Line("lr", GRAY, exact=True),)),
)
PRETRAIN_PANELS = (
    train_and_eval("Loss", "nats a token", "loss"),
    Panel("Perplexity", "eval split", (Line("eval_perplexity", RED, exact=True),)),
    ENTROPY,
    GRAD_NORM,
)
REWARD_PANELS = (
    train_and_eval("Loss", "nats a pair", "loss"),
    train_and_eval("Accuracy", "fraction", "accuracy"),
    chosen_and_rejected("Scores", "mean"),
    Panel("Calibration error", "eval split", (Line("eval_calibration", GRAY, exact=True),)),
)
DPO_PANELS = (
    train_and_eval("Loss", "a pair", "loss"),
    train_and_eval("Implicit-reward accuracy", "fraction", "accuracy"),
    chosen_and_rejected("Implicit reward", "β log-ratio"),
    GRAD_NORM,
)
KTO_PANELS = (
    Panel("Loss", "a response", (Line("loss", TEAL),)),
    Panel("Eval accuracy", "wanted above unwanted", (Line("eval_accuracy", RED, exact=True),)),
    chosen_and_rejected("Implicit reward", "β log-ratio", "wanted", "unwanted"),
    Panel("KL reference point", "nats a response", (Line("kl", GRAY),)),
)
REJECTION_PANELS = (
    Panel(
        "Reward",
        "mean over a round's responses",
        (Line("reward", TEAL, "all", exact=True), Line("reward_picked", INDIGO, "the best", exact=True)),
    ),
    Panel("Loss", "of the step", (Line("loss", RED),)),
    Panel("Responses", "tokens", (Line("response_length", AMBER, exact=True),)),
    GRAD_NORM,
)
