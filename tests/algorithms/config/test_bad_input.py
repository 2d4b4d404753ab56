"""What a user can get wrong in config, data and rewards: each is refused, and the message says what and where."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from samples import tokenizer, write_jsonl
from trialign.algorithms.batch import Prompt
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.data.documents import TextDataset
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.rewards.functions import RewardFunction
from trialign.engine.config import parse

ROOT = Path(__file__).resolve().parents[3]
GIVEN = {"model.path": "m", "data.sources": "p.jsonl", "reward.functions": "r.py:f"}


def flags(**changes: object) -> list[str]:
    """The least a config needs, with changes (a_b means a.b where it names a section)."""
    values = {**GIVEN, **{key.replace("_", ".", 1): value for key, value in changes.items()}}
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split())]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What `parse` prints on stderr as it leaves with code 2, without tyro's frame and line breaks."""
    with pytest.raises(SystemExit) as exit_info:
        parse(PPOConfig, argv, prog="ppo.py")
    captured = capsys.readouterr()
    assert exit_info.value.code == 2 and captured.out == ""
    return " ".join("".join(c for c in captured.err if c not in "│╭╮╰╯─").split())


# Config: the command line.
COMMAND_LINES = {
    "unknown key": (
        ["--actor.optimizr.lr", "1"],
        ["Unrecognized options: --actor.optimizr.lr", "--actor.optimizer.lr"],
    ),
    "not a number": (["--actor.optimizer.lr", "fast"], ["--actor.optimizer.lr", "'fast'"]),
    "not a switch": (["--reward.normalize", "maybe"], ["--reward.normalize", "'maybe'", "True"]),
    "not a choice": (["--ppo.kl_estimator", "k4"], ["invalid choice 'k4'", "--ppo.kl_estimator", "'k1', 'k2', 'k3'"]),
    "no value": (["--run.steps"], ["'--run.steps'", "Expected 1 values"]),
    "below its range": (["--run.steps", "0"], ["run: steps=0: must be 1 or more"]),
    "not a number at all": (["--ppo.kl_coef", "nan"], ["ppo: kl_coef=nan: must be 0 or more"]),
    "greedy": (["--rollout.temperature", "0"], ["temperature=0.0: must be above 0"]),
    "min above max": (
        ["--rollout.max_new_tokens", "8", "--rollout.min_new_tokens", "9"],
        ["min_new_tokens=9: must be 0 to max_new_tokens=8"],
    ),
    "reward without a colon": (["--reward.functions", "reward.py"], ["'reward.py': must be path/to/file.py:function"]),
    "weights that do not fit": (
        ["--reward.functions", "a:b", "--reward.weights", "1", "2"],
        ["2 weights for 1 functions, models and servers"],
    ),
    "a reward twice": (["--reward.functions", "a:b", "a:b"], ["each may be named once"]),
    "probabilities that do not fit": (
        ["--data.sources", "a", "--data.probabilities", "0.5", "0.5"],
        ["probabilities=(0.5, 0.5): 2 numbers for 1 sources"],
    ),
    "negative probabilities": (
        ["--data.sources", "a", "b", "--data.probabilities", "-1", "2"],
        ["probabilities=(-1.0, 2.0): must be 0 or more, and not all 0"],
    ),
    "no config file named": (["--config"], ["error: --config needs a path"]),
    "two config files": (["--config", "a.toml", "--config", "b.toml"], ["error: --config is given twice"]),
    "no such config file": (["--config", "nowhere.toml"], ["error: config file nowhere.toml: No such file"]),
    "nothing to resume": (["--resume", "nowhere"], ["config file nowhere/config.toml: No such file"]),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, parts = COMMAND_LINES[case]
    message = refused(capsys, argv)
    assert all(part in message for part in parts), message


# Config: the file.
FILES = {
    "malformed value": ("[run]\nsteps = many", "not valid TOML: Invalid value (at line 2"),
    "unknown key": (
        "[actor]\nclip_lw = 0.1",
        "unknown key 'actor.clip_lw': did you mean 'clip_low'? allowed: policy_loss, ",
    ),
    "key for a section": ("actor = 3", "actor is a section: write [actor], not actor = 3"),
    "string for a number": ('[run]\nsteps = "3"', 'run.steps = "3": must be a whole number, not a string'),
    "switch for a number": ("[ppo]\ngamma = true", "ppo.gamma = true: must be a number, not true or false"),
    "number for a switch": (
        "[reward]\nnormalize = 1",
        "reward.normalize = 1: must be true or false, not a whole number",
    ),
    "string for a list": ('[data]\nsources = "a"', 'data.sources = "a": must be a list'),
    "wrong item of a list": ("[data]\nsources = [1]", "data.sources[0] = 1: must be a string, not a whole number"),
    "list of a wrong length": ("[actor.optimizer]\nbetas = [0.9]", "must be a list of 2 values, not 1"),
    "not a choice": ('[model]\ndtype = "float16"', "model.dtype = \"float16\": not a choice; did you mean 'bfloat16'?"),
    "impossible value": ("[actor]\nclip_low = 2.0", "[actor] clip_low=2.0: must be above 0 and below 1"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_file(case, capsys, tmp_path):
    text, part = FILES[case]
    file = tmp_path / "a.toml"
    file.write_text(text)
    message = refused(capsys, ["--config", str(file)])
    assert message.startswith(f"error: config file {file}: ") and part in message, message


# Config: what does not fit together.
CHECKS = {
    "no model": (flags(model_path=None), 1, "model.path is not given"),
    "no prompts": (flags(data_sources=None), 1, "data.sources is not given"),
    "no reward": (flags(reward_functions=None), 1, "no reward: give reward.functions, reward.models"),
    "ptx without text": (flags(actor_ptx_coef=1), 1, "actor.ptx_coef=1.0: needs text"),
    "world by tp x pp": (flags(parallel_tp=2, parallel_pp=2), 6, "world size 6 does not divide by tp x pp = 2 x 2 = 4"),
    "world by all": (flags(parallel_tp=2, parallel_dp=2), 8, "world size 8 is not tp x pp x dp = 2 x 1 x 2 = 4"),
    "minibatches": (
        flags(run_prompts_per_step=10, ppo_minibatches=4),
        1,
        "10 x 1 = 10 samples do not divide by ppo.minib",
    ),
    "dp": (flags(run_prompts_per_step=12, ppo_minibatches=2), 4, "2 parts of 6 do not divide by dp=4"),
    "micro-batch tokens": (
        flags(ppo_micro_batch_tokens=2047),
        1,
        "ppo.micro_batch_tokens=2047 is less than one sample may have: data.max_prompt_tokens + rollout.max_new_tok",
    ),
    "only warm-up": (
        flags(run_steps=5, critic_warmup_steps=5),
        1,
        "critic.warmup_steps=5: must be below run.steps=5",
    ),
}


@pytest.mark.parametrize("case", CHECKS)
def test_sizes_that_do_not_fit_together(case):
    argv, world, part = CHECKS[case]
    config = parse(PPOConfig, argv)
    with pytest.raises(ValueError) as error:
        config.check(world)
    assert part in str(error.value)


# The script itself: nothing is loaded, nothing is written, the exit code is not 0.
SCRIPT = {
    "unknown key": (["--run.step", "3"], "--run.steps"),
    "missing model folder": (flags(model_path="nowhere"), "nowhere: no such folder"),
}


@pytest.mark.parametrize("case", SCRIPT)
def test_the_script_leaves_before_anything_is_written(case, tmp_path):
    argv, part = SCRIPT[case]
    result = subprocess.run(
        [sys.executable, ROOT / "launch/ppo.py", *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode not in (0, None) and part in result.stderr
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


# Data.
def load_prompts(path: Path | str, **knobs) -> PromptDataset:
    return PromptDataset(PromptData(sources=(str(path),), **knobs), tokenizer())


LINES = {
    "missing key": (
        '{"prompt": "hello"}\n{"text": "a", "id": 1}\n',
        ":2: no column 'prompt' (data.prompt_key); it has: 'te",
    ),
    "empty prompt": ('{"prompt": "  "}\n', ":1: 'prompt' is empty"),
    "message without content": (
        '{"prompt": [{"role": "user"}]}\n',
        ":1: 'prompt'[0] (user): its content must be a string, not None",
    ),
    "an answer that says nothing": (
        '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": []}]}\n',
        ":1: 'prompt'[1] (assistant): its content must be a string, not None",
    ),
    "role the template lacks": (
        '{"prompt": [{"role": "judge", "content": "a"}]}\n',
        ":1: the tokenizer's chat template refus",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_rows_are_named_by_file_and_line(case, tmp_path):
    text, part = LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    assert f"{path}{part}" in str(error.value)


def test_all_prompts_too_long(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "say " * 9}, {"prompt": "say " * 5}])
    with pytest.raises(
        ValueError, match="all 2 prompts are longer than data.max_prompt_tokens=4; the shortest has 7 tok"
    ):
        load_prompts(path, max_prompt_tokens=4)


def test_messages_or_a_template_that_is_not_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match=":1: 'prompt' is a list of messages: needs data.chat_template=true"):
        load_prompts(path, chat_template=False)
    with pytest.raises(ValueError, match="chat_template=true, but the model's tokenizer has none"):
        PromptDataset(PromptData(sources=(str(path),)), tokenizer(template=False))
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "tools": [{"type": "function"}]}])
    with pytest.raises(ValueError, match="b.jsonl:1: 'tools' is not empty: needs data.chat_template=true"):
        load_prompts(path, chat_template=False)


def test_text_for_the_pretraining_mix(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": 7}])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: 'text' must be a string, not 7"):
        TextDataset(str(path), "text", tokenizer(), 4)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no column 'body' \(data.ptx_key\); it has: 'text'"):
        TextDataset(str(path), "body", tokenizer(), 4)
    short = write_jsonl(tmp_path / "b.jsonl", [{"text": "a b"}])
    with pytest.raises(ValueError, match=r"b\.jsonl: 3 tokens are less than one sequence of 4"):
        TextDataset(str(short), "text", tokenizer(), 4)
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="the model's tokenizer has no end of sequence"):
        TextDataset(str(short), "text", endless, 1)


