"""Training tokens per second beside TRL: SFT, reward models, DPO, KTO and GRPO, on the same rows, taking turns.

    python benchmarks/bench_preference.py --algorithm dpo --model DIR
    python benchmarks/bench_preference.py --algorithm sft --model DIR --data rows.jsonl.gz --prompt-key question \
--response-key answer

TRL runs in a process with an environment of its own, installed by `make trl`. Both sides take the same token ids in the
same batches, in bf16, with AdamW, and time whole steps, packing or padding included; the reference's log-probabilities
are computed before. Tokens are those of the rows, prompts included and padding excluded, each counted once a step; for
GRPO those of prompts and responses, all of one length. TRL uses its fastest settings, each tried before the turns
(benchmarks/trl_side.py). The first turn of each side is a warm-up. The last line is one JSON object; `ratio` is the
median tokens/s of trialign over that of TRL, `cpu_ratio` the same by processor time, which is more reliable on a busy
machine.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from peer import Peer
from preference import SIDES, Side, Task
from ranks import refuse_ranks

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bench(Task):
    """Task and number of turns."""

    turns: int = 4
    """timed turns of each side, after one warm-up"""
    trl: str = os.environ.get("TRIALIGN_TRL_PYTHON", str(ROOT / ".venv-trl" / "bin" / "python"))
    """Python interpreter of TRL's environment; "" leaves TRL out"""
    settings: str = ""
    """TRL's settings as JSON, as in the last line of a run ("": try all, use the fastest)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 1:
            raise ValueError(f"turns={self.turns}: must be at least 1")
        if self.trl and not Path(self.trl).is_file():
            raise ValueError(f"trl={self.trl}: no such file; install it by `make trl`, or leave TRL out by --trl ''")


class Times(NamedTuple):
    """Tokens a second of one side's turns, by wall time and by processor time."""

    rates: list[float]
    cpu_rates: list[float]

    def add(self, tokens: int, seconds: float, cpu_seconds: float) -> None:
        """Appends a turn."""
        self.rates.append(tokens / seconds)
        self.cpu_rates.append(tokens / cpu_seconds)

    def median(self, name: Literal["rates", "cpu_rates"]) -> float:
        """Median of all turns but the warm-up."""
        return statistics.median(getattr(self, name)[1:])


def main(bench: Bench) -> None:
    refuse_ranks("bench_preference.py")
    with tempfile.TemporaryDirectory() as folder:
        side = SIDES[bench.algorithm](bench, (bench.turns + 1) * bench.steps, Path(folder))
        report = run(bench, side, Path(folder))
    print(json.dumps(report))


def run(bench: Bench, side: Side, folder: Path) -> dict[str, Any]:
    """Runs and prints the turns, and returns the report."""
    job = asdict(bench) | {"rows": side.rows, "threads": torch.get_num_threads(), "folder": str(folder)}
    job |= {"settings": json.loads(bench.settings) if bench.settings else None}
    trl = Peer(bench.trl, Path(__file__).with_name("trl_side.py"), job, folder) if bench.trl else None
    own, peer = Times([], []), Times([], [])
    try:
        chosen = trl.read() if trl else {}
        while trl and "versions" not in chosen:
            print(f"TRL with {json.dumps(chosen['settings'])}: {chosen['seconds']:.2f} s a step", flush=True)
            chosen = trl.read()
        for turn in range(bench.turns + 1):
            numbers = range(turn * bench.steps, (turn + 1) * bench.steps)
            tokens = sum(side.tokens[number] for number in numbers)
            start, cpu = time.perf_counter(), time.process_time()
            for number in numbers:
                side.step(number)
            own.add(tokens, time.perf_counter() - start, time.process_time() - cpu)
            line = f"turn {turn}  {tokens} tokens  trialign {own.rates[-1]:7.1f} tokens/s"
            if trl:
                result = trl.turn()
                if result["tokens"] != tokens:
                    raise ValueError(f"TRL trained on {result['tokens']} tokens in turn {turn}, trialign on {tokens}")
                peer.add(tokens, result["seconds"], result["cpu_seconds"])
                line += f"  TRL {peer.rates[-1]:7.1f} tokens/s"
            print(line + ("" if turn else "  (warm-up)"), flush=True)
    finally:
        side.close()
        if trl:
            trl.close()
    report: dict[str, Any] = {"algorithm": bench.algorithm, "tokens_per_s": round(own.median("rates"), 1)}
    if trl:
        report |= {"trl_tokens_per_s": round(peer.median("rates"), 1)}
        report |= {"ratio": round(own.median("rates") / peer.median("rates"), 3)}
        report |= {"cpu_ratio": round(own.median("cpu_rates") / peer.median("cpu_rates"), 3)}
        report |= {"trl": chosen["versions"], "settings": chosen["settings"]}
    return report | {"batch": bench.batch, "steps": bench.steps, "turns": bench.turns, "threads": job["threads"]}


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
