"""Report of launch/rlhf.py: one self-contained HTML page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from common.chunks import read_jsonl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from trialign.algorithms.config.rlhf import RLHFConfig, Stages, prompt_files, stages
from trialign.algorithms.metrics import Estimate, mean_of_prompts, wilson, win_rate
from trialign.engine.config import flatten, to_toml
from trialign.engine.logging import read_metrics

from .charts import curves, histogram, tidy
from .panels import INDIGO, PPO_PANELS, REWARD_PANELS, SFT_PANELS, TEAL, Line, Panel

TITLES = {
    "sft": "Fine-tuning",
    "preferences": "Preferences",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluation": "Before and after",
}
LEARNED, TRUE = "learned_reward", "true_reward"
REWARD = Panel(
    "Rewards", "mean over the batch", (Line(LEARNED, INDIGO, "learned"), Line(TRUE, TEAL, "true, not learned from"))
)


class RewardedResponse(NamedTuple):
    """A response to an eval prompt with both rewards."""

    prompt: str
    source: str
    text: str
    learned: float
    true: float
    tokens: int
    ended: bool


class Measure(NamedTuple):
    """A metric before and after."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None


def page(config: RLHFConfig, done: Mapping[str, Any]) -> str:
    """The report of a finished run.

    Args:
        done: stage -> its entry in stages.json.
    """
    root, parts = Path(config.run.folder), stages(config)
    before, after = compared(config, root / "evaluation" / "completions.jsonl")
    metrics = {name: read_metrics(root / name / "metrics.jsonl") for name in ("sft", "reward", "ppo")}
    for step in metrics["ppo"]:
        true = true_reward(config, step, "reward/")
        step |= {LEARNED: step["reward/model"]} | ({} if true is None else {TRUE: true})
    panels = {"sft": SFT_PANELS, "reward": REWARD_PANELS, "ppo": (REWARD, *PPO_PANELS[1:])}
    seconds = [done[name]["seconds"] for name in Stages._fields]
    numbers = lambda name: [[getattr(response, name) for response in side] for side in (before, after)]  # noqa: E731
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    ).get_template("rlhf.html")
    return template.render(
        model=Path(config.model.path).name,
        ended=datetime.fromtimestamp(max(fact["ended"] for fact in done.values()), UTC).strftime(
            "%-d %B %Y, %H:%M UTC"
        ),
        total=duration(sum(seconds)),
        layouts="; ".join(dict.fromkeys(fact["layout"] for fact in done.values())),
        cards=cards(before, after, metrics, root),
        measures=measures(before, after),
        responses=len(before),
        prompts=len({response.source for response in before}),
        histograms=[
            (f"{name.capitalize()} reward", histogram(*numbers(name), name=f"the {name} reward"))
            for name in ("true", "learned")
        ],
        samples=samples(before, after, config.run.show),
        stages=[
            {
                "name": name,
                "title": TITLES[name],
                "seconds": duration(done[name]["seconds"]),
                "share": f"{done[name]['seconds'] / (sum(seconds) or 1):.1%}",
                "steps": done[name]["steps"],
                "data": done[name]["data"] or f"{len(before) + len(after)} responses to eval prompts",
                "panels": [(panel, drawn) for panel in panels.get(name, ()) if (drawn := curves(panel, metrics[name]))],
            }
            for name in Stages._fields
        ],
        counts=counts(config, parts, root),
        pairs=read_jsonl(root / "preferences" / "eval.jsonl")[:4],
        scorer=", ".join(Path(name).name for name in config.preferences.reward.names),
        changed=changed(config),
        toml=to_toml(config),
        seed=config.run.seed,
        versions=versions(),
    )


def compared(config: RLHFConfig, path: Path) -> tuple[list[RewardedResponse], list[RewardedResponse]]:
    """Responses before PPO and after it to the same prompts: those that every reward scores on both sides.

    Raises:
        ValueError: there are none.
    """
    models = stages(config).evaluation.model
    before, after = (responses(path, model, config) for model in (models.baseline, models.path))
    both = {response.source for response in before} & {response.source for response in after}
    if not both:
        raise ValueError(f"{path}: no prompt has responses of both models that every reward scores")
    return [a for a in before if a.source in both], [a for a in after if a.source in both]


def responses(path: Path, model: str, config: RLHFConfig) -> list[RewardedResponse]:
    """A model's responses to the eval prompts, those that both rewards score."""
    learned = stages(config).ppo.reward.models[0]
    rows = [row for row in read_jsonl(path) if Path(row["model"]) == Path(model) and row["reward"] is not None]
    return [
        RewardedResponse(
            row["prompt"],
            f"{row['source']}/{row['sample']}",
            row["completion"],
            row["rewards"][learned],
            true,
            row["tokens"],
            row["finish"] == "stop",
        )
        for row in rows
        if (true := true_reward(config, row["rewards"])) is not None
    ]


def true_reward(config: RLHFConfig, scores: Mapping[str, float | None], prefix: str = "") -> float | None:
    """The weighted sum of the scorers that labeled the preferences, of those that apply; None where none does.

    Args:
        prefix: of the scorers' names where they are metrics, which have the last part of a name only.
    """
    scorer = config.preferences.reward
    weights = scorer.weights or (1.0,) * len(scorer.names)
    names = [f"{prefix}{Path(name).name}" if prefix else name for name in scorer.names]
    known = [(weight, scores.get(name)) for weight, name in zip(weights, names, strict=True)]
    parts = [weight * score for weight, score in known if score is not None]
    return sum(parts) if parts else None