# Rewards.
PROMPTS = [Prompt(i, [1], f"prompt {i}", source=f"a.jsonl:{i + 1}") for i in range(3)]


def reward(tmp_path: Path, body: str) -> str:
    path = tmp_path / "reward.py"
    path.write_text(f"import os, signal, sys, time\ndef score(prompts, completions, **fields):\n    {body}\n")
    return f"{path}:score"


ANSWERS = {
    "raises": ("return [1 / len(c) for c in completions]", "raised ZeroDivisionError: division by zero"),
    "one row": ("return [1 / len(c) for c in completions]", "for a.jsonl:2 (prompt 'prompt 1', completion '')"),
    "no row alone": (
        "assert len(prompts) == 1; return [0.0]",
        "the 3 rows from a.jsonl:1 to a.jsonl:3, but for none of them alone",
    ),
    "wrong length": ("return [0.0]", "returned 1 scores for 3 completions, of a.jsonl:1 to a.jsonl:3"),
    "wrong length, its rows emptied": ("completions.clear(); return [0.0]", "returned 1 scores for 3 completions, of"),
    "nothing": ("return None", "returned None: must be one float for each completion"),
    "NaN": (
        "return [0.0, 0.0, float('nan')]",
        "returned nan for a.jsonl:3 (prompt 'prompt 2'): must be a finite number",
    ),
    "text": ("return [0.0, 'good', 0.0]", "returned 'good' for a.jsonl:2 (prompt 'prompt 1'): must be a finite number"),
    "exits": ("sys.exit(3)", "its process ended (exit code 3) for 3 rows: a.jsonl:1, a.jsonl:2, a.jsonl:3"),
    "closes everything": (
        "os.closerange(0, 100); time.sleep(60)",
        "its process ended (it closed its output) for 3 rows: a.jsonl:1",
    ),
    "is killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "its process ended (killed by SIGKILL) for 3 rows: a.jsonl:1",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_reward_function_that_fails(case, tmp_path):
    body, part = ANSWERS[case]
    spec = reward(tmp_path, body)
    with RewardFunction(spec) as function, pytest.raises(ValueError) as error:
        function.score(PROMPTS, ["x", "", "yy"])
    assert str(error.value).startswith(f"reward function {spec}: ") and part in str(error.value)


def test_reward_function_past_its_time_limit_is_killed_with_its_children(tmp_path):
    mark = tmp_path / "pid"
    start_child = "from subprocess import Popen; child = Popen(['sleep', '60'])"
    body = f"{start_child}; open({str(mark)!r}, 'w').write(str(child.pid)); child.wait()"
    spec = reward(tmp_path, body)
    start = time.monotonic()
    with RewardFunction(spec, time_limit=2) as function, pytest.raises(ValueError) as error:
        function.score(PROMPTS, ["x", "y", "z"])
    assert "took longer than reward.time_limit=2 seconds for 3 rows: a.jsonl:1, a.jsonl:2, a.jsonl:3" in str(
        error.value
    )
    assert time.monotonic() - start < 10
    child = int(mark.read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the kernel hands the orphan to init, which buries it
            if Path(f"/proc/{child}/stat").exists() and ") Z " in Path(f"/proc/{child}/stat").read_text():
                raise ProcessLookupError
            os.kill(child, 0)
            time.sleep(0.05)


def test_reward_function_that_ignores_signals_is_killed_too(tmp_path):
    spec = reward(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    with RewardFunction(spec, time_limit=2) as function:
        with pytest.raises(ValueError, match="took longer"):
            function.score(PROMPTS, ["x", "y", "z"])
        assert function._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("text", "spec", "part"),
    [
        (None, "nowhere.py:score", "cannot import nowhere.py: FileNotFoundError: no such file"),
        (
            None,
            "no_such_module:score",
            "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def score(): ...", "reward.py:scores", "reward.py has no function 'scores'; it has: score"),
        ("score = 3", "reward.py:score", "reward.py has no function 'score'; it has: none"),
        ("def score(:", "reward.py:score", "cannot import reward.py: SyntaxError"),
        ("import nothing_at_all", "reward.py:score", "cannot import reward.py: ModuleNotFoundError"),
        ("import sys; sys.exit(5)", "reward.py:score", "cannot import reward.py: SystemExit: 5"),
        ("import os; os._exit(5)", "reward.py:score", "its process ended (exit code 5) while it was imported"),
        (
            "import time; time.sleep(60)",
            "reward.py:score",
            "took longer than reward.time_limit=2 seconds while it was imp",
        ),
    ],
)
def test_reward_function_that_cannot_be_had(text, spec, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("reward.py").write_text(text)
    with pytest.raises(ValueError) as error:
        RewardFunction(spec, time_limit=2)
    assert str(error.value).startswith(f"reward.functions={spec}: ") and part in str(error.value)
