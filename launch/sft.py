"""Fine-tunes a language model on what the assistant says in dialogues, on any number of ranks.

python launch/sft.py --config launch/configs/sft_smollm2.toml
torchrun --nproc-per-node 8 launch/sft.py --config my.toml --parallel.tp 2 --parallel.pp 2 --optimizer.lr 2e-5
torchrun ... launch/sft.py --resume runs/sft
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys

from common.run import Run, start
from common.supervised import SupervisedRun, supervised_run
from report.curves import SFT_PANELS, answer_table, response_text
from trialign.algorithms.batch import response_texts
from trialign.algorithms.config.sft import SFTConfig, check
from trialign.algorithms.data.dialogues import DialogueDataset, joined, pack_samples
from trialign.algorithms.rollout.sync import sample
from trialign.algorithms.sft import held_out_loss, sft_step
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams

FACTS = {"loss": "loss {:.4f}", "eval_loss": "held out {:.4f}", "epoch": "epoch {:.2f}"}


def main(run: Run[SFTConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and a table of answers in the run's folder."""
    config, mesh = run.config, run.mesh
    work = supervised_run(
        run, config.data, lambda tokenizer, ends: DialogueDataset(config.data, tokenizer, ends, config.run.seed)
    )
    learner, data = work.learner, work.rows
    unseen = pack_samples(joined(data.held_out)).to(mesh.device) if data.held_out else None
    measure = lambda batch: {"eval_loss": held_out_loss(learner, batch)}  # noqa: E731
    work.begin(facts=FACTS)
    before = run.remember("before.json", lambda: answers(work))

    work.held_out_before(unseen, measure)
    for _ in run.steps():
        batch = pack_samples(joined(data.next(config.update.batch_size))).to(mesh.device)
        metrics = work.epoch()

        with run.phases("update") as phase:
            metrics |= sft_step(learner, batch)
            work.count(phase, batch, passes=3)

        metrics |= work.held_out(unseen, measure)
        run.end_step(metrics, tokens=len(batch.tokens))

    after = answers(work)
    run.finish(SFT_PANELS, *([answer_table(before, after)] if after else []))


def answers(work: SupervisedRun[DialogueDataset]) -> list[list[str]]:
    """[prompt, wanted answer, the model's greedy answer] of the first `run.show` rows. Collective."""
    run, model, mesh = work.run.config.run, work.learner.model, work.run.mesh
    longest = work.shape.longest_rollout
    prompts = [row for row in work.rows.prompts(run.show) if len(row[0].tokens) < longest]
    if not prompts:
        return []
    room = longest - max(len(prompt.tokens) for prompt, _ in prompts)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=min(run.show_tokens, room), stop_ids=work.ends)
    with work.run.progress.work("answers"):
        rollouts = sample(EmbeddedGenerator(model, mesh, max_running=len(prompts)), [p for p, _ in prompts], greedy)
    texts = response_texts(rollouts, work.tokenizer)
    texts = [response_text(text, rollout.finish) for text, rollout in zip(texts, rollouts, strict=True)]
    wanted = work.tokenizer.batch_decode([answer for _, answer in prompts], skip_special_tokens=True)
    return [list(row) for row in zip((prompt.text for prompt, _ in prompts), wanted, texts, strict=True)]


if __name__ == "__main__":
    start(SFTConfig, check, main, "sft", sys.argv[1:])
