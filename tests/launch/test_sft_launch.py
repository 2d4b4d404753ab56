"""launch/sft.py from the outside: what it leaves, killed and resumed, in other layouts, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from scripts import AXES, agree, digests, kill_after, launch, metrics, rewound, succeed, succeed_in_turn, times_told
from tiny import tiny_chat_model
from trialign.algorithms.config.sft import SFTConfig, SFTData, check
from trialign.algorithms.data.dialogues import DialogueDataset, joined
from trialign.engine.config import load, parse
from trialign.models.families.registry import read_config
from trialign.models.hf.tokenizer import stop_ids

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny chat model, rows of both kinds and a config with all that a run can have."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_chat_model(folder / "model", vocab_size=261)
    lines: list[dict] = [
        {"prompt": f"count to {i}", "response": " ".join(map(str, range(i + 1)))} for i in range(1, 12)
    ]
    turns = ("user", "hi"), ("assistant", "yo"), ("user", "and now?")
    for i in range(6):
        chat = [{"role": role, "content": text} for role, text in (*turns, ("assistant", f"bye {i}"))]
        lines.append({"messages": chat})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(f"""
[model]
path = "{folder}/model"
dtype = "float32"
[data]
sources = ["{folder}/rows.jsonl"]
max_tokens = 64
eval_fraction = 0.2
[optimizer]
lr = 1e-2
eps = 1e-5
[update]
batch_size = 4
micro_batch_tokens = 128
ema_decay = 0.5
[run]
steps = {STEPS}
eval_every = 3
save_every = 1
show = 1
show_tokens = 4
log = []
""")
    return folder


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    """The run that nothing interrupts."""
    said = succeed("sft", "--config", f"{setting}/config.toml", "--run.output", f"{setting}/whole", "--run.keep", "6")
    assert "14 rows of" in said and "3 held out" in said and "in the data" in said
    assert "stop tokens: </s> (2)" in said
    return setting / "whole"


def test_what_a_run_leaves(setting, whole):
    steps = metrics(whole)
    assert [step["step"] for step in steps] == list(range(STEPS + 1))
    assert ["eval_loss" in step for step in steps] == [True, False, False, True, False, False, True]
    assert steps[-1]["eval_loss"] < steps[3]["eval_loss"] < steps[0]["eval_loss"]
    assert steps[6]["loss"] < steps[1]["loss"] and steps[6]["epoch"] == pytest.approx(24 / 14)
    assert (whole / "sft.png").stat().st_size > 10_000

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    shape = read_config(whole / "model")
    data = SFTData(sources=(f"{setting}/rows.jsonl",), max_tokens=64, eval_fraction=0.2)
    held_out = joined(DialogueDataset(data, tokenizer, stop_ids(whole / "model", shape, tokenizer)).held_out)
    targets = sum(sample.targets for sample in held_out)
    loss = 0.0
    for sample in held_out:
        tokens = torch.tensor(sample.tokens.tolist())[None]
        labels = torch.where(torch.tensor(list(sample.mask)).bool(), tokens, -100)
        with torch.no_grad():
            loss += model(input_ids=tokens, labels=labels, num_items_in_batch=targets).loss.item()
    assert steps[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)  # the exported model has it too
    average = AutoModelForCausalLM.from_pretrained(whole / "model_ema", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    for a, b, c in zip(start.parameters(), average.parameters(), model.parameters(), strict=True):
        assert (b - a).norm() < (c - a).norm()  # the average lags behind


def test_killed_at_a_random_point_and_resumed_it_ends_bit_for_bit_the_same(setting, whole):
    folder = setting / "killed"
    kill_after("checkpoints/step_*", folder, "sft", "--config", f"{setting}/config.toml", "--run.output", str(folder))
    assert not (folder / "checkpoints" / f"step_{STEPS}").exists(), "killed too late to show anything"
    succeed("sft", "--resume", str(folder))
    assert digests(folder, STEPS) == digests(whole, STEPS)
    assert metrics(folder) == metrics(whole)


@pytest.fixture(scope="module")
def moved(setting, whole) -> None:
    """The last four steps under torchrun in every layout."""
    folders = {axis: rewound(whole, setting / axis, 2) for axis in AXES}
    succeed_in_turn([("sft", "--resume", folder, f"--parallel.{axis}", 2) for axis, folder in folders.items()])


@pytest.mark.parametrize("axis", AXES)
def test_resumed_under_torchrun_in_another_layout_it_ends_the_same_within_rounding(setting, whole, moved, axis):
    agree(setting / axis, whole, STEPS)


def test_what_is_wrong_is_said_once_and_before_anything_is_written(setting, tmp_path):
    """By two ranks: a layout that does not fit the batch, and a row that has nothing to learn."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\n')
    given = ("--config", f"{setting}/config.toml", "--run.output", str(tmp_path / "run"))
    cases = {
        "update.batch_size=3 rows do not divide by dp=2": ("--update.batch_size", "3"),
        f"{bad}:2: 'response' is empty": ("--data.sources", str(bad)),
    }
    for message, arguments in cases.items():
        done = launch("sft", *given, *arguments, ranks=2)
        assert done.returncode != 0 and times_told(done, message) == 1, done.stderr
        assert not (tmp_path / "run").exists()


def arguments(**changes: object) -> list[str]:
    values = {"model.path": "m", "data.sources": "a.jsonl", **{k.replace("_", ".", 1): v for k, v in changes.items()}}
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split())]


@pytest.mark.parametrize(
    ("argv", "world", "message"),
    [
        (arguments(model_path=None), 1, "model.path is not given"),
        (arguments(data_sources=None), 1, "data.sources is not given: at least one file of dialogues or prompts with"),
        (arguments(parallel_tp=2), 3, "world size 3 does not divide by"),
        (arguments(update_batch_size=10), 4, "update.batch_size=10 rows do not divide by dp=4"),
        (arguments(update_micro_batch_tokens=100), 1, "update.micro_batch_tokens=100 is less than one row may have"),
    ],
)
def test_sizes_that_do_not_fit_together(argv, world, message):
    with pytest.raises(ValueError, match=message):
        check(parse(SFTConfig, argv), world)


def test_the_config_that_ships_is_whole():
    config = load(SFTConfig, ROOT / "launch" / "configs" / "sft_smollm2.toml")
    assert check(config, world=1) == 1
    assert all((ROOT / source).is_file() for source in config.data.sources)
