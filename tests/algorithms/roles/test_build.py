"""Roles built from folders, folders refused before any weight is read, and learning-rate schedules."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from layouts import whole_states
from tiny import tiny_chat_model, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.batch import pack
from trialign.algorithms.config.common import OptimizerConfig, ParallelConfig, RolloutConfig
from trialign.algorithms.config.online import OnlineRunConfig
from trialign.algorithms.config.ppo import ActorConfig, CriticConfig, PPOConfig, PPOData, PPOModels
from trialign.algorithms.config.reward import PolicyReward
from trialign.algorithms.roles.build import build_ppo_roles, load_tokenizer, read_shapes, trained_entries
from trialign.algorithms.roles.learner import Learner, Roles
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.lr_schedule import lr_at


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_chat_model(root / "actor")
    tiny_llama(root / "reward", score=True, vocab_size=260)
    tiny_llama(root / "other_vocabulary", score=True, vocab_size=128)
    return root


def config(folders, **changes) -> PPOConfig:
    base = PPOConfig(
        model=PPOModels(path=str(folders / "actor"), dtype="float32"),
        data=PPOData(max_prompt_tokens=100),
        rollout=RolloutConfig(max_new_tokens=50),
        reward=PolicyReward(models=(str(folders / "reward"),)),
    )
    return dataclasses.replace(base, **changes)


def build(settings: PPOConfig) -> tuple[Learner, Learner, Roles]:
    """Actor, critic and all roles."""
    roles = build_ppo_roles(settings, read_shapes(settings, settings.model.critic), build_mesh())
    assert roles.critic is not None
    return roles.actor, roles.critic, roles


@pytest.mark.parametrize("recompute", ["auto", "none", "full"])
def test_trained_models_recompute_where_asked_or_on_cuda(folders, recompute):
    parallel = ParallelConfig(recompute=recompute)
    assert parallel.recompute_on("cuda") == ("none" if recompute == "none" else "full")
    actor, critic, roles = build(config(folders, parallel=parallel))
    assert actor.model.recompute == critic.model.recompute == (recompute == "full")
    assert roles.reference is not None and not roles.reference.model.recompute


def test_roles_are_built_with_their_heads(folders):
    """The critic starts from a reward model where its folder is one's."""
    critic_folder = str(folders / "reward")
    models = PPOModels(str(folders / "actor"), critic=critic_folder, dtype="float32")
    actor, critic, roles = build(config(folders, model=models))
    assert [len(roles.rewards), actor.model.kind, critic.model.kind] == [1, "lm", "score"]
    frozen = [role for role in (roles.reference, *roles.rewards) if role is not None]
    assert len(frozen) == 2 and not any(p.requires_grad for role in frozen for p in role.model.parameters())
    head, reward = critic.model.head, roles.rewards[0].model.head
    assert head is not None and reward is not None and torch.equal(head.weight, reward.weight)
    names = {entry.name.split("/")[0] for entry in trained_entries({"actor": actor, "critic": critic})}
    assert names == {"actor", "critic"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "nowhere"}}, "nowhere: no such folder"),
        ({"model": {"path": "reward"}}, "a causal language model is needed"),
        ({"reward": {"models": "actor"}}, "a model with a score head is needed"),
        ({"model": {"critic": "other_vocabulary"}}, "vocab_size=128, but the actor's is 260"),
        ({"parallel": {"tp": 5}}, "num_heads=4 cannot be sharded over tp=5 ranks; allowed tp: 1 to 4"),
        ({"parallel": {"pp": 2, "pp_layers": (1, 2)}}, r"parallel.pp_layers=\[1, 2\]"),
        ({"parallel": {"pp": 5}}, "num_layers=4 cannot be shared by pp=5; allowed pp: 1 to 4"),
        ({"rollout": {"max_new_tokens": 200}}, "= 300: .* has positions for 256"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folders, changes, message):
    settings, given = config(folders), changes.get("reward", {})
    paths = {key: str(folders / name) for key, name in changes.get("model", {}).items()}
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, **paths),
        reward=PolicyReward(models=(str(folders / given.get("models", "reward")),)),
        parallel=ParallelConfig(**changes.get("parallel", {})),
        rollout=dataclasses.replace(settings.rollout, **changes.get("rollout", {})),
    )
    with pytest.raises(ValueError, match=message):
        read_shapes(settings, settings.model.critic)


