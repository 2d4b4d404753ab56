"""Run folders: resumed, finished, deleted or refused; changed options; disks that nodes do not share."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from harness import run_ranks
from samples import write_jsonl
from scripts import ENVIRONMENT, command, digests, kill_after, metrics, options, succeed
from tiny import tiny_chat_model
from tiny_run import tiny_run
from trialign.algorithms.config.sft import SFTConfig
from trialign.engine.config import load, parse
from trialign.engine.mesh import build_mesh
from trialign.engine.storage.run_lock import run_lock

STEPS = 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """Models and rows, for runs with relative paths in this folder."""
    folder = tmp_path_factory.mktemp("folders")
    rows = [{"prompt": f"say {i}", "response": "word " * (i % 5 + 1)} for i in range(16)]
    pairs = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(24)]
    write_jsonl(tiny_run(folder, rows) / "pairs.jsonl", pairs)
    tiny_chat_model(folder / "other", num_hidden_layers=1)
    return folder


DPO: dict[str, Any] = {"data_sources": "pairs.jsonl", "run_resume": "auto", "run_show": None}


def sft_options(**given: object) -> list[str]:
    """Arguments of a small run in the setting's folder."""
    plain: dict[str, object] = {"model_path": "model", "model_dtype": "float32", "data_sources": "rows.jsonl"}
    plain |= {"data_max_tokens": 96, "update_batch_size": 4, "optimizer_lr": 1e-3, "parallel_device": "cpu"}
    plain |= {"run_steps": STEPS, "run_show": 0, "run_log": (), "run_save_every": 1}
    return options(**{name: value for name, value in (plain | given).items() if value is not None})


@pytest.fixture
def run(setting, monkeypatch, launched) -> Callable[..., None]:
    """Runs launch/sft.py in this process, in the setting's folder."""
    monkeypatch.chdir(setting)
    sft = launched("sft")
    return lambda *arguments: sft.start(SFTConfig, sft.main, "sft", arguments)


def test_folder_with_a_run_is_resumed_deleted_or_refused(run, tmp_path, capsys, launched):
    out = tmp_path / "run"
    given = sft_options(run_output=out)
    run(*given, "--update.ema_decay", "0.5", "--lora.rank", "2", "--run.log", "tensorboard")
    assert (out / "model_ema").is_dir() and (out / "adapter").is_dir() and (out / "tensorboard").is_dir()
    logged = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"run.output=.*--run.resume auto.*--run.overwrite True"):
        run(*given)
    with pytest.raises(SystemExit, match="lora.rank=0 .was 2."):
        run(*given, "--run.resume", "auto")
    assert (out / "metrics.jsonl").read_bytes() == logged and (out / "model_ema").is_dir()
    (out / "mine.txt").write_text("the user's")
    run(*given, "--run.overwrite", "True")
    assert not any((out / name).exists() for name in ("model_ema", "adapter", "tensorboard"))
    assert (out / "mine.txt").exists() and len(metrics(out)) == STEPS
    written = (out / "model" / "model.safetensors").stat().st_mtime_ns
    begun, dpo = (out / "config.toml").read_bytes(), launched("dpo")
    run(*given, "--run.resume", "auto", "--optimizer.lr", "0.5", "--run.steps", "2")
    printed = capsys.readouterr().out
    assert f"this run has ended at step {STEPS}" in printed and "optimizer.lr=0.5 (was 0.001)" in printed
    assert (out / "config.toml").read_bytes() == begun
    with pytest.raises(SystemExit, match="run of sft.py, not of dpo.py"):
        dpo.start(dpo.DPOConfig, dpo.main, "dpo", ["--resume", str(out)])
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == written
    shutil.rmtree(out / "model")
    run(*given, "--run.resume", "auto")
    assert (out / "model" / "config.json").exists() and len(metrics(out)) == STEPS
    shutil.rmtree(out / "checkpoints")
    run(*given, "--run.resume", "auto")
    with pytest.raises(SystemExit, match="run.steps=4 .was 3."):
        run(*given, "--run.resume", "auto", "--run.steps", "4")


