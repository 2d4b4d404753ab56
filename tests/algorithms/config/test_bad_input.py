"""Refused config, prompts and rewards, by option and value, by file and line."""

import signal
import time
from pathlib import Path

import pytest
from samples import tokenizer, write_jsonl
from trialign.algorithms.batch import Prompt
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.rewards.functions import RewardFunction
from trialign.engine.config import parse

ROOT = Path(__file__).resolve().parents[3]
GIVEN = {"model.path": "m", "data.sources": "p.jsonl", "reward.functions": "r.py:f"}


def flags(**changes: object) -> list[str]:
    """A minimal config with changes (a_b means a.b where it names a section)."""
    values = {**GIVEN, **{key.replace("_", ".", 1): value for key, value in changes.items()}}
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split())]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Stderr of `parse`, which exits with code 2, without tyro's frame and line breaks."""
    with pytest.raises(SystemExit) as exit_info:
        parse(PPOConfig, argv, SCRIPTS)
    captured = capsys.readouterr()
    assert exit_info.value.code == 2 and captured.out == ""
    return " ".join("".join(c for c in captured.err if c not in "│╭╮╰╯─").split())


# Config: the command line.
COMMAND_LINES = {
    "unknown key": ("--actor.optimizr.lr 1", "Unrecognized options: --actor.optimizr.lr"),
    "not a number": ("--actor.optimizer.lr fast", "--actor.optimizer.lr"),
    "not a choice": ("--ppo.kl_estimator k4", "invalid choice 'k4'"),
    "below its range": ("--run.steps 0", "run: steps=0: must be 1 or more"),
    "limit below 0": ("--ppo.first_ratio_limit -1", "ppo: first_ratio_limit=-1.0: must be 0 or more"),
    "min above max": ("--rollout.max_new_tokens 8 --rollout.min_new_tokens 9", "min_new_tokens=9: must be 0 to max_ne"),
    "weights that do not fit": ("--reward.functions a:b --reward.weights 1 2", "2 weights for 1 functions, models and"),
    "probabilities": ("--data.sources a --data.probabilities 0.5 0.5", "probabilities=(0.5, 0.5): 2 numbers for 1 s"),
    "no config file named": ("--config", "error: --config needs a path"),
    "two config files": ("--config a.toml --config b.toml", "error: --config is given twice"),
    "no such config file": ("--config nowhere.toml", "error: config file nowhere.toml: No such file"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_invalid_command_lines_are_refused(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, part = COMMAND_LINES[case]
    message = refused(capsys, argv.split())
    assert part in message, message


# Config: the file.
FILES = {
    "malformed value": ("[run]\nsteps = many", "not valid TOML: Invalid value (at line 2"),
    "unknown key": ("[actor]\nclip_lw = 0.1", "unknown key 'actor.clip_lw': did you mean 'clip_low'? allowed: "),
    "key for a section": ("actor = 3", "actor is a section: write [actor], not actor = 3"),
    "string for a number": ('[run]\nsteps = "3"', 'run.steps = "3": must be a whole number, not a string'),
    "wrong item of a list": ("[data]\nsources = [1]", "data.sources[0] = 1: must be a string, not a whole number"),
    "not a choice": ('[model]\ndtype = "float16"', "model.dtype = \"float16\": not a choice; did you mean 'bfloat16'?"),
    "unknown script": ("[script.pppo.run]", "unknown key 'script.pppo': did you mean 'ppo'? allowed: "),
    "unknown key of another script": ("[script.grpo.grpo]\nlam = 1", "unknown key 'script.grpo.grpo.lam'"),
    "unknown section of rlhf.py": ("[script.rlhf.actor]\n", "unknown key 'script.rlhf.actor'"),
    "wrong type of another script": ("[script.sft.run]\nsteps = 1.5", "script.sft.run.steps = 1.5: must be a whole"),
    "unknown key after an absent file": ("[after.verl.ppo]\nlamda = 1", "unknown key 'after.verl.ppo.lamda'"),
    "value for a script": ("[script]\nppo = 3", "script.ppo is a section: write [script.ppo], not script.ppo = 3"),
    "impossible value": ("[actor]\nclip_low = 2.0", "[actor] clip_low=2.0: must be above 0 and below 1"),
}


@pytest.mark.parametrize("case", FILES)
def test_invalid_config_files_are_refused(case, capsys, tmp_path):
    text, part = FILES[case]
    file = tmp_path / "a.toml"
    file.write_text(text)
    message = refused(capsys, ["--config", str(file)])
    assert message.startswith(f"error: config file {file}: ") and part in message, message


# Config: what does not fit together.
CHECKS = {
    "no model": (flags(model_path=None), 1, "model.path is not given"),
    "ptx without text": (flags(actor_ptx_coef=1), 1, "actor.ptx_coef=1.0: needs text"),
    "world by all": (flags(parallel_tp=2, parallel_dp=2), 8, "world size 8 is not tp x pp x dp = 2 x 1 x 2 = 4"),
    "minibatches": (flags(run_prompts_per_step=10, ppo_minibatches=4), 1, "10 x 1 = 10 samples do not divide by ppo."),
    "tokens": (flags(ppo_micro_batch_tokens=2047), 1, "ppo.micro_batch_tokens=2047 is less than one sample may have"),
}


@pytest.mark.parametrize("case", CHECKS)
def test_sizes_must_fit_together(case):
    argv, world, part = CHECKS[case]
    config = parse(PPOConfig, argv)
    with pytest.raises(ValueError) as error:
        config.check(world)
    assert part in str(error.value)


# Data.
def load_prompts(path: Path | str, **options) -> PromptDataset:
    return PromptDataset(PromptData(sources=(str(path),), **options), tokenizer())


LINES = {
    "missing key": ('{"prompt": "hello"}\n{"text": "a"}\n', ":2: no column 'prompt' (data.prompt_key); it has: 'text'"),
    "empty prompt": ('{"prompt": "  "}\n', ":1: 'prompt' is empty"),
    "no content": (
        '{"prompt": [{"role": "user"}]}\n',
        ":1: 'prompt'[0] (user): its content must be a string, not None",
    ),
    "unknown role": ('{"prompt": [{"role": "judge", "content": "a"}]}\n', ":1: the tokenizer's chat template refuses"),
}


@pytest.mark.parametrize("case", LINES)
def test_invalid_prompt_rows_are_refused(case, tmp_path):
    text, part = LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    assert f"{path}{part}" in str(error.value)


def test_messages_and_tools_need_a_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match=":1: 'prompt' is a list of messages: needs data.chat_template=true"):
        load_prompts(path, chat_template=False)
    with pytest.raises(ValueError, match="chat_template=true, but the model's tokenizer has none"):
        PromptDataset(PromptData(sources=(str(path),)), tokenizer(template=False))
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "tools": [{"type": "function"}]}])
    with pytest.raises(ValueError, match="b.jsonl:1: 'tools' is not empty: needs data.chat_template=true"):
        load_prompts(path, chat_template=False)