def by_prompt(found: Sequence[RewardedResponse], key: str) -> list[list[float]]:
    """A number of the responses, prompt by prompt, in the order of the prompts."""
    groups: dict[str, list[float]] = {}
    for response in found:
        groups.setdefault(response.source.rpartition("/")[0], []).append(float(getattr(response, key)))
    return list(groups.values())


def measures(before: Sequence[RewardedResponse], after: Sequence[RewardedResponse]) -> list[Measure]:
    """Metrics of the same prompts before and after; a change is measured prompt by prompt."""
    rows = []
    for key, name in (("true", "true reward"), ("learned", "learned reward"), ("tokens", "tokens a response")):
        old, new = by_prompt(before, key), by_prompt(after, key)
        change = mean_of_prompts([fmean(b) - fmean(a) for a, b in zip(old, new, strict=True)])
        first, last = (interval(mean_of_prompts([fmean(own) for own in side])) for side in (old, new))
        rows.append(
            Measure(name, first, last, interval(change, sign=True), None if key == "tokens" else verdict(change, 0))
        )
    first, last = (f"{fmean(response.ended for response in side):.0%}" for side in (before, after))
    rows.append(Measure("ended by themselves", first, last, "", None))
    for key, name in (("true", "won by the true reward"), ("learned", "won by the learned reward")):
        won = win_rate(by_prompt(after, key), by_prompt(before, key))
        span = f"{won.low:.0%} to {won.high:.0%}"
        rows.append(Measure(name, f"{1 - won.value:.0%}", f"{won.value:.0%}", span, verdict(won, 0.5)))
    return rows


def verdict(number: Estimate, even: float) -> bool | None:
    """Better or worse; None where the interval contains `even`."""
    return True if number.low > even else False if number.high < even else None


def interval(number: Estimate, *, sign: bool = False) -> str:
    """A number with half its 95 % interval."""
    form = "+.2f" if sign else ".2f"
    half = (number.high - number.low) / 2
    return f"{number.value:{form}}" + (f" ± {half:.2f}" if half == half else "")


def cards(
    before: Sequence[RewardedResponse],
    after: Sequence[RewardedResponse],
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    root: Path,
) -> list[tuple[str, str, str]]:
    """(name, number, description) of the main results."""
    mean = {key: [fmean(getattr(a, key) for a in side) for side in (before, after)] for key in ("true", "learned")}
    pairs = len(read_jsonl(root / "preferences" / "eval.jsonl"))
    accuracy = wilson([step["eval_accuracy"] for step in metrics["reward"] if "eval_accuracy" in step][-1], pairs)
    return [
        ("True reward", f"{mean['true'][0]:.2f} → {mean['true'][1]:.2f}", "eval prompts, before and after PPO"),
        ("Learned reward", f"{mean['learned'][0]:.2f} → {mean['learned'][1]:.2f}", "optimized by PPO, same responses"),
        (
            "Reward model",
            f"{accuracy.value:.0%}",
            f"of {pairs} eval pairs ranked right; 95 %: {accuracy.low:.0%} to {accuracy.high:.0%}",
        ),
        ("KL", tidy(f"{metrics['ppo'][-1]['kl']:.1f}"), "nats a response from the fine-tuned model, last step"),
    ]


def samples(before: Sequence[RewardedResponse], after: Sequence[RewardedResponse], count: int) -> list[dict[str, Any]]:
    """The first prompts' first responses, before and after."""
    later = {response.source: response for response in after}
    pairs = [(a, later[a.source]) for a in before if a.source.endswith("/0") and a.source in later]
    return [{"prompt": old.prompt, "before": old, "after": new} for old, new in pairs[:count]]


def counts(config: RLHFConfig, parts: Stages, root: Path) -> list[tuple[str, ...]]:
    """(name, train split, eval split)."""
    sides = [len(read_jsonl(Path(path))) for path in prompt_files(config)]
    labeled = json.loads((root / "preferences" / "counts.json").read_text(encoding="utf-8"))
    rows = [("prompts", *map(str, sides))]
    for key, name in (
        ("responses", "responses compared"),
        ("without_score", "of them without a score"),
        ("pairs", "pairs"),
    ):
        rows.append((name, *(str(labeled[side][key]) for side in ("train", "eval"))))
    rows.append(("ties, dropped", *(str(labeled[side]["ties"]) for side in ("train", "eval"))))
    rows.append(("responses PPO learned from", f"{parts.ppo.run.steps * parts.ppo.batch_size:,}", ""))
    return rows


def changed(config: RLHFConfig) -> list[tuple[str, Any, Any]]:
    """(option, value, default) of every option that differs from its default."""
    given, defaults = flatten(config), flatten(RLHFConfig())
    return [(option, value, defaults[option]) for option, value in given.items() if value != defaults[option]]


def versions() -> list[tuple[str, str]]:
    """Versions of the software, and the device."""
    found = [(name, version(name)) for name in ("trialign", "torch", "transformers", "numpy")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return [*found, ("Python", platform.python_version()), ("system", platform.platform()), ("device", device)]


def duration(seconds: float) -> str:
    """Seconds as "12 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
