"""The report of launch/rlhf.py: one HTML page that needs nothing but itself."""

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
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from trialign.algorithms.config.rlhf import RLHFConfig, Stages, prompt_files, stages
from trialign.algorithms.metrics import Estimate, mean_of_prompts, wilson, win_rate
from trialign.engine.config import flatten, to_toml
from trialign.engine.logging import read_metrics

from .charts import curves, histogram, tidy
from .panels import PPO_PANELS, REWARD_PANELS, SFT_PANELS, Line, Panel

TITLES = {
    "sft": "Fine-tuning",
    "preferences": "Preferences",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluation": "Before and after",
}
LEARNED, TRUE = "learned_reward", "true_reward"
REWARD = Panel(
    "Rewards",
    "mean over the batch",
    (Line(LEARNED, "#4338ca", "learned"), Line(TRUE, "#0f766e", "true, not learned from")),
)


class Answered(NamedTuple):
    """A held-out prompt's answer with what both rewards say of it."""

    prompt: str
    source: str
    text: str
    learned: float
    true: float
    tokens: int
    ended: bool


class Row(NamedTuple):
    """A measure before and after."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None


def page(config: RLHFConfig, done: Mapping[str, Any]) -> str:
    """The report of a finished run.

    Args:
        done: stage -> what stages.json says of it.
    """
    root, parts = Path(config.run.folder), stages(config)
    before, after = compared(config, root / "evaluation" / "completions.jsonl")
    metrics = {name: read_metrics(root / name / "metrics.jsonl") for name in ("sft", "reward", "ppo")}
    for step in metrics["ppo"]:
        true = true_reward(config, step, "reward/")
        step |= {LEARNED: step["reward/model"]} | ({} if true is None else {TRUE: true})
    panels = {"sft": SFT_PANELS, "reward": REWARD_PANELS, "ppo": (REWARD, *PPO_PANELS[1:])}
    seconds = [done[name]["seconds"] for name in Stages._fields]
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
        answers=len(before),
        prompts=len({answer.source for answer in before}),
        histograms=[
            ("True reward", histogram([a.true for a in before], [a.true for a in after], "the true reward")),
            (
                "Learned reward",
                histogram([a.learned for a in before], [a.learned for a in after], "the learned reward"),
            ),
        ],
        samples=samples(before, after, config.run.show),
        stages=[
            {
                "name": name,
                "title": TITLES[name],
                "seconds": duration(done[name]["seconds"]),
                "share": f"{done[name]['seconds'] / (sum(seconds) or 1):.1%}",
                "steps": done[name]["steps"],
                "data": done[name]["data"] or f"{len(before) + len(after)} answers to held-out prompts",
                "panels": [
                    (panel, curves(panel, metrics[name]))
                    for panel in panels.get(name, ())
                    if curves(panel, metrics[name])
                ],
            }
            for name in Stages._fields
        ],
        counts=counts(config, parts, root),
        pairs=read_lines(root / "preferences" / "held_out.jsonl")[:4],
        scorer=", ".join(Path(name).name for name in config.preferences.reward.names),
        changed=changed(config),
        toml=to_toml(config),
        seed=config.run.seed,
        versions=versions(),
    )


def compared(config: RLHFConfig, path: Path) -> tuple[list[Answered], list[Answered]]:
    """The answers before PPO and after it to the same prompts: those that every reward has a score for on both sides.

    Raises:
        ValueError: there are none.
    """
    models = stages(config).evaluation.model
    before, after = (answers(path, model, config) for model in (models.against, models.path))
    both = {answer.source for answer in before} & {answer.source for answer in after}
    if not both:
        raise ValueError(f"{path}: no prompt has answers of both models that every reward has a score for")
    return [a for a in before if a.source in both], [a for a in after if a.source in both]


def answers(path: Path, model: str, config: RLHFConfig) -> list[Answered]:
    """A model's answers to the held-out prompts, those that both rewards have a score for."""
    learned = stages(config).ppo.reward.models[0]
    rows = [row for row in read_lines(path) if Path(row["model"]) == Path(model) and row["reward"] is not None]
    return [
        Answered(
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


def by_prompt(found: Sequence[Answered], key: str) -> list[list[float]]:
    """A number of the answers, prompt by prompt, in the order of the prompts."""
    groups: dict[str, list[float]] = {}
    for answer in found:
        groups.setdefault(answer.source.rpartition("/")[0], []).append(float(getattr(answer, key)))
    return list(groups.values())


def measures(before: Sequence[Answered], after: Sequence[Answered]) -> list[Row]:
    """What changed over the same prompts; a change is measured prompt by prompt."""
    rows = []
    for key, name in (("true", "true reward"), ("learned", "learned reward"), ("tokens", "tokens an answer")):
        old, new = by_prompt(before, key), by_prompt(after, key)
        change = mean_of_prompts([fmean(b) - fmean(a) for a, b in zip(old, new, strict=True)])
        first, last = (interval(mean_of_prompts([fmean(own) for own in side])) for side in (old, new))
        rows.append(
            Row(name, first, last, interval(change, sign=True), None if key == "tokens" else verdict(change, 0))
        )
    first, last = (f"{fmean(answer.ended for answer in side):.0%}" for side in (before, after))
    rows.append(Row("ended by themselves", first, last, "", None))
    for key, name in (("true", "won by the true reward"), ("learned", "won by the learned reward")):
        won = win_rate(by_prompt(after, key), by_prompt(before, key))
        span = f"{won.low:.0%} to {won.high:.0%}"
        rows.append(Row(name, f"{1 - won.value:.0%}", f"{won.value:.0%}", span, verdict(won, 0.5)))
    return rows


def verdict(number: Estimate, even: float) -> bool | None:
    """Better or worse, or None where the interval holds what would be neither."""
    return True if number.low > even else False if number.high < even else None


def interval(number: Estimate, *, sign: bool = False) -> str:
    """A number with half its 95 % interval."""
    form = "+.2f" if sign else ".2f"
    half = (number.high - number.low) / 2
    return f"{number.value:{form}}" + (f" ± {half:.2f}" if half == half else "")


def cards(
    before: Sequence[Answered],
    after: Sequence[Answered],
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    root: Path,
) -> list[tuple[str, str, str]]:
    """(name, number, what it is) of what matters most."""
    mean = {key: [fmean(getattr(a, key) for a in side) for side in (before, after)] for key in ("true", "learned")}
    held_out = len(read_lines(root / "preferences" / "held_out.jsonl"))
    accuracy = wilson([step["eval_accuracy"] for step in metrics["reward"] if "eval_accuracy" in step][-1], held_out)
    return [
        ("True reward", f"{mean['true'][0]:.2f} → {mean['true'][1]:.2f}", "held-out prompts, before and after PPO"),
        ("Learned reward", f"{mean['learned'][0]:.2f} → {mean['learned'][1]:.2f}", "what PPO optimized, same answers"),
        (
            "Reward model",
            f"{accuracy.value:.0%}",
            f"of {held_out} held-out pairs ranked right; 95 %: {accuracy.low:.0%} to {accuracy.high:.0%}",
        ),
        ("KL", tidy(f"{metrics['ppo'][-1]['kl']:.1f}"), "nats an answer from the fine-tuned model, last step"),
    ]


def samples(before: Sequence[Answered], after: Sequence[Answered], count: int) -> list[dict[str, Any]]:
    """The first prompts' first answers, before and after."""
    later = {answer.source: answer for answer in after}
    pairs = [(a, later[a.source]) for a in before if a.source.endswith("/0") and a.source in later]
    return [{"prompt": old.prompt, "before": old, "after": new} for old, new in pairs[:count]]


def counts(config: RLHFConfig, parts: Stages, root: Path) -> list[tuple[str, ...]]:
    """(what, to learn from, held out)."""
    sides = [len(read_lines(Path(path))) for path in prompt_files(config)]
    labeled = json.loads((root / "preferences" / "counts.json").read_text(encoding="utf-8"))
    rows = [("prompts", *map(str, sides))]
    for key, name in (
        ("answers", "answers compared"),
        ("without_score", "of them without a score"),
        ("pairs", "pairs"),
    ):
        rows.append((name, *(str(labeled[side][key]) for side in ("train", "held_out"))))
    rows.append(("ties, dropped", *(str(labeled[side]["ties"]) for side in ("train", "held_out"))))
    rows.append(("answers PPO learned from", f"{parts.ppo.run.steps * parts.ppo.batch_size:,}", ""))
    return rows


def changed(config: RLHFConfig) -> list[tuple[str, Any, Any]]:
    """(knob, value, default) of every knob that has another value than its default."""
    ours, defaults = flatten(config), flatten(RLHFConfig())
    return [(knob, value, defaults[knob]) for knob, value in ours.items() if value != defaults[knob]]


def versions() -> list[tuple[str, str]]:
    """What the run ran on."""
    found = [(name, version(name)) for name in ("trialign", "torch", "transformers", "numpy")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return [*found, ("Python", platform.python_version()), ("system", platform.platform()), ("device", device)]


def duration(seconds: float) -> str:
    """As 12 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
