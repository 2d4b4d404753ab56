"""Shows the first rows of a run as the model reads them: tokens, those that are learned, dropped rows.

python launch/show_data.py --config launch/configs/sft_smollm2.toml
python launch/show_data.py --script dpo --config my.toml --rows 5 --data.max_tokens 512

--script names the config's script; without it the file's name does (sft_*.toml), or its sections. Options of that
script may follow. Learned tokens are green and bold or, without colors, between ⟦ and ⟧.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from trialign.algorithms.config.conditional import ConditionalConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.evaluate import EvaluateConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.preference import DPOConfig, KTOConfig, RewardModelConfig
from trialign.algorithms.config.pretrain import PretrainConfig, TextData
from trialign.algorithms.config.rlhf import RLHFConfig
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.algorithms.config.sft import SFTConfig, SFTData
from trialign.algorithms.data.conditional import ConditionedRows, read_rewarded
from trialign.algorithms.data.dialogues import DialogueDataset, Encoder, Sample, joined
from trialign.algorithms.data.documents import TextDataset, TextStream
from trialign.algorithms.data.preferences import LabeledStream, PairStream, read_steps
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.data.streams import RowStream
from trialign.algorithms.roles.build import load_tokenizer
from trialign.engine.config import load, parse
from trialign.models.families.registry import read_config
from trialign.models.hf.tokenizer import stop_ids


class Shown(NamedTuple):
    """A sample as the model reads it."""

    title: str
    tokens: Sequence[int]
    mask: Sequence[int]  # 1 where a token is a target


class Part(NamedTuple):
    """One kind of rows that a run reads."""

    about: str  # the stream, its size and dropped rows
    rows: list[Shown]


def of_sample(sample: Sample, side: str = "") -> Shown:
    """A tokenized row."""
    return Shown(f"{sample.where}{side and ', '}{side}", sample.tokens, sample.mask)


def dialogues(data: SFTData, seed: int, tokenizer: Any, ends: Sequence[int], count: int) -> Part:
    """Dialogues."""
    rows = DialogueDataset(data, tokenizer, ends, seed)
    return Part(str(rows), [of_sample(sample) for sample in joined(rows.next(count))])


def text(data: TextData, seed: int, tokenizer: Any, count: int) -> Part:
    """Rows of packed documents, piece by piece: attention stays within a piece."""
    stream = TextStream(data, tokenizer, seed)
    rows = enumerate(stream.next(count), 1)
    pieces = [(f"row {number}: {piece.where}", piece.tokens) for number, row in rows for piece in row]
    return Part(str(stream), [Shown(title, tokens, [0] + [1] * (len(tokens) - 1)) for title, tokens in pieces])


def prompt_rows(data: PromptData, seed: int, tokenizer: Any, count: int) -> Part:
    """Prompts, none of whose tokens is learned."""
    rows = PromptDataset(data, tokenizer, seed)
    return Part(str(rows), [Shown(p.source, p.tokens, [0] * len(p.tokens)) for p in rows.next(count)])


def sft(config: SFTConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Dialogues."""
    return [dialogues(config.data, config.run.seed, tokenizer, ends, count)]


