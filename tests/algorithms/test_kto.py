"""KTO's mismatched answers: whose answer each prompt is measured with, and what the script makes of it."""

import importlib
import random
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samples import write_jsonl
from tiny import tiny_tokenizer
from trialign.algorithms.config.preference import DPOModels, KTOConfig, LabelData
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.dialogues import Sample
from trialign.algorithms.data.preferences import LabeledStream, partners
from trialign.engine.mesh import build_mesh

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STOP = (2,)  # </s> of the tiny tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def pool(prompts: str) -> list[Sample]:
    """An answer to each of these prompts, one letter each."""
    return [Sample(array("i", [ord(p), 7]), b"\0\1", p, f"a.jsonl:{i + 1}") for i, p in enumerate(prompts)]


def both_answers(*prompts: str) -> list[dict]:
    """A wanted and an unwanted answer to each prompt in lines that follow each other, as pairs make them."""
    return [
        {"prompt": prompt, "response": f"{answer} {prompt}", "label": answer == "yes"}
        for prompt in prompts
        for answer in ("yes", "no")
    ]


def test_the_partner_is_the_next_row_of_another_prompt():
    assert partners(pool("aabbca")) == [2, 2, 4, 4, 5, 2]
    assert partners(pool("ab")) == [1, 0] and partners(pool("abb")) == [1, 0, 0]
    chance = random.Random(0)
    for _ in range(200):
        prompts = "".join(chance.choice("abc") for _ in range(chance.randrange(2, 9)))
        if len(set(prompts)) < 2:
            continue
        ahead = [[(i + k) % len(prompts) for k in range(1, len(prompts))] for i in range(len(prompts))]
        expected = [next(j for j in row if prompts[j] != prompts[i]) for i, row in enumerate(ahead)]
        assert partners(pool(prompts)) == expected, prompts


@pytest.mark.parametrize("prompts", ["a", "aaa"])
def test_a_pool_of_one_prompt_is_refused_by_its_source(prompts):
    with pytest.raises(ValueError, match=rf"data source a.jsonl: all {len(prompts)} answers are to one prompt: KTO's"):
        partners(pool(prompts))


def test_each_pool_needs_two_prompts_and_partners_stay_within_it(tiny, tmp_path):
    two, one = write_jsonl(tmp_path / "two.jsonl", both_answers("p", "q")), tmp_path / "one.jsonl"
    write_jsonl(one, both_answers("r"))
    sources = (str(two), str(one))
    together = LabeledStream(LabelData(sources=sources), tiny, STOP)
    assert together.partners == [[2, 2, 4, 4, 0, 0]]
    with pytest.raises(ValueError, match=r"data source \S*one.jsonl: all 2 answers are to one prompt"):
        LabeledStream(LabelData(sources=sources, probabilities=(0.5, 0.5)), tiny, STOP)
    write_jsonl(one, both_answers("r", "s"))
    apart = LabeledStream(LabelData(sources=sources, probabilities=(0.5, 0.5)), tiny, STOP)
    assert apart.partners == [[2, 2, 0, 0]] * 2


def test_the_script_measures_every_prompt_with_an_answer_to_another(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    script = importlib.import_module("kto")
    path = write_jsonl(tmp_path / "a.jsonl", both_answers("p", "q", "r"))
    monkeypatch.setattr(script, "reference_pass", lambda run, model, rows, *rest: torch.arange(float(len(rows))))
    config = SimpleNamespace(data=LabelData(sources=(str(path),)), update=UpdateConfig(batch_size=2))
    stream = LabeledStream(config.data, tiny, STOP)
    task = SimpleNamespace(config=config, rows=stream, steps=3, learner=None, run=SimpleNamespace(mesh=build_mesh()))
    rows = script.LabeledWithReference(task)
    for _ in range(3):
        batch, others, _ = rows.next(2)
        for number, other in enumerate(others):
            begin, where = other.mask.index(1), batch.cu_seqlens[number]
            prompt, answer = (str(tiny.decode(part)) for part in (other.tokens[:begin], other.tokens[begin:]))
            assert prompt.removesuffix("</s><s>assistant: ")[-1] != answer.removesuffix("</s>")[-1], other.where
            assert batch.tokens[where : where + begin].tolist() == other.tokens[:begin].tolist()


def test_labels_are_compared_over_all_sources(tiny, tmp_path):
    rows = both_answers("p", "q")
    wanted, unwanted = (write_jsonl(tmp_path / f"{name}.jsonl", rows[i::2]) for i, name in enumerate(("yes", "no")))
    data = LabeledStream(LabelData(sources=(str(wanted), str(unwanted))), tiny, STOP)
    assert len(data) == 4 and ", 2 of them wanted" in str(data)
    with pytest.raises(ValueError, match=r"yes.jsonl: all 2 answers to learn from have the label True"):
        LabeledStream(LabelData(sources=(str(wanted),), eval_sources=(str(unwanted),)), tiny, STOP)


def test_batches_need_a_row_a_rank_and_may_be_odd():
    def config(size: int) -> KTOConfig:
        return KTOConfig(
            model=DPOModels(path="m"), data=LabelData(sources=("a.jsonl",)), update=UpdateConfig(batch_size=size)
        )

    assert config(1).check(1) == 1 and config(7).check(2) == 2 and config(3).check(3) == 3
    with pytest.raises(ValueError, match="update.batch_size=2 rows are fewer than dp=3: at least one a rank"):
        config(2).check(3)
