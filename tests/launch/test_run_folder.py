"""A folder that holds a run: gone on with, ended, deleted, refused; what may change; disks that nodes do not share."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from harness import run_ranks
from scripts import ENVIRONMENT, command, digests, kill_after, metrics, options, succeed
from tiny import tiny_chat_model, tiny_llama
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.sft import SFTConfig, check
from trialign.engine.config import load, parse
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.run_lock import run_lock

STEPS = 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """Models, rows, and where they are named by relative paths."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_chat_model(folder / "model")
    tiny_llama(folder / "other", vocab_size=260, num_hidden_layers=1)
    for asset in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "model" / asset, folder / "other")
    rows = [{"prompt": f"say {i}", "response": "word " * (i % 5 + 1)} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (folder / "reward.py").write_text(
        "import os, pathlib, signal\n"
        "def once(prompts, completions, **_):\n"
        "    mark = pathlib.Path(__file__).with_name('mark')\n"
        "    mark.write_text(mark.read_text() + 'x' if mark.exists() else 'x')\n"
        "    if len(mark.read_text()) == 4:\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    return folder


def words(**given: object) -> list[str]:
    """Options of a small SFT run, of the setting's working directory."""
    plain: dict[str, object] = {"model_path": "model", "model_dtype": "float32", "data_sources": "rows.jsonl"}
    plain |= {"data_max_tokens": 96, "update_batch_size": 4, "optimizer_lr": 1e-3, "parallel_device": "cpu"}
    plain |= {"run_steps": STEPS, "run_show": 0, "run_log": (), "run_save_every": 1}
    return options(**(plain | given))


def pair_words(**given: object) -> list[str]:
    """Options of a small DPO run."""
    made = words(data_sources="pairs.jsonl", run_resume="auto", **given)
    place = made.index("--run.show")
    return made[:place] + made[place + 2 :]


@pytest.fixture
def sft(setting, monkeypatch) -> ModuleType:
    """launch/sft.py as a module, in the setting's working directory."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(setting)
    return importlib.import_module("sft")


def run(sft: Any, *given: str) -> None:
    sft.start(SFTConfig, check, sft.main, "sft", given)


def test_a_folder_that_holds_a_run_is_gone_on_with_deleted_or_refused(sft, tmp_path, capsys):
    out = tmp_path / "run"
    given = words(run_output=out)
    run(sft, *given, "--update.ema_decay", "0.5", "--lora.rank", "2", "--run.log", "tensorboard")
    assert (out / "model_ema").is_dir() and (out / "adapter").is_dir() and (out / "tensorboard").is_dir()
    logged = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"run.output=.*run: holds a run.*--run.resume auto.*--run.overwrite True"):
        run(sft, *given)
    with pytest.raises(SystemExit, match="lora.rank=0 .was 2.: may not change"):
        run(sft, *given, "--run.resume", "auto")
    assert (out / "metrics.jsonl").read_bytes() == logged and (out / "model_ema").is_dir()
    (out / "mine.txt").write_text("the user's")
    run(sft, *given, "--run.overwrite", "True")
    assert not any((out / name).exists() for name in ("model_ema", "adapter", "tensorboard"))
    assert (out / "mine.txt").exists() and len(metrics(out)) == STEPS
    made = (out / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    run(sft, *given, "--run.resume", "auto")
    said = capsys.readouterr().out
    assert f"this run has ended at step {STEPS}" in said and str(out / "model") in said and "--run.overwrite" in said
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == made
    shutil.rmtree(out / "model")
    (out / "sft.png").unlink()
    run(sft, *given, "--run.resume", "auto")
    assert (out / "model" / "config.json").exists() and (out / "sft.png").exists() and len(metrics(out)) == STEPS
    shutil.rmtree(out / "checkpoints")
    run(sft, *given, "--run.resume", "auto")
    with pytest.raises(SystemExit, match="its checkpoints are gone.*run.steps=4 .was 3."):
        run(sft, *given, "--run.resume", "auto", "--run.steps", "4")
    assert (out / "model").is_dir()


def test_what_a_resume_changes_is_told_or_refused_by_name(sft, setting, tmp_path, capsys):
    out = tmp_path / "run"
    given = words(run_output=out, run_resume="auto")
    run(sft, *given)
    for change, message in {
        ("--run.seed", "3"): r"run.seed=3 \(was 0\): may not change",
        ("--update.batch_size", "8"): r"update.batch_size=8 \(was 4\)",
        ("--data.max_tokens", "64"): r"data.max_tokens=64 \(was 96\)",
        ("--model.path", "other"): "model.path=.*other .was .*model.: another architecture: .*num_hidden_layers=1, was",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(sft, *given, "--run.steps", "5", *change)
    shutil.copytree(setting / "model", tmp_path / "moved")
    capsys.readouterr()
    moved = ("--model.path", str(tmp_path / "moved"))
    run(sft, *given, *moved, "--run.steps", "4", "--optimizer.lr", "0.002", "--optimizer.schedule", "constant")
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr=0.002 (was 0.001)" in said and "run.steps=4 (was 3)" in said and "model.path=" not in said
    assert metrics(out)[-1]["lr"] == 0.002
    weights = tmp_path / "moved" / "model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-1] ^= 1
    weights.write_bytes(spoilt)
    with pytest.raises(SystemExit, match="model.path=.*model.safetensors is another: may not change"):
        run(sft, *given, *moved, "--run.steps", "6")


def test_a_run_is_resumed_from_anywhere(sft, tmp_path, monkeypatch):
    run(sft, *words(run_output=tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for contrary in (("--run.output", "other"), ("--config", "elsewhere/config.toml", "--run.output", "other")):
        with pytest.raises(SystemExit, match="2"):
            run(sft, "--resume", "elsewhere", *contrary)
    run(sft, "--resume", "elsewhere", "--run.steps", "4")
    assert len(metrics(tmp_path / "elsewhere")) == 4 and not (tmp_path / "other").exists()
    config = load(SFTConfig, tmp_path / "elsewhere" / "config.toml")
    assert all(Path(path).is_absolute() for path in (config.model.path, *config.data.sources, config.run.output))


def test_a_run_that_has_no_checkpoint_yet_begins_again(setting, tmp_path, monkeypatch):
    """Killed before its folder is there, within its steps, and within the reference pass; the same command ends it."""
    monkeypatch.chdir(setting)
    given = pair_words(run_save_every=0, run_steps=6, run_log="tensorboard")
    succeed("dpo", *given, "--run.output", tmp_path / "whole")
    out = tmp_path / "run"
    again = (*given, "--run.output", out)
    kill_after(".lock", out, "dpo", *again)
    assert not (out / "run.json").exists()
    kill_after("metrics.jsonl", out, "dpo", *again)
    assert not list(out.glob("checkpoints/step_*"))
    said = succeed("dpo", *again)
    assert "computed once" not in said and "from step 0" in said  # the reference was kept
    assert digests(out, 6) == digests(tmp_path / "whole", 6) and metrics(out) == metrics(tmp_path / "whole")
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_what_the_reference_pass_has_computed_is_kept(setting, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(setting)
    dpo, rows = importlib.import_module("dpo"), importlib.import_module("common.supervised")
    monkeypatch.setattr(rows, "PART", 5)
    given = pair_words()
    read, seen = dpo.reference_sums, []

    def start(stop_at: int, out: Path) -> None:
        def counted(role: Any, part: Any, update: Any) -> Any:
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(len(part))
            return read(role, part, update)

        monkeypatch.setattr(dpo, "reference_sums", counted)
        dpo.start(dpo.DPOConfig, dpo.check_dpo, dpo.main, "dpo", [*given, "--run.output", str(out)])

    with pytest.raises(KeyboardInterrupt):
        start(1, tmp_path / "run")
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 1
    start(-1, tmp_path / "run")
    assert seen == [5, 5, 2]
    start(-1, tmp_path / "whole")
    assert digests(tmp_path / "run", STEPS) == digests(tmp_path / "whole", STEPS)


def test_torchrun_restarts_a_run_where_it_was(setting, tmp_path, monkeypatch):
    """The reward kills its rank in the fourth call; --max-restarts goes on from the last checkpoint."""
    monkeypatch.chdir(setting)
    given = options(
        model_path="model", model_dtype="float32", data_sources="prompts.jsonl", reward_functions="reward.py:once"
    ) + options(
        data_max_prompt_tokens=96,
        rollout_max_new_tokens=4,
        run_prompts_per_step=2,
        run_steps=4,
        run_save_every=1,
        run_show=0,
    )
    given += options(run_log=(), run_output=tmp_path / "run", run_overwrite=True)
    torchrun = command("ppo", *given, ranks=2)
    torchrun[torchrun.index("--standalone")] = "--max-restarts=1"
    torchrun[3:3] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        torchrun, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 0" in done.stdout and "from step 3" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def on_disks(rank: int, world: int, folder: Path, output: str) -> str:
    """What a rank is told, in a working directory of its own, of a run that writes to `output`; or ""."""
    sys.path.insert(0, str(ROOT / "launch"))
    module = importlib.import_module("common.run")
    vars(importlib.import_module("common.run_record"))["DISK_WAIT"] = 1.0
    os.environ["GROUP_RANK"] = str(rank)
    os.chdir(folder / str(rank))
    try:
        with ExitStack() as stack:
            config, signals = parse(SFTConfig, words(run_output=output)), module.StopSignals(Path("nowhere"), rank == 0)
            run = module.Run(config, build_mesh(dp=world), stack, "sft", signals)
            run.record.check_shared_disk(stack.enter_context(run_lock(run.folder)) if rank == 0 else "")
        return ""
    except SystemExit as error:
        return str(error)


def test_a_disk_that_nodes_do_not_share_is_named(tmp_path):
    """In two working directories a relative run.output is another folder on each rank."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    assert run_ranks(on_disks, 2, tmp_path, str(tmp_path / "shared")) == ["", ""]
    told, _ = run_ranks(on_disks, 2, tmp_path, "run")
    assert "run.output=run: node" in told and f"(rank 1) does not see in {tmp_path}/1/run" in told, told


def on_nodes(rank: int, world: int, folder: Path) -> str:
    """What a rank is told whose node is in a folder of its own; or ""."""
    sys.path.insert(0, str(ROOT / "launch"))
    changes = importlib.import_module("common.fingerprint")
    os.environ["GROUP_RANK"] = str(rank)
    os.chdir(folder / str(rank))
    config = parse(SFTConfig, words())
    try:
        changes.facts_of(config, build_mesh(dp=world), lambda work: work())
        return ""
    except ValueError as error:
        return str(error)


def test_another_function_is_another_reward(setting, monkeypatch):
    """Of the same file, and of a module, which has no file here."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    changes = importlib.import_module("common.fingerprint")

    def told(before: str, now: str) -> list[str]:
        configs = [parse(PPOConfig, options(reward_functions=spec)) for spec in (before, now)]
        facts = [changes.facts_of(config, build_mesh(), lambda work, **_: work()) for config in configs]
        return changes.changes(*facts, "ppo")

    reward = f"{setting}/reward.py"
    assert told(f"{reward}:once", f"{reward}:once") == told("os:getpid", "os:getpid") == []
    assert told(f"{reward}:once", f"{setting}/./reward.py:once") == []
    for before, now in ((f"{reward}:once", f"{reward}:twice"), ("os:getpid", "os:getppid")):
        (change,) = told(before, now)
        assert f"reward.functions={now} (was {before})" in change


def test_nodes_whose_models_differ_are_named(setting, tmp_path):
    for number in range(2):
        shutil.copytree(setting / "model", tmp_path / str(number) / "model")
    assert run_ranks(on_nodes, 2, tmp_path) == ["", ""]
    (tmp_path / "1" / "model" / "tokenizer_config.json").unlink()
    first, second = run_ranks(on_nodes, 2, tmp_path)
    assert first == second and "model.path=" in first and "tokenizer_config.json is not there" in first