def pretrain(config: PretrainConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Text."""
    return [text(config.data, config.run.seed, tokenizer, count)]


def pairs(config: DPOConfig | RewardModelConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Chosen and rejected responses."""
    data = PairStream(config.data, tokenizer, ends, config.run.seed)
    sides = [(pair, side) for pair in data.next(count) for side in ("chosen", "rejected")]
    return [Part(str(data), [of_sample(getattr(pair, side), side) for pair, side in sides])]


def reward(config: RewardModelConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Pairs, or responses in steps, where the marked tokens are those a step is scored at."""
    if not config.steps.sources:
        return pairs(config, tokenizer, ends, count)
    read = lambda source: read_steps(source, config.steps, tokenizer)  # noqa: E731
    data = RowStream(config.steps, read, lambda row: row.lengths, config.run.seed, "responses in steps")
    return [Part(str(data), [of_sample(row.sample, f"labels {row.labels}") for row in data.next(count)])]


def kto(config: KTOConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Responses with their labels."""
    data = LabeledStream(config.data, tokenizer, ends, config.run.seed)
    rows = [of_sample(row.sample, "wanted" if row.desirable else "not wanted") for row in data.next(count)]
    return [Part(str(data), rows)]


def conditional(config: ConditionalConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Responses with their rewards in the prompts; a question mark for rewards that the run's scorers will give."""
    scored, seed = bool(config.reward.names), config.run.seed
    sources = dict.fromkeys((*config.data.sources, *config.data.eval_sources))
    rows = {source: read_rewarded(source, config.data, not scored) for source in sources}
    if not scored:
        data = ConditionedRows(config.data, config.condition, rows, tokenizer, ends, seed)
        return [Part(str(data), [of_sample(sample) for sample in data.next(count)])]

    encoder = Encoder(config.data, tokenizer, ends)

    def load(source: str) -> list[Sample]:
        template = config.condition.template.replace("{reward}", "?")
        unscored = [row.with_words(template.replace("{input}", row.words)) for row in rows[source]]
        return list(encoder.responses(unscored))

    stream = RowStream(config.data, load, lambda sample: [len(sample.tokens)], seed)
    about = f"{stream}{encoder}; ? stands for the rewards that {', '.join(config.reward.names)} will give"
    return [Part(about, [of_sample(sample) for sample in stream.next(count)])]


def prompts(config: Any, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Prompts."""
    if not config.data.sources:
        raise ValueError("data.sources is not given: no prompts to show")
    return [prompt_rows(config.data, config.run.seed, tokenizer, count)]


def ppo(config: PPOConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Prompts, and the text of the pretraining mix."""
    parts, data = prompts(config, tokenizer, ends, count), config.data
    if config.actor.ptx_coef and data.ptx_source:
        mix = TextDataset(data.ptx_source, data.ptx_key, tokenizer, data.ptx_tokens, config.run.seed)
        rows = [Shown("pretraining mix", row, [0] + [1] * (len(row) - 1)) for row in mix.next(count).tolist()]
        parts.append(Part(f"{mix.tokens:,} tokens of {data.ptx_source}", rows))
    return parts


def evaluate(config: EvaluateConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """Prompts, text and dialogues, whichever are given."""
    parts = [prompt_rows(config.data, config.run.seed, tokenizer, count)] if config.data.sources else []
    parts += [text(config.text, 0, tokenizer, count)] if config.text.sources else []
    return parts + ([dialogues(config.dialogues, 0, tokenizer, ends, count)] if config.dialogues.sources else [])


def rlhf(config: RLHFConfig, tokenizer: Any, ends: Sequence[int], count: int) -> list[Part]:
    """The dialogues of its first stage, and the prompts of the others."""
    if not config.sft.data.sources or not config.prompts.sources:
        raise ValueError("sft.data.sources and prompts.sources: give both")
    return [
        dialogues(config.sft.data, config.run.seed, tokenizer, ends, count),
        prompt_rows(config.prompts, config.run.seed, tokenizer, count),
    ]


READERS: dict[str, Callable[..., list[Part]]] = {
    "pretrain": pretrain,
    "sft": sft,
    "reward": reward,
    "dpo": pairs,
    "kto": kto,
    "rejection": prompts,
    "conditional": conditional,
    "ppo": ppo,
    "grpo": prompts,
    "evaluate": evaluate,
    "rlhf": rlhf,
}


def script_of(path: str) -> str:
    """The script of a config file: by the file's name, or the only one whose options fit.

    Raises:
        ValueError: no script fits, or several; names them.
    """
    if not path:
        raise ValueError(f"--config FILE or --script NAME is needed; scripts: {', '.join(SCRIPTS)}")
    named = Path(path).stem.split("_")[0]
    if named in SCRIPTS:
        return named
    fits, refusals = [], {}
    for name, cls in SCRIPTS.items():
        try:
            load(cls, path, scripts=SCRIPTS)
            fits.append(name)
        except ValueError as error:
            refusals[name] = str(error)
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise ValueError(f"{path} fits no script: {refusals['sft']}; give --script")
    raise ValueError(f"{path} fits several scripts ({', '.join(fits)}): give --script")


def has_sources(config: Any) -> bool:
    """Whether any section of a config names sources, at any depth."""
    sections = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return any(getattr(s, "sources", ()) or (dataclasses.is_dataclass(s) and has_sources(s)) for s in sections)


def written(shown: Shown, tokenizer: Any, colors: bool) -> Text:
    """A sample's tokens as text with its targets marked."""
    text, place = Text(), 0
    for target, run in groupby(shown.mask):
        length = len(list(run))
        words = tokenizer.decode(list(shown.tokens[place : place + length]), clean_up_tokenization_spaces=False)
        text.append(words if colors or not target else f"⟦{words}⟧", style="bold green" if target else "dim")
        place += length
    return text


def main(argv: Sequence[str]) -> None:
    """Reads the data as the script does, and prints its first rows."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--script", choices=SCRIPTS, default="")
    own.add_argument("--rows", type=int, default=3)
    options, rest = own.parse_known_args(argv)
    if "--help" in rest and not options.script:
        print(f"{(__doc__ or '').strip()}\n\nscripts: {', '.join(SCRIPTS)}")
        return
    place = next((i for i, word in enumerate(rest) if word == "--config" or word.startswith("--config=")), None)
    words = [] if place is None else (rest[place].partition("=")[2] or "".join(rest[place + 1 : place + 2]))
    try:
        name = options.script or script_of("".join(words))
        config = parse(SCRIPTS[name], rest, SCRIPTS)
        if not config.model.path:
            raise ValueError("model.path is not given: the folder whose tokenizer reads the rows")
        if not has_sources(config):
            raise ValueError("data.sources is not given: nothing to show")
        shape = read_config(config.model.path)
        tokenizer = load_tokenizer(config.model.path, shape)
        parts = READERS[name](config, tokenizer, stop_ids(config.model.path, shape, tokenizer), options.rows)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console = Console(highlight=False)
    for about, rows in parts:
        console.print(f"{name}: {about}")
        for row in rows:
            learned = sum(row.mask)
            console.print(Rule(Text(f"{row.title}: {len(row.tokens)} tokens, {learned} learned"), align="left"))
            console.print(written(row, tokenizer, bool(console.color_system)))


if __name__ == "__main__":
    main(sys.argv[1:])