def test_dynamic_ntk_limits_the_actor_and_not_reward_models(tmp_path):
    """150 tokens with 16 positions: a reward model may exceed its positions, an actor may not."""
    keys: dict[str, Any] = {"vocab_size": 260, "max_position_embeddings": 16}
    keys |= {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    tiny_llama(tmp_path / "actor", vocab_size=260)
    tiny_llama(tmp_path / "reward", score=True, **keys)
    read_shapes(config(tmp_path))
    tiny_llama(tmp_path / "actor", **keys)
    with pytest.raises(ValueError, match="= 150: .*actor has positions for 16"):
        read_shapes(config(tmp_path))


def test_router_coefficients_are_those_of_the_options(folders):
    """Not config.json's; refused where a model has no experts."""
    folder = str(tiny_mixtral(folders / "moe", vocab_size=260, router_aux_loss_coef=0.5))
    optimizer = OptimizerConfig(router_aux_coef=0.0, router_z_coef=0.25)
    functions = PolicyReward(functions=("r.py:f",))
    plain = config(folders, model=PPOModels(folder, dtype="float32"), reward=functions)
    actor, critic, _ = build(dataclasses.replace(plain, actor=ActorConfig(optimizer=optimizer)))
    for learner, given in ((actor, optimizer), (critic, plain.critic.optimizer)):
        moe = learner.model.config.moe
        assert moe is not None and (moe.aux_coef, moe.z_coef) == (given.router_aux_coef, given.router_z_coef)
    for option, value in (("router_aux_coef", 0.5), ("router_z_coef", 1e-3)):
        with pytest.raises(ValueError, match=f"{option}={value}: .* actor model has no experts"):
            given = dataclasses.replace(OptimizerConfig(), **{option: value})
            build(config(folders, actor=ActorConfig(optimizer=given)))
        with pytest.raises(ValueError, match=f"{option}=-0.5"):
            dataclasses.replace(OptimizerConfig(), **{option: -0.5})


def test_router_gradients_are_linear_in_the_coefficients(folders):
    """Those of steps whose own loss is 0, and 0 without coefficients."""
    folder = str(tiny_mixtral(folders / "experts", vocab_size=260, router_aux_loss_coef=0.5))
    functions, batch = PolicyReward(functions=("r.py:f",)), pack([[5, 6, 7, 8, 9], [10, 11, 12]])

    def gradients(aux: float, z: float) -> dict[str, Tensor]:
        """Of actor and critic, as one vector each."""
        optimizer = OptimizerConfig(router_aux_coef=aux, router_z_coef=z, max_grad_norm=0.0)
        given = {"actor": ActorConfig(optimizer=optimizer), "critic": CriticConfig(optimizer=optimizer)}
        roles = build(config(folders, model=PPOModels(folder, dtype="float32"), reward=functions, **given))
        for learner in roles[:2]:
            learner.step(batch, lambda part, hidden: hidden.sum() * 0)
        states = [whole_states(role=learner) for learner in roles[:2]]
        return {
            name: torch.cat([tensor.flatten() for key, tensor in own.items() if "/grad/" in key])
            for name, own in zip(given, states, strict=True)
        }

    none, aux, z, both = (gradients(*pair) for pair in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (1.0, 0.75)))
    for name in ("actor", "critic"):
        assert not none[name].any() and min(aux[name].norm(), z[name].norm()) > 1e-4
        torch.testing.assert_close(both[name], 2 * aux[name] + 3 * z[name], rtol=1e-4, atol=1e-6)


def test_unsupported_models_tokenizers_and_outputs_are_refused(folders, tmp_path):
    tiny_chat_model(tmp_path / "model", vocab_size=200)
    path = str(tmp_path / "model")
    settings = config(folders, model=PPOModels(path), reward=PolicyReward(functions=("a:b",)))
    with pytest.raises(ValueError, match="its export would replace .*model, which the run reads"):
        read_shapes(dataclasses.replace(settings, run=OnlineRunConfig(output=str(tmp_path))))
    shape = read_shapes(settings)[path]
    with pytest.raises(ValueError, match="has 259 tokens, the model vocab_size=200"):
        load_tokenizer(path, shape)
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{path}: no tokenizer can be read"):
        load_tokenizer(path, shape)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="GPT2LMHeadModel.*allowed: LlamaForCausalLM"):
        read_shapes(settings)


def test_learning_rate_schedules():
    """Warmup, then cosine or linear to the floor, or constant."""
    rates = [lr_at(step, 100, peak=2.0, schedule="cosine", warmup_ratio=0.1, min_lr_ratio=0.1) for step in range(100)]
    assert [rates[0], rates[9], rates[10], rates[-1]] == pytest.approx([2 / 11, 20 / 11, 2.0, 0.2])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = lr_at(50, 101, peak=1.0, schedule="cosine", warmup_ratio=0, min_lr_ratio=0.0)
    linear = lr_at(5, 11, peak=1.0, schedule="linear", warmup_ratio=0, min_lr_ratio=0.2)
    constant = lr_at(10, 11, peak=1.0, schedule="constant", warmup_ratio=0.1, min_lr_ratio=0.2)
    assert [middle, linear, constant] == pytest.approx([0.5, 0.6, 1.0])
