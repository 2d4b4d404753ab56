"""A folder that holds a run: resumed, ended, deleted, refused; changed options; disks that nodes do not share."""

import importlib
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
from samples import write_jsonl
from scripts import ENVIRONMENT, command, digests, kill_after, metrics, options, succeed
from tiny import tiny_chat_model
from tiny_run import tiny_run
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.sft import SFTConfig
from trialign.engine.config import load, parse
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.run_lock import run_lock

STEPS = 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """Models, rows, and a working directory where they are named by relative paths."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_run(folder, [{"prompt": f"say {i}", "response": "word " * (i % 5 + 1)} for i in range(16)])
    tiny_chat_model(folder / "other", num_hidden_layers=1)
    pairs = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(24)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def words(**given: object) -> list[str]:
    """Options of a small SFT run, of the setting's working directory."""
    plain: dict[str, object] = {"model_path": "model", "model_dtype": "float32", "data_sources": "rows.jsonl"}
    plain |= {"data_max_tokens": 96, "update_batch_size": 4, "optimizer_lr": 1e-3, "parallel_device": "cpu"}
    plain |= {"run_steps": STEPS, "run_show": 0, "run_log": (), "run_save_every": 1}
    return options(**(plain | given))


def pair_words(**more: object) -> list[str]:
    """Options of a small DPO run."""
    given = words(data_sources="pairs.jsonl", run_resume="auto", **more)
    place = given.index("--run.show")
    return given[:place] + given[place + 2 :]


@pytest.fixture
def sft(setting, monkeypatch) -> ModuleType:
    """launch/sft.py as a module, in the setting's working directory."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(setting)
    return importlib.import_module("sft")


def run(sft: Any, *given: str) -> None:
    sft.start(SFTConfig, sft.main, "sft", given)


def test_a_folder_that_holds_a_run_is_resumed_deleted_or_refused(sft, tmp_path, capsys):
    out = tmp_path / "run"
    given = words(run_output=out)
    run(sft, *given, "--update.ema_decay", "0.5", "--lora.rank", "2", "--run.log", "tensorboard")
    assert (out / "model_ema").is_dir() and (out / "adapter").is_dir() and (out / "tensorboard").is_dir()
    logged = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"run.output=.*--run.resume auto.*--run.overwrite True"):
        run(sft, *given)
    with pytest.raises(SystemExit, match="lora.rank=0 .was 2."):
        run(sft, *given, "--run.resume", "auto")
    assert (out / "metrics.jsonl").read_bytes() == logged and (out / "model_ema").is_dir()
    (out / "mine.txt").write_text("the user's")
    run(sft, *given, "--run.overwrite", "True")
    assert not any((out / name).exists() for name in ("model_ema", "adapter", "tensorboard"))
    assert (out / "mine.txt").exists() and len(metrics(out)) == STEPS
    written = (out / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    run(sft, *given, "--run.resume", "auto")
    printed = capsys.readouterr().out
    assert (
        f"this run has ended at step {STEPS}" in printed
        and str(out / "model") in printed
        and "--run.overwrite" in printed
    )
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == written
    shutil.rmtree(out / "model")
    (out / "sft.png").unlink()
    run(sft, *given, "--run.resume", "auto")
    assert (out / "model" / "config.json").exists() and (out / "sft.png").exists() and len(metrics(out)) == STEPS
    shutil.rmtree(out / "checkpoints")
    run(sft, *given, "--run.resume", "auto")
    with pytest.raises(SystemExit, match="run.steps=4 .was 3."):
        run(sft, *given, "--run.resume", "auto", "--run.steps", "4")
    assert (out / "model").is_dir()


def test_options_that_a_resume_changes_are_printed_or_refused(sft, setting, tmp_path, capsys):
    out = tmp_path / "run"
    given = words(run_output=out, run_resume="auto")
    run(sft, *given)
    for change, message in {
        ("--run.seed", "3"): r"run.seed=3 \(was 0\)",
        ("--update.batch_size", "8"): r"update.batch_size=8 \(was 4\)",
        ("--data.max_tokens", "64"): r"data.max_tokens=64 \(was 96\)",
        ("--model.path", "other"): "model.path=.*other .was .*model.: .*num_hidden_layers=1",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(sft, *given, "--run.steps", "5", *change)
    shutil.copytree(setting / "model", tmp_path / "moved")
    capsys.readouterr()
    moved = ("--model.path", str(tmp_path / "moved"))
    run(sft, *given, *moved, "--run.steps", "4", "--optimizer.lr", "0.002", "--optimizer.schedule", "constant")
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "optimizer.lr=0.002 (was 0.001)" in printed
        and "run.steps=4 (was 3)" in printed
        and "model.path=" not in printed
    )
    assert metrics(out)[-1]["lr"] == 0.002
    weights = tmp_path / "moved" / "model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-1] ^= 1
    weights.write_bytes(spoilt)
    with pytest.raises(SystemExit, match="model.path=.*model.safetensors"):
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
    printed = succeed("dpo", *again)
    assert "computed once" not in printed and "from step 0" in printed  # the reference was kept
    assert digests(out, 6) == digests(tmp_path / "whole", 6) and metrics(out) == metrics(tmp_path / "whole")
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_parts_of_the_reference_pass_are_kept(setting, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(setting)
    dpo, reference = importlib.import_module("dpo"), importlib.import_module("common.reference")
    monkeypatch.setattr(reference, "CHUNK", 5)
    given = pair_words()
    read, seen = dpo.reference_sums, []

    def start(stop_at: int, out: Path) -> None:
        def counted(role: Any, part: Any, update: Any) -> Any:
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(len(part))
            return read(role, part, update)

        monkeypatch.setattr(dpo, "reference_sums", counted)
        dpo.start(dpo.DPOConfig, dpo.main, "dpo", [*given, "--run.output", str(out)])

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
        model_path="model", model_dtype="float32", data_sources="rows.jsonl", reward_functions="rewards.py:killer"
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
    """A rank's error, in a working directory of its own, of a run that writes to `output`; or ""."""
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
    error, _ = run_ranks(on_disks, 2, tmp_path, "run")
    assert "run.output=run: " in error and f"(rank 1) does not see in {tmp_path}/1/run" in error, error


def on_nodes(rank: int, world: int, folder: Path) -> str:
    """A rank's error whose node has a folder of its own; or ""."""
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

    def changed(before: str, now: str) -> list[str]:
        configs = [parse(PPOConfig, options(reward_functions=spec)) for spec in (before, now)]
        facts = [changes.facts_of(config, build_mesh(), lambda work, **_: work()) for config in configs]
        return changes.changes(*facts, "ppo")

    reward = f"{setting}/rewards.py"
    assert changed(f"{reward}:length", f"{reward}:length") == changed("os:getpid", "os:getpid") == []
    assert changed(f"{reward}:length", f"{setting}/./rewards.py:length") == []
    for before, now in ((f"{reward}:length", f"{reward}:goal"), ("os:getpid", "os:getppid")):
        (change,) = changed(before, now)
        assert f"reward.functions={now} (was {before})" in change


def test_nodes_whose_models_differ_are_named(setting, tmp_path):
    for number in range(2):
        shutil.copytree(setting / "model", tmp_path / str(number) / "model")
    assert run_ranks(on_nodes, 2, tmp_path) == ["", ""]
    (tmp_path / "1" / "model" / "tokenizer_config.json").unlink()
    first, second = run_ranks(on_nodes, 2, tmp_path)
    assert first == second and "model.path=" in first and "tokenizer_config.json is not there" in first
