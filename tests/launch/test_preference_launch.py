"""launch/reward.py, dpo.py and kto.py from the outside: what they leave, killed and resumed, in other layouts, LoRA."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import (
    AXES,
    ROOT,
    agree,
    digests,
    kill_after,
    launch,
    metrics,
    rewound,
    succeed,
    succeed_in_turn,
    times_told,
)
from tiny import tiny_chat_model
from trialign.algorithms.config.common import ParallelConfig, RunConfig
from trialign.algorithms.config.preference import PairData
from trialign.algorithms.data.dialogues import Encoder
from trialign.algorithms.data.preferences import Pair, read_pairs
from trialign.algorithms.reward_model import pack_pairs
from trialign.algorithms.roles.build import build_decoder, read_shape
from trialign.algorithms.roles.role import Role
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import head_of, read_config
from trialign.models.hf.convert import export_checkpoint

STEPS = 4
METRICS = {
    "reward": ("loss", "accuracy", "chosen", "rejected"),
    "process": ("loss", "accuracy"),
    "dpo": ("loss", "accuracy", "chosen", "rejected", "margin", "nll"),
    "kto": ("loss", "kl"),
}
SCRIPTS = {name: "reward" if name == "process" else name for name in METRICS}  # process: labeled steps


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny chat model, rows for each kind of run, and a config a kind."""
    folder = tmp_path_factory.mktemp("preference")
    tiny_chat_model(folder / "model", num_hidden_layers=2)
    pairs = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(14)]
    labeled = [
        {"prompt": row["prompt"], "response": row[key], "label": key == "chosen"}
        for row in pairs
        for key in ("chosen", "rejected")
    ]
    steps = [
        {"prompt": row["prompt"], "steps": ["yes"] * (1 + i % 2) + ["no"] * (1 + i % 3), "labels": labels}
        for i, row in enumerate(pairs)
        for labels in [[True] * (1 + i % 2) + [False] * (1 + i % 3)]
    ]
    for name, rows in (("reward", pairs), ("process", steps), ("dpo", pairs), ("kto", labeled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.toml").write_text(f"""
[model]
path = "{folder}/model"
dtype = "float32"
[{"steps" if name == "process" else "data"}]
sources = ["{folder}/{name}.jsonl"]
max_tokens = 48
eval_fraction = 0.25
[optimizer]
lr = 5e-3
eps = 1e-5
[update]
batch_size = 4
micro_batch_tokens = 128
[run]
steps = {STEPS}
eval_every = 2
save_every = 1
keep = {STEPS}
log = []
""")
    return folder


@pytest.fixture(scope="module")
def whole(setting) -> dict[str, Path]:
    """A run of each kind that nothing interrupts."""
    for kind, script in SCRIPTS.items():
        said = succeed(script, "--config", f"{setting}/{kind}.toml", "--run.output", f"{setting}/{kind}-whole")
        assert f"held out, after {STEPS} steps:" in said
        assert ("computed once" in said) == (kind in ("dpo", "kto"))
    return {kind: setting / f"{kind}-whole" for kind in SCRIPTS}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_what_a_run_leaves(setting, whole, kind):
    run, script = whole[kind], SCRIPTS[kind]
    steps = metrics(run)
    assert [step["step"] for step in steps] == list(range(STEPS + 1))
    assert all(name in step for name in METRICS[kind] for step in steps[1:])
    assert ["eval_accuracy" in step for step in steps] == [True, False, True, False, True]
    assert steps[-1]["eval_accuracy"] >= 0.75  # "yes" from "no" is soon told
    assert (run / f"{script}.png").stat().st_size > 10_000
    if script == "dpo":  # the policy is the reference
        assert steps[1]["loss"] == pytest.approx(0.6931472) and steps[0]["eval_accuracy"] == 0.5
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if script == "reward" else AutoModelForCausalLM
    model = dict(auto.from_pretrained(run / "model", dtype=torch.float32).named_parameters())
    start = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    moved = [not torch.equal(model[name], weight) for name, weight in start.named_parameters() if name in model]
    assert all(moved) and len(moved) >= len(model) - 1


@pytest.mark.parametrize(("side", "end"), [("right", "</s>"), ("left", "</s>"), ("right", "")])
def test_the_exported_reward_model_scores_the_same_by_the_lines_of_the_docs(setting, whole, tmp_path, side, end):
    """One padded batch in transformers against ours, read where a rollout is; the template writes a line behind it.

    Where the template writes no end, `append_eos` does, and so does what the docs say of it.
    """
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    export_checkpoint(whole["reward"] / "checkpoints" / f"step_{STEPS}", folder, role="reward", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("</s>{% endfor", f"{end}\n{{% endfor")
    tokenizer.save_pretrained(folder)
    shape, mesh = read_config(folder), build_mesh()
    assert shape.pad_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    data = PairData(append_eos=not end)
    drawn: list[Pair] = read_pairs(f"{setting}/reward.jsonl", data, Encoder(data, tokenizer, (2,)))
    batch = pack_pairs(drawn)
    role = Role(build_decoder(str(folder), shape, mesh, "float32", head="score"))
    ours = role.scores(batch)
    rows = [json.loads(line) for line in (setting / "reward.jsonl").read_text().splitlines()]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
        for row in rows
        for key in ("chosen", "rejected")
    ]
    (lines,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "docs" / "reward.md").read_text(), re.DOTALL)
    if not end:
        lines = lines.replace(".rstrip()", ".rstrip() + tokenizer.eos_token")
    names = {"chats": chats}
    with torch.no_grad():
        exec(lines.replace("runs/reward_smollm2/model", str(folder)), names)
    theirs: Any = names["scores"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[::2] > ours[1::2]).float().mean() >= 0.75 and len(set(batch.lengths)) > 2


@pytest.mark.parametrize("place", ["model", f"checkpoints/step_{STEPS}"])
def test_a_process_reward_model_scores_no_whole_responses(whole, place):
    with pytest.raises(ValueError, match="process reward model"):
        read_shape(str(whole["process"] / place), ParallelConfig(), RunConfig(), "score")
    assert head_of(read_shape(str(whole["reward"] / place), ParallelConfig(), RunConfig(), "score")) == "score"


@pytest.mark.parametrize("kind", SCRIPTS)
def test_killed_and_resumed_it_ends_bit_for_bit_the_same(setting, whole, kind):
    folder, script = setting / f"{kind}-killed", SCRIPTS[kind]
    kill_after("checkpoints/step_*", folder, script, "--config", f"{setting}/{kind}.toml", "--run.output", str(folder))
    assert not (folder / "checkpoints" / f"step_{STEPS}").exists(), "killed too late to show anything"
    said = succeed(script, "--resume", str(folder))
    assert "computed once" not in said  # what the reference gave was found in the folder
    assert digests(folder, STEPS) == digests(whole[kind], STEPS)
    assert metrics(folder) == metrics(whole[kind])


@pytest.fixture(scope="module")
def moved(setting, whole) -> None:
    """Each run's last three steps under torchrun in every layout."""
    runs = []
    for kind, axis in ((kind, axis) for kind in SCRIPTS for axis in AXES):
        folder = rewound(whole[kind], setting / f"{kind}-{axis}", 1)
        shutil.rmtree(folder / "reference", ignore_errors=True)  # computed anew, in this layout
        runs.append((SCRIPTS[kind], "--resume", folder, f"--parallel.{axis}", 2))
    succeed_in_turn(runs)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_resumed_under_torchrun_in_another_layout_it_ends_the_same_within_rounding(setting, whole, moved, kind, axis):
    agree(setting / f"{kind}-{axis}", whole[kind], STEPS)


def test_dpo_with_adapters(setting):
    """The reference is the model that they are put on; merged and adapter both are left."""
    folder = setting / "lora"
    arguments = ["--lora.rank", "4", "--run.output", str(folder), "--run.steps", "2", "--optimizer.lr", "1e-2"]
    succeed("dpo", "--config", f"{setting}/dpo.toml", *arguments)
    assert metrics(folder)[1]["loss"] == pytest.approx(0.6931472)
    assert metrics(folder)[0]["eval_loss"] == pytest.approx(math.log(2))
    assert metrics(folder)[-1]["eval_loss"] < 0.95 * math.log(2) and metrics(folder)[-1]["eval_accuracy"] >= 0.75
    assert (folder / "model" / "model.safetensors").exists() and (folder / "adapter" / "adapter_config.json").exists()


def test_what_is_wrong_is_said_once_and_before_anything_is_written(setting, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    given = ("--config", f"{setting}/dpo.toml", "--run.output", str(tmp_path / "run"))
    cases = {
        "update.batch_size=3 rows do not divide by dp=2": ("--update.batch_size", "3"),
        "update.micro_batch_tokens=64 is less than one row may have: 2 × data.max_tokens=96": (
            "--update.micro_batch_tokens",
            "64",
        ),
        f"{bad}:2: no column 'rejected'": ("--data.sources", str(bad)),
    }
    for message, arguments in cases.items():
        done = launch("dpo", *given, *arguments, ranks=2)
        assert done.returncode != 0 and times_told(done, message) == 1, done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "score"), [("reward", "(chosen)"), ("process", "(step 1)")])
def test_a_held_out_score_that_is_no_number_ends_the_run_by_row(setting, tmp_path, kind, score):
    """A model whose weights are finite and whose scores are not: one line, no traceback."""
    shutil.copytree(setting / "model", tmp_path / "model")
    weights = load_file(setting / "model" / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    given = ("--model.path", f"{tmp_path}/model", "--run.output", f"{tmp_path}/run")
    done = launch("reward", "--config", f"{setting}/{kind}.toml", *given)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(rf"error: \S+/{kind}\.jsonl:\d+ {re.escape(score)}: the reward model gives it \S+", done.stderr), (
        done.stderr
    )
