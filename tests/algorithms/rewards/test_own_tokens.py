"""Models whose tokenizers differ: reward models read text again with their own, critics and references are refused."""

import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from test_rewards_served import serve_reward  # noqa: F401
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import pre_tokenizers
from trialign.algorithms.batch import Prompt, Rollout, from_rollouts, single_turn
from trialign.algorithms.config.common import ModelPaths, RolloutConfig
from trialign.algorithms.config.ppo import PPOConfig, PPOData, PPOModels
from trialign.algorithms.config.reward import RewardConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.rewards.encoder import ChatEncoder, Completion, Policy, reward_encoders
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.roles.build import build_decoder, load_tokenizer, read_shapes
from trialign.algorithms.roles.role import Role
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import read_config
from trialign.models.folder import assets
from trialign.models.hf.tokenizer import read_tokenizer
from trialign.models.hf.tokenizer_match import chats_differ, tokens_differ

VOCABULARY = 49152  # of SmolLM2's tokenizer
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 512}
CHATS = (
    [{"role": "user", "content": "What is 2+2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! 你好 🙂"},
        {"role": "user", "content": "def f(x):\n    return x ** 2"},
    ],
)
ANSWERS = (("It is 4.", True), (" It is 4.\n", True), ("naïve — и так", True), ("It is", False), ("", True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smollm2) -> Path:
    """A policy with SmolLM2's tokenizer, a reward model with the same, and one of bytes with as large a vocabulary."""
    root = tmp_path_factory.mktemp("tokens")
    for name, score in (("policy", False), ("alike", True)):
        tiny_llama(root / name, score=score, seed=score, **SIZES)
        for asset, path in assets(smollm2).items():
            if asset != "config.json":
                shutil.copyfile(path, root / name / asset)
    tiny_tokenizer(tiny_llama(root / "bytes", score=True, seed=1, **SIZES))
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The same of small tokenizers: a policy of bytes, a reward model of the same bytes, one of bytes in another order
    and under another template, one of another vocabulary's size."""
    root = tmp_path_factory.mktemp("small")
    sizes: Any = SIZES | {"vocab_size": 260}
    tiny_tokenizer(tiny_llama(root / "policy", **sizes))
    for name, size in (("alike", 260), ("bytes", 260), ("large", 300)):
        tiny_tokenizer(tiny_llama(root / name, score=True, seed=1, **sizes | {"vocab_size": size}))
    for name in ("bytes", "large"):
        path = root / name / "tokenizer.json"
        whole = json.loads(path.read_text())
        letters = whole["model"]["vocab"]
        whole["model"]["vocab"] = {letter: i if i < 3 else 261 - i for letter, i in letters.items()}
        path.write_text(json.dumps(whole))
        (root / name / "chat_template.jinja").write_text(
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
    return root


@cache  # a rank's process makes several calls
def policy_of(root: Path) -> Policy:
    folder = str(root / "policy")
    shape = read_config(folder)
    return Policy(folder, shape, load_tokenizer(folder, shape), chat_template=True)


@cache
def encoders_of(root: Path, *names: str) -> dict[str, ChatEncoder]:
    return reward_encoders(names, policy_of(root))


def sampled(root: Path) -> list[Rollout]:
    """ANSWERS to each of CHATS, as the policy would sample them."""
    tokenizer, rollouts = policy_of(root).tokenizer, []
    for number, chat in enumerate(CHATS):
        head: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompt = Prompt(number, head, chat[-1]["content"], source=f"p.jsonl:{number + 1}", messages=tuple(chat))
        for text, finished in ANSWERS:
            tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([2] if finished else [])]
            rollouts.append(single_turn(prompt, tokens, [0.0] * len(tokens), "stop" if finished else "length"))
    return rollouts


def scored(
    rank: int, world: int, root: Path, layout: tuple[int, int, int], other: tuple[str, ...]
) -> dict[str, list[Any]]:
    """Scores of a run: by a reward model of the policy's tokens, by others."""
    tp, pp, dp = layout
    mesh, policy, rollouts = build_mesh(tp=tp, pp=pp, dp=dp), policy_of(root), sampled(root)
    names = [str(root / name) for name in ("alike", *other)]
    encoders = encoders_of(root, *names)
    assert list(encoders) == names[1:]
    decoders = [build_decoder(name, read_config(name), mesh, "float32", head="score") for name in names]
    models = [Role(decoder, sizes=UpdateConfig(micro_batch_size=3)) for decoder in decoders]
    scorer = Scorer(RewardConfig(models=tuple(names)), policy.tokenizer, mesh, encoders)
    return scorer(rollouts, from_rollouts(rollouts), models)


def by_server(module: Any, folder: str, rollouts: list[Rollout]) -> list[float]:
    """Scores of launch/serve_reward.py for the same completions."""
    score = module.Scores(module.ServeConfig(ModelPaths(folder, dtype="float32")), build_mesh())
    rows = zip(rollouts, ANSWERS * len(CHATS), strict=True)
    return score([Completion("row", list(r.prompt.messages), text, end, None) for r, (text, end) in rows])


def test_models_of_other_tokens_score_as_their_servers_in_every_layout(small, serve_reward):  # noqa: F811
    rollouts = sampled(small)
    names = [str(small / name) for name in ("alike", "bytes", "large")]
    alone = {name: by_server(serve_reward, name, rollouts) for name in names}
    for layout in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        for got in run_ranks(scored, 2, small, layout, ("bytes", "large"), timeout=240):
            for name in names:
                assert got[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-6), (layout, name)


def test_models_of_equal_tokens_score_the_sampled_tokens(folders):
    """To the last bit: a text that its tokenizer would cut in another way is not cut anew."""
    name, policy, mesh = str(folders / "alike"), policy_of(folders), build_mesh()
    assert reward_encoders([name], policy._replace(chat_template=False)) == encoders_of(folders, name) == {}
    tokens = [token for letter in "hello" for token in policy.tokenizer(letter)["input_ids"]]
    rollouts = [single_turn(Prompt(0, [1, 2, 3], "hi"), [*tokens, 2], [0.0] * 6, "stop")]
    role = Role(build_decoder(name, read_config(name), mesh, "float32", head="score"))
    batch = from_rollouts(rollouts)
    scorer = Scorer(RewardConfig(models=(name,)), policy.tokenizer, mesh, encoders_of(folders, name))
    assert scorer(rollouts, batch, [role])[name] == role.scores(batch).tolist()


def test_differences_of_tokenizers(folders):
    own, other = policy_of(folders).tokenizer, read_tokenizer(folders / "alike")

    def differences(name: str, value: object) -> tuple[str, str]:
        """Of tokens, and of chats, once the other tokenizer is changed so."""
        before = getattr(other, name)
        setattr(other, name, value)
        found = tokens_differ(own, other, specials=True), chats_differ(own, other)
        setattr(other, name, before)
        return found

    template = str(own.chat_template)
    assert "is token" in tokens_differ(own, read_tokenizer(folders / "bytes"))
    assert differences("pad_token", "<repo_name>") == ("", "")
    assert differences("chat_template", "{# the same #}" + template) == ("", "")
    tokens, chats = differences("eos_token", "<|endoftext|>")
    assert not tokens and "eos_token" in chats
    tokens, chats = differences("chat_template", template.replace("'<|im_end|>'", "' <|im_end|>'"))
    assert not tokens and "(user)" in chats
    other.add_tokens(["<extra>"])
    assert tokens_differ(own, other) == ""
    assert tokens_differ(other, own) == "'<extra>' is token 49152 in one and none in the other"
    core: Any = other.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert "becomes" in tokens_differ(own, other)  # digits are no longer cut one by one


def test_too_long_texts_are_refused_or_unscored(folders):
    name, policy, mesh = str(folders / "bytes"), policy_of(folders), build_mesh()
    text = " ".join(random.Random(0).choices("yes no maybe".split(), k=200))  # 200 tokens of the policy's
    tokens = policy.tokenizer(text)["input_ids"]
    prompt = Prompt(0, [1], "hi", source="p.jsonl:1", messages=tuple(CHATS[0]))
    rollouts = [single_turn(prompt, own, [0.0] * len(own), "length") for own in (tokens[:9], tokens)]
    role = Role(build_decoder(name, read_config(name), mesh, "float32", head="score"))
    stopping, skipping = (RewardConfig(models=(name,), on_failure=how) for how in ("stop", "skip"))
    given = policy.tokenizer, mesh, encoders_of(folders, name)
    with pytest.raises(ValueError, match=r"bytes: p.jsonl:1: \d+ tokens of .*bytes, which has positions for 512"):
        Scorer(stopping, *given)(rollouts, from_rollouts(rollouts), [role])
    short, long = Scorer(skipping, *given)(rollouts, from_rollouts(rollouts), [role])[name]
    assert short == short and long != long


def test_other_tokenizers_of_critic_and_reward_are_refused(folders, tmp_path):
    models = PPOModels(str(folders / "policy"), critic=str(folders / "bytes"), dtype="float32")
    config = PPOConfig(model=models, data=PPOData(max_prompt_tokens=20), rollout=RolloutConfig(max_new_tokens=20))
    with pytest.raises(ValueError, match=r"bytes: its tokenizer is not that of .*policy, and both must read the same"):
        read_shapes(config, models.critic)
    read_shapes(config, str(folders / "alike"))
    bare = tmp_path / "bare"
    shutil.copytree(folders / "bytes", bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="bare: its tokenizer is not that of .*policy .*chat_template=true, but"):
        reward_encoders([str(bare)], policy_of(folders))
    assert list(reward_encoders([str(bare)], policy_of(folders)._replace(chat_template=False))) == [str(bare)]
    unknown = tmp_path / "unknown"  # without a tokenizer nothing but the size can be compared
    tiny_llama(unknown, score=True)
    with pytest.raises(ValueError, match="unknown: vocab_size=96, but the actor's is 49152"):
        reward_encoders([str(unknown)], policy_of(folders))