# Rewards.
PROMPTS = [Prompt(i, [1], f"prompt {i}", source=f"a.jsonl:{i + 1}") for i in range(3)]


def reward(tmp_path: Path, body: str) -> str:
    path = tmp_path / "reward.py"
    path.write_text(f"import os, signal, sys, time\ndef score(prompts, completions, **fields):\n    {body}\n")
    return f"{path}:score"


NAN = float("nan")
FAILURES = {  # body, message, scores where failures are skipped
    "raises": ("return [1 / len(c) for c in completions]", "raised ZeroDivisionError: division", [1.0, NAN, 0.5]),
    "no row alone": ("assert len(prompts) == 1; return [0.0]", "to a.jsonl:3, but for none of them alone", [0.0] * 3),
    "wrong length": ("return [0.0]", "returned 1 scores for 3 completions, of a.jsonl:1 to a.jsonl:3", [NAN] * 3),
    "NaN": ("return [0.0, None, float('nan')]", "returned nan for a.jsonl:3 (prompt 'prompt 2'): ", [0.0, None, NAN]),
    "text": ("return [0.0, 'good', 0.0]", "returned 'good' for a.jsonl:2 (prompt 'prompt 1'): ", [0.0, NAN, 0.0]),
    "a huge integer": ("return [1.0, 10**5000, 1.0]", "for a.jsonl:2", [1.0, NAN, 1.0]),
    "raises in a generator": ("yield from (1 / len(c) for c in completions)", "ZeroDivisionError", [1.0, NAN, 0.5]),
    "closes its output": ("os.closerange(0, 100); time.sleep(60)", "(it closed its output) for 3 rows", [NAN] * 3),
    "is killed once": (
        "f = __file__ + '.1'; os.path.exists(f) or os.kill(os.getpid(), open(f, 'w') and 9); return [1.0] * 3",
        "ended (killed by SIGKILL) for 3 rows: a.jsonl:1",
        [NAN] * 3,
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failing_reward_functions_are_refused_or_skipped(case, tmp_path):
    body, part, expected = FAILURES[case]
    spec = reward(tmp_path, body)
    with RewardFunction(spec) as function, pytest.raises(ValueError) as error:
        function.score(PROMPTS, ["x", "", "yy"])
    assert str(error.value).startswith(f"reward function {spec}: ") and part in str(error.value)
    (tmp_path / "reward.py.1").unlink(missing_ok=True)
    with RewardFunction(spec, skip_failures=True) as function:
        for scores in (expected, [1.0] * 3 if "once" in case else expected):  # a process that ended is started again
            assert str(function.score(PROMPTS, ["x", "", "yy"])) == str(scores)
        assert spec in function.failures[0]


def test_reward_function_past_its_time_limit_is_killed_with_its_children(tmp_path):
    mark = tmp_path / "pid"
    body = "from subprocess import Popen; child = Popen(['sleep', '60']); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    spec = reward(tmp_path, f"{body}; open({str(mark)!r}, 'w').write(str(child.pid)); child.wait()")
    start = time.monotonic()
    with RewardFunction(spec, time_limit=2) as function:
        with pytest.raises(ValueError) as error:
            function.score(PROMPTS, ["x", "y", "z"])
        assert function._process.returncode == -signal.SIGKILL
    assert "reward.time_limit=2 seconds for 3 rows: a.jsonl:1, a.jsonl:2, a.jsonl:3" in str(error.value)
    assert time.monotonic() - start < 10
    child = Path(f"/proc/{mark.read_text()}/stat")
    for _ in range(100):  # the kernel hands the orphan to init, which buries it
        if not child.exists() or ") Z " in child.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the child is running")


@pytest.mark.parametrize(
    ("text", "spec", "part"),
    [
        (None, "nowhere.py:score", "cannot import nowhere.py: FileNotFoundError: no such file"),
        (None, "no_such_module:score", "cannot import no_such_module: ModuleNotFoundError"),
        ("def score(): ...", "reward.py:scores", "reward.py has no function 'scores'; it has: score"),
        ("import sys; sys.exit(5)", "reward.py:score", "cannot import reward.py: SystemExit: 5"),
        ("import os; os._exit(5)", "reward.py:score", "its process ended (exit code 5) while it was imported"),
        ("import time; time.sleep(60)", "reward.py:score", "reward.time_limit=2 seconds while it was imp"),
    ],
)
def test_unloadable_reward_functions_are_refused(text, spec, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("reward.py").write_text(text)
    with pytest.raises(ValueError) as error:
        RewardFunction(spec, time_limit=2)
    assert str(error.value).startswith(f"reward.functions={spec}: ") and part in str(error.value)