def test_changed_options_of_a_resume_are_printed_or_refused(run, setting, tmp_path, capsys):
    out = tmp_path / "run"
    given = sft_options(run_output=out, run_resume="auto")
    run(*given)
    with pytest.raises(SystemExit, match=r"run.seed=3 \(was 0\)"):
        run(*given, "--run.steps", "5", "--run.seed", "3")
    with pytest.raises(SystemExit, match="model.path=.*other .was .*model.: .*num_hidden_layers=1"):
        run(*given, "--run.steps", "5", "--model.path", "other")
    shutil.copytree(setting / "model", tmp_path / "moved")
    capsys.readouterr()
    moved = ("--model.path", str(tmp_path / "moved"))
    run(*given, *moved, "--run.steps", "4", "--optimizer.lr", "0.002", "--optimizer.schedule", "constant")
    printed = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr=0.002 (was 0.001)" in printed and "run.steps=4 (was 3)" in printed
    assert "model.path=" not in printed  # another path, the same files
    assert metrics(out)[-1]["lr"] == 0.002
    weights = tmp_path / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="model.path=.*model.safetensors"):
        run(*given, *moved, "--run.steps", "6")


def test_moved_run_is_resumed_from_another_directory(run, tmp_path, monkeypatch):
    run(*sft_options(run_output=tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        run("--resume", "elsewhere", "--run.output", "other")
    (tmp_path / "mine.toml").touch()
    with pytest.raises(SystemExit, match="run.resume=.*nowhere"):
        run("--config", "mine.toml", *sft_options(run_resume=tmp_path / "nowhere"))
    run("--resume", "elsewhere", "--run.steps", "4")
    assert len(metrics(tmp_path / "elsewhere")) == 4 and not (tmp_path / "other").exists()
    config = load(SFTConfig, tmp_path / "elsewhere" / "config.toml")
    assert all(Path(path).is_absolute() for path in (config.model.path, *config.data.sources, config.run.output))


def test_run_killed_before_its_first_checkpoint_restarts(setting, tmp_path, monkeypatch):
    """Killed before its record is written, then within its steps; the reference pass is not repeated."""
    monkeypatch.chdir(setting)
    given = sft_options(**DPO, run_save_every=0, run_steps=6, run_log="tensorboard")
    succeed("dpo", *given, "--run.output", tmp_path / "whole")
    out = tmp_path / "run"
    again = (*given, "--run.output", out)
    kill_after(".lock", out, "dpo", *again)
    assert not (out / "run.json").exists()
    kill_after("metrics.jsonl", out, "dpo", *again)
    assert not list(out.glob("checkpoints/step_*"))
    printed = succeed("dpo", *again)
    assert "computed once" not in printed and "recompute none; from step 0" in printed
    assert digests(out, 6) == digests(tmp_path / "whole", 6) and metrics(out) == metrics(tmp_path / "whole")
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_finished_chunks_of_the_reference_pass_are_reused(setting, tmp_path, monkeypatch, launched):
    monkeypatch.chdir(setting)
    dpo, seen = launched("dpo"), list[int]()
    start, read = partial(dpo.start, dpo.DPOConfig, dpo.main, "dpo"), dpo.reference_sums
    monkeypatch.setattr(launched("common.reference"), "CHUNK", 5)

    def counted(role: Any, part: Any, update: Any) -> Any:
        seen.append(len(part))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return read(role, part, update)

    monkeypatch.setattr(dpo, "reference_sums", counted)
    with pytest.raises(SystemExit, match="phase loading: KeyboardInterrupt"):
        start(sft_options(**DPO, run_output=tmp_path / "run"))
    start(sft_options(**DPO, run_output=tmp_path / "run"))
    assert seen == [5, 5, 5, 2]
    start(sft_options(**DPO, run_output=tmp_path / "whole"))
    assert digests(tmp_path / "run", STEPS) == digests(tmp_path / "whole", STEPS)


def test_torchrun_restart_resumes_from_the_last_checkpoint(setting, tmp_path, monkeypatch):
    """The reward function kills its rank in the fourth call."""
    monkeypatch.chdir(setting)
    given: dict[str, Any] = {"data_max_tokens": None, "update_batch_size": None, "optimizer_lr": None}
    given |= {"data_max_prompt_tokens": 96, "reward_functions": "rewards.py:killer", "rollout_max_new_tokens": 4}
    given |= {"run_prompts_per_step": 2, "run_steps": 4, "run_output": tmp_path / "run", "run_overwrite": True}
    torchrun = command("ppo", *sft_options(**given), ranks=2)
    torchrun[torchrun.index("--standalone")] = "--max-restarts=1"
    torchrun[3:3] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    printed = subprocess.check_output(torchrun, env=os.environ | ENVIRONMENT, text=True, timeout=300)
    assert "from step 0" in printed and "from step 3" in printed
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def refusal(rank: int, world: int, folder: Path, output: str) -> str:
    """A rank's error or "", with a working directory a rank; without an output only the model is compared."""
    sys.path.insert(0, str(ROOT / "launch"))
    module, fingerprint = (importlib.import_module(f"common.{name}") for name in ("run", "fingerprint"))
    vars(importlib.import_module("common.run_record"))["DISK_WAIT"] = 1.0
    os.environ["GROUP_RANK"] = str(rank)
    os.chdir(folder / str(rank))
    config, mesh = parse(SFTConfig, sft_options(run_output=output or "run")), build_mesh(dp=world)
    try:
        if not output:
            fingerprint.facts_of(config, mesh, lambda work: work())
        else:
            with ExitStack() as stack:
                run = module.Run(config, mesh, stack, "sft", module.StopSignals(Path("nowhere"), rank == 0))
                run.record.check_shared_disk(stack.enter_context(run_lock(run.folder)) if rank == 0 else "")
    except (SystemExit, ValueError) as error:
        return str(error)
    return ""


def test_nodes_with_different_folders_or_models_are_refused(setting, tmp_path):
    """A relative run.output is another folder on each node."""
    for number in range(2):
        shutil.copytree(setting / "model", tmp_path / str(number) / "model")
    assert run_ranks(refusal, 2, tmp_path, str(tmp_path / "shared")) == ["", ""]
    error, _ = run_ranks(refusal, 2, tmp_path, "run")
    assert "run.output=run" in error and f"(rank 1) does not see in {tmp_path}/1/run" in error, error
    assert run_ranks(refusal, 2, tmp_path, "") == ["", ""]
    (tmp_path / "1" / "model" / "tokenizer_config.json").unlink()
    first, second = run_ranks(refusal, 2, tmp_path, "")
    assert first == second and "model.path=" in first and "tokenizer_config.json" in first


def stale(rank: int, world: int, folder: Path) -> tuple[Any, bool, dict[str, str]]:
    """A rank's view of a finished run's folder; ranks other than the main one see no file that exists there."""
    sys.path.insert(0, str(ROOT / "launch"))
    module = importlib.import_module("common.run")
    if rank:
        exists = Path.exists
        setattr(Path, "exists", lambda path: folder not in path.parents and exists(path))  # noqa: B010
    config = parse(SFTConfig, sft_options(run_output=folder, run_resume="auto"))
    with ExitStack() as stack:
        run = module.Run(config, build_mesh(dp=world), stack, "sft", module.StopSignals(Path("nowhere"), rank == 0))
        run.record.open()
        run.step = 1
        return run.remember("before.json", lambda: ["computed"]), run.record.is_finished(), run.record.results


def test_a_rank_that_does_not_see_a_file_yet_decides_as_the_main_rank(setting, tmp_path, monkeypatch):
    """As on NFS, whose clients cache folders: ranks that branched apart would wait for each other."""
    monkeypatch.chdir(setting)
    succeed("sft", *sft_options(run_output=tmp_path / "run"))
    (tmp_path / "run" / "before.json").write_text('["kept"]')
    first, second = run_ranks(stale, 2, tmp_path / "run", fresh=True)
    assert first == second and first[:2] == (["kept"], True) and first[2]["model"] == "model"
