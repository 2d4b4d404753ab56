"""Reward functions in their process, and the shaping of scores. Refused functions: test_bad_input.py."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trialign.algorithms.batch import Prompt
from trialign.algorithms.rewards.functions import RewardFunction
from trialign.algorithms.rewards.shaping import RewardShaper, RunningMoments

PROMPTS = [
    Prompt(0, [1], "one", {"answer": 1, "topic": "x"}, "a.jsonl:1"),
    Prompt(1, [1], "three", {"answer": 3}, "a.jsonl:2"),
]


def function(tmp_path: Path, body: str, signature: str = "prompts, completions, **fields") -> str:
    path = tmp_path / "reward.py"
    path.write_text(f"def score({signature}):\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    return f"{path}:score"


def test_functions_may_print_read_and_keep_state(tmp_path, capfd):
    """Scores may be numpy scalars, bools and yielded."""
    body = "import os, sys, numpy\nglobal calls\ncalls = globals().get('calls', 0) + 1\nprint('hello from reward')\n"
    body += "os.system('echo from a child')\nyield numpy.float32(calls + len(sys.stdin.read()))\n"
    with RewardFunction(function(tmp_path, f"{body}yield 'torch' in sys.modules")) as reward:
        assert reward.score(PROMPTS, ["", ""]) == [1.0, 0.0]
        assert reward.score(PROMPTS, ["", ""]) == [2.0, 0.0]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("hello from reward") == 2


@pytest.mark.parametrize("gpus", ["", "7,9"])
def test_reward_process_is_no_rank_and_sees_the_gpus_it_is_given(tmp_path, monkeypatch, gpus):
    """Else every function would be on the GPU of rank 0, and a library in it would wait for the job's other ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    body = "import os\nleft = [n for n in os.environ if 'RANK' in n or n in ('WORLD_SIZE', 'MASTER_ADDR')]\n"
    body += "left += [n for n in os.environ if n.startswith('TORCHELASTIC')]\n"
    body += f"return [len(left), float(os.environ['CUDA_VISIBLE_DEVICES'] == {gpus!r})]"
    with RewardFunction(function(tmp_path, body), gpus=gpus) as reward:
        assert reward.score(PROMPTS, ["", ""]) == [0.0, 1.0]


def test_large_batches_and_rows_after_a_failure_are_scored(tmp_path):
    body = "return [0.0 if t is None else 1 / len(c) for t, c in zip(topic, completions)]"
    with RewardFunction(function(tmp_path, body, "prompts, completions, topic")) as reward:
        with pytest.raises(ValueError, match="ZeroDivisionError.*a.jsonl:1"):
            reward.score(PROMPTS, ["", "x"])
        assert reward.score(PROMPTS * 500, ["x" * 2000] * 1000) == [1 / 2000, 0.0] * 500


def test_modules_of_the_working_directory_get_prompts_and_columns(tmp_path, monkeypatch):
    (tmp_path / "neighbor.py").write_text("value = 7.0\n")
    body = "import neighbor\nreturn [neighbor.value + len(p) + 10 * a for p, a in zip(prompts, answer)]"
    function(tmp_path, body, "prompts, completions, answer")
    monkeypatch.chdir(tmp_path)
    for spec in ("reward:score", "reward.py:score", f"{tmp_path}/reward.py:score"):
        with RewardFunction(spec) as reward:
            assert reward.score(PROMPTS, ["x", "yy"]) == [20.0, 42.0]


def test_reward_process_ends_with_its_parent(tmp_path):
    """Even when that is killed in the middle of a call that holds the interpreter lock."""
    call = "re.match('(a+)+$', 'a' * 60 + 'b')"
    spec = function(tmp_path, f"import pathlib, re\npathlib.Path({str(tmp_path / 'in')!r}).touch()\n{call}")
    script = (
        "import sys\n"
        "from trialign.algorithms.batch import Prompt\n"
        "from trialign.algorithms.rewards.functions import RewardFunction\n"
        "reward = RewardFunction(sys.argv[1])\nprint(reward._process.pid, flush=True)\n"
        "reward.score([Prompt(0, [1], 'x')], ['y'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, spec], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not (tmp_path / "in").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        while _running(child):
            assert time.monotonic() < deadline, "the reward process outlived its parent"
            time.sleep(0.1)
    finally:
        if _running(child):
            os.kill(child, signal.SIGKILL)


def _running(pid: int) -> bool:
    """False too for a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_running_statistics_equal_those_of_all_numbers_at_once():
    draw = random.Random(0)
    batches = [[draw.gauss(5, 3) for _ in range(n)] for n in (1, 7, 64, 3)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    whole = [value for batch in batches for value in batch]
    assert moments.mean == pytest.approx(statistics.fmean(whole), rel=1e-12)
    assert moments.deviation == pytest.approx(statistics.pstdev(whole), rel=1e-12)


def test_rewards_are_normalized_then_clipped_then_penalized():
    shape = RewardShaper(normalize=True, clip=1.0, missing_eos_penalty=3.0)
    scores = [0.0, 0.0, 0.0, 10.0]
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    rewards = shape(scores, [True, False, True, True])
    low = (0 - mean) / deviation
    assert rewards == pytest.approx([low, low - 3.0, low, 1.0])
    assert RewardShaper()([3.0, -11.0, 50.0], [True, False, True]) == [3.0, -10.0, 10.0]
    assert RewardShaper(clip=0)([50.0], [True]) == [50.0]


def test_statistics_resume_from_state():
    shape, again = RewardShaper(normalize=True), RewardShaper(normalize=True)
    shape([1.0, 5.0, 2.0], [True] * 3)
    again.load_state(json.loads(json.dumps(shape.state())))
    assert again([4.0, 0.5], [True] * 2) == shape([4.0, 0.5], [True] * 2)
