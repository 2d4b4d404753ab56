"""The first steps of launch/ppo.py on given rollouts, so that two devices can be compared step by step.

    python benchmarks/ppo_steps.py 3 ROLLOUTS --config launch/configs/ppo_smollm2.toml --run.output DIR

Arguments after ROLLOUTS are those of launch/ppo.py; there is no table, checkpoint or export. The first run writes its
rollouts to the file ROLLOUTS. A run that finds the file samples too, then trains on the responses in the file: one
token that differs would make everything after it differ. DIR/metrics.jsonl has a line for each step, DIR/sampled.json
the fraction of each step's responses that are those of the file.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

import common.interrupts  # noqa: F401  # isort: skip  (before torch is imported)
import ppo
from common.run import Run, start
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.rollout.source import Rollouts, RolloutSource

STEPS, ROLLOUTS = int(sys.argv[1]), Path(sys.argv[2])


class GivenRollouts(RolloutSource):
    """The steps' rollouts in ROLLOUTS; without the file those of `source`, which `write` puts there."""

    def __init__(self, source: RolloutSource):
        self.source, self.sampled, self.same = source, [], []
        self.given: list[Rollouts] = pickle.loads(ROLLOUTS.read_bytes()) if ROLLOUTS.exists() else []

    def next(self, step: int) -> Rollouts:
        sampled = self.source.next(step)
        self.sampled.append(sampled)
        if not self.given:
            return sampled
        pairs = list(zip(sampled.samples, self.given[step].samples, strict=True))
        self.same.append(sum(own.tokens == other.tokens for own, other in pairs) / len(pairs))
        return self.given[step]

    def write(self, folder: Path) -> None:
        if self.given:
            (folder / "sampled.json").write_text(json.dumps(self.same))
        else:
            ROLLOUTS.write_bytes(pickle.dumps(self.sampled))


class FirstSteps(ppo.PPORun):
    """A run that ends after so many steps; its schedules are those of the whole run."""

    def steps(self) -> Iterator[int]:
        return islice(super().steps(), STEPS)


def main(run: Run[PPOConfig]) -> None:
    first = FirstSteps(run)
    first.begin(run.config.run.steps)
    first.rollouts = given = GivenRollouts(first.rollouts)
    ppo.train(first)
    given.write(run.folder)


if __name__ == "__main__":
    start(PPOConfig, main, "ppo", sys.argv[3:])
