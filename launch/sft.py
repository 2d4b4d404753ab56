"""Fine-tunes a language model on what the assistant says in dialogues, on any number of ranks.

python launch/sft.py --config launch/configs/sft_smollm2.toml
torchrun --nproc-per-node 8 launch/sft.py --config my.toml --parallel.tp 2 --parallel.pp 2 --optimizer.lr 2e-5
torchrun ... launch/sft.py --resume runs/sft
"""

from __future__ import annotations

import sys

from report import SFT_PANELS, answer_table
from session import Session, start
from trialign.algorithms.build import build_decoder, build_learner, load_tokenizer, read_shape
from trialign.algorithms.dialogue import DialogueDataset, pack_samples
from trialign.algorithms.rollout import sample
from trialign.algorithms.sft import held_out_loss, plan, sft_step
from trialign.algorithms.sft_config import SFTConfig, check
from trialign.engine.phases import forward_flops
from trialign.engine.rollout.generate import Generator, SamplingParams
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.hf import stop_ids

FACTS = {"loss": "loss {:.4f}", "eval_loss": "held out {:.4f}", "epoch": "epoch {:.2f}"}


def main(session: Session[SFTConfig]) -> None:
    """Sets up, trains, and leaves the exported model, the plot and a table of answers in the run's folder."""
    config, mesh, folder = session.config, session.mesh, session.config.model.path
    shape = session.together(lambda: read_model(config))
    tokenizer = session.together(lambda: load_tokenizer(folder, shape))
    ends = stop_ids(folder, shape)
    data = session.together(lambda: DialogueDataset(config.data, tokenizer, ends, config.run.seed))
    steps = config.run.total(len(data), config.update.batch_size)

    def build() -> Decoder:
        options = {"recompute": config.parallel.recompute, "lora": config.lora, "seed": config.run.seed}
        return build_decoder(folder, shape, mesh, config.model.dtype, trained=True, **options)

    model = session.together(build)
    learner = build_learner(model, config.optimizer, steps, ema_decay=config.update.ema_decay)
    held_out = pack_samples(data.held_out).to(mesh.device) if data.held_out else None
    session.begin({"actor": (learner, folder)}, {"data": data}, steps, about=str(data), facts=FACTS)
    before = session.remember("before.json", lambda: answers(session, model, data, tokenizer, ends))

    for step in session.steps():
        batch = pack_samples(data.next(config.update.batch_size)).to(mesh.device)
        metrics = {"epoch": (step + 1) * config.update.batch_size / len(data)}

        if held_out and step % (config.run.eval_every or steps) == 0:  # of the weights before the step, as its loss is
            with session.phases("eval") as phase:
                metrics["eval_loss"] = held_out_loss(learner, held_out, config.update)
                phase.tokens = len(held_out.tokens)
                phase.flops = forward_flops(shape, held_out.lengths, len(held_out.response))

        with session.phases("update") as phase:
            metrics |= sft_step(learner, batch, plan(batch, config.update, mesh))
            phase.tokens = len(batch.tokens)
            phase.flops = 3 * forward_flops(shape, batch.lengths, len(batch.response))

        session.end_step(metrics, tokens=len(batch.tokens))

    if held_out:
        loss = held_out_loss(learner, held_out, config.update)
        session.log(steps, {"eval_loss": loss})
        session.progress.say(f"held-out loss after {steps} steps: {loss:.4f}")
    after = answers(session, model, data, tokenizer, ends)
    session.finish(SFT_PANELS, *([answer_table(before, after)] if after else []))


def read_model(config: SFTConfig) -> ModelConfig:
    """The model's shape, with room for the longest row."""
    shape = read_shape(config.model.path, config.parallel, config.run, "lm", config.lora)
    if config.data.max_tokens > shape.max_positions:
        raise ValueError(
            f"data.max_tokens={config.data.max_tokens}: {config.model.path} has positions for {shape.max_positions}"
        )
    return shape


def answers(session: Session[SFTConfig], model: Decoder, data: DialogueDataset, tokenizer, ends) -> list[list[str]]:
    """[prompt, wanted answer, the model's greedy answer] of the first `run.show` rows. Collective."""
    run = session.config.run
    prompts = data.prompts(run.show)
    if not prompts:
        return []
    room = model.config.max_positions - max(len(prompt.tokens) for prompt, _ in prompts)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=min(run.show_tokens, room), stop_ids=tuple(ends))
    rollouts = sample(Generator(model, session.mesh, max_running=len(prompts)), [p for p, _ in prompts], greedy)
    texts = tokenizer.batch_decode([rollout.tokens for rollout in rollouts], skip_special_tokens=True)
    wanted = tokenizer.batch_decode([answer for _, answer in prompts], skip_special_tokens=True)
    return [list(row) for row in zip((prompt.text for prompt, _ in prompts), wanted, texts, strict=True)]


if __name__ == "__main__":
    start(SFTConfig, check, main, "sft", sys.argv[1:])
