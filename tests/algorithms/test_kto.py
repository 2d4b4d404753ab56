"""KTO's mismatched responses: partners of rows within their pool, and their use by launch/kto.py."""

import importlib
import random
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samples import write_jsonl
from trialign.algorithms.config.preference import DPOModels, KTOConfig, LabelData
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import Sample
from trialign.algorithms.data.preferences import LabeledStream, partners
from trialign.engine.mesh import build_mesh

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STOP = (2,)  # </s> of the tiny tokenizer


def pool(prompts: str) -> list[Sample]:
    """A response to each of these prompts of one letter."""
    return [Sample(array("i", [ord(p), 7]), b"\0\1", p, f"a.jsonl:{i + 1}") for i, p in enumerate(prompts)]


def both_labels(*prompts: str) -> list[dict]:
    """A desirable and an undesirable response to each prompt in consecutive lines, as pairs give them."""
    return [
        {"prompt": prompt, "response": f"{word} {prompt}", "label": word == "yes"}
        for prompt in prompts
        for word in ("yes", "no")
    ]


def test_partner_is_the_next_row_with_another_prompt():
    chance = random.Random(0)
    for _ in range(200):
        prompts = "".join(chance.choice("abc") for _ in range(chance.randrange(2, 9)))
        if len(set(prompts)) < 2:
            continue
        ahead = [[(i + k) % len(prompts) for k in range(1, len(prompts))] for i in range(len(prompts))]
        expected = [next(j for j in row if prompts[j] != prompts[i]) for i, row in enumerate(ahead)]
        assert partners(pool(prompts)) == expected, prompts


def test_partners_stay_within_a_pool_of_two_prompts_or_more(tiny, tmp_path):
    two, one = write_jsonl(tmp_path / "two.jsonl", both_labels("p", "q")), tmp_path / "one.jsonl"
    write_jsonl(one, both_labels("r"))
    sources = (str(two), str(one))
    assert LabeledStream(LabelData(sources=sources), tiny, STOP).partners == [[2, 2, 4, 4, 0, 0]]
    with pytest.raises(ValueError, match=r"data source \S*one.jsonl: all 2 "):
        LabeledStream(LabelData(sources=sources, probabilities=(0.5, 0.5)), tiny, STOP)
    write_jsonl(one, both_labels("r", "s"))
    apart = LabeledStream(LabelData(sources=sources, probabilities=(0.5, 0.5)), tiny, STOP)
    assert apart.partners == [[2, 2, 0, 0]] * 2
    halves = [str(write_jsonl(tmp_path / f"{i}.jsonl", both_labels("p", "q")[i::2])) for i in (0, 1)]
    assert len(LabeledStream(LabelData(sources=tuple(halves)), tiny, STOP)) == 4  # both labels over all sources


def test_script_pairs_prompts_with_responses_to_others(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    script = importlib.import_module("kto")
    path = write_jsonl(tmp_path / "a.jsonl", both_labels("p", "q", "r"))
    monkeypatch.setattr(script, "reference_pass", lambda run, model, rows, *rest: torch.arange(float(len(rows))))
    config = SimpleNamespace(data=LabelData(sources=(str(path),)), update=UpdateConfig(batch_size=2))
    stream = LabeledStream(config.data, tiny, STOP)
    task = SimpleNamespace(config=config, rows=stream, steps=3, learner=None, run=SimpleNamespace(mesh=build_mesh()))
    rows = script.LabeledWithReference(task)
    for _ in range(3):
        batch, others, _ = rows.next(2)
        for number, other in enumerate(others):
            begin, where = other.mask.index(1), batch.cu_seqlens[number]
            prompt, response = (str(tiny.decode(part)) for part in (other.tokens[:begin], other.tokens[begin:]))
            assert prompt.removesuffix("</s><s>assistant: ")[-1] != response.removesuffix("</s>")[-1], other.where
            assert batch.tokens[where : where + begin].tolist() == other.tokens[:begin].tolist()


def test_batches_may_be_odd_with_a_row_a_rank():
    def check(size: int, world: int) -> int:
        update = UpdateConfig(batch_size=size)
        return KTOConfig(model=DPOModels(path="m"), data=LabelData(sources=("a",)), update=update).check(world)

    assert check(1, 1) == 1 and check(7, 2) == 2 and check(3, 3) == 3
    with pytest.raises(ValueError, match="update.batch_size=2 .*dp=3"):
        check(2, 3)
