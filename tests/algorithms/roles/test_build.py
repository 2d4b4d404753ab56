"""What the roles' folders are refused for, before any weight is read; and the schedule of the learning rate."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from tiny import tiny_chat_model, tiny_llama
from tiny_moe import tiny_mixtral
from torch import Tensor
from trialign.algorithms.config.common import OptimizerConfig, ParallelConfig, RolloutConfig
from trialign.algorithms.config.online import OnlineRun
from trialign.algorithms.config.ppo import ActorConfig, PPOConfig, PPOData, PPOModels
from trialign.algorithms.config.reward import PolicyReward
from trialign.algorithms.losses.kl import KLController
from trialign.algorithms.roles.build import build_ppo_roles, load_tokenizer, read_shapes, trained_entries
from trialign.algorithms.roles.learner import Learner, Roles
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.lr_schedule import lr_at
from trialign.models.moe import MoE, Routing


def critic_of(roles: Roles) -> Learner:
    assert roles.critic is not None
    return roles.critic


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


def test_all_roles_are_built(folders):
    settings = config(folders)
    roles = build_ppo_roles(settings, read_shapes(settings, settings.model.critic), build_mesh())
    assert [len(roles.rewards), roles.actor.model.kind, critic_of(roles).model.kind] == [1, "lm", "score"]
    frozen = [role for role in (roles.reference, *roles.rewards) if role is not None]
    assert not any(p.requires_grad for role in frozen for p in role.model.parameters())
    assert {
        entry.name.split("/")[0] for entry in trained_entries({"actor": roles.actor, "critic": critic_of(roles)})
    } == {
        "actor",
        "critic",
    }


def test_critic_starts_from_a_reward_model(folders):
    settings = config(folders, model=PPOModels(str(folders / "actor"), critic=str(folders / "reward"), dtype="float32"))
    roles = build_ppo_roles(settings, read_shapes(settings, settings.model.critic), build_mesh())
    critic, reward = critic_of(roles).model.head, roles.rewards[0].model.head
    assert critic is not None and reward is not None and torch.equal(critic.weight, reward.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "nowhere"}}, "nowhere: no such folder"),
        ({"model": {"path": "reward"}}, "a causal language model is needed"),
        ({"model": {"critic": "other_vocabulary"}}, "vocab_size=128, but the actor's is 260"),
        ({"reward": {"models": "other_vocabulary"}}, "vocab_size=128, but the actor's is 260"),
        ({"reward": {"models": "actor"}}, "a model with a score head is needed"),
        ({"parallel": {"tp": 5}}, "num_heads=4 cannot be sharded over tp=5 ranks; allowed tp: 1 to 4"),
        ({"parallel": {"pp": 2, "pp_layers": (1, 2)}}, r"parallel.pp_layers=\[1, 2\]"),
        ({"parallel": {"pp": 5}}, "num_layers=4 cannot be shared by pp=5; allowed pp: 1 to 4"),
        ({"rollout": {"max_new_tokens": 200}}, "= 300: .* has positions for 256"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folders, changes, message):
    settings = config(folders)
    if "model" in changes:
        paths = {key: str(folders / name) for key, name in changes["model"].items()}
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **paths))
    if "reward" in changes:
        settings = config(folders, reward=PolicyReward(models=(str(folders / changes["reward"]["models"]),)))
    if "parallel" in changes:
        settings = config(folders, parallel=ParallelConfig(**changes["parallel"]))
    if "rollout" in changes:
        settings = config(folders, rollout=RolloutConfig(**changes["rollout"]))
    with pytest.raises(ValueError, match=message):
        read_shapes(settings, settings.model.critic)


def test_dynamic_ntk_bounds_what_is_sampled_and_not_what_is_scored(tmp_path):
    """150 tokens, trained on 16: a reward model reads them whole, an actor cannot grow past its own."""
    keys: dict[str, Any] = {"vocab_size": 260, "max_position_embeddings": 16}
    keys |= {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    tiny_llama(tmp_path / "actor", vocab_size=260)
    tiny_llama(tmp_path / "reward", score=True, **keys)
    read_shapes(config(tmp_path))
    tiny_llama(tmp_path / "actor", **keys)
    with pytest.raises(ValueError, match="= 150: .*actor has positions for 16"):
        read_shapes(config(tmp_path))


def router_gradient(learner: Learner, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the update's router losses give the first router, and what the z-loss alone does, written out."""
    mlp = learner.model.layers["0"].mlp
    assert isinstance(mlp, MoE)
    out, weight = mlp(x, Routing(torch.tensor([0, len(x)]).int(), scale=1 / len(x))), mlp.router.weight
    (got,) = torch.autograd.grad(out, weight, torch.zeros_like(out))
    (z,) = torch.autograd.grad((x @ weight.t()).logsumexp(1).square().mean(), weight)
    return got, z


def test_router_losses_have_the_weights_of_the_options(folders):
    folder = str(tiny_mixtral(folders / "mixture", vocab_size=260, router_aux_loss_coef=0.5))
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    settings = config(folders, model=PPOModels(folder, dtype="float32"), reward=PolicyReward(functions=("r.py:f",)))
    tenth = OptimizerConfig(router_aux_coef=0.1)
    settings = dataclasses.replace(settings, actor=ActorConfig(optimizer=tenth))
    plain = build_ppo_roles(settings, read_shapes(settings, settings.model.critic), build_mesh())
    settings = dataclasses.replace(
        settings,
        actor=ActorConfig(optimizer=OptimizerConfig(router_aux_coef=0.0, router_z_coef=0.25)),
        critic=dataclasses.replace(settings.critic, optimizer=dataclasses.replace(tenth, router_z_coef=0.5)),
    )
    roles = build_ppo_roles(settings, read_shapes(settings, settings.model.critic), build_mesh())
    aux, z = router_gradient(plain.actor, x)
    assert aux.abs().max() > 1e-4 and z.abs().max() > 1e-4
    torch.testing.assert_close(router_gradient(roles.actor, x)[0], 0.25 * z)
    torch.testing.assert_close(router_gradient(critic_of(roles), x)[0], aux + 0.5 * z)
    for built, coefs in ((plain, (0.1, 0.0)), (roles, (0.0, 0.25))):
        moe = built.actor.model.config.moe
        assert moe is not None and (moe.aux_coef, moe.z_coef) == coefs


def test_weights_of_router_losses_that_do_not_fit_are_refused(folders):
    for option, value in (("router_aux_coef", 0.5), ("router_z_coef", 1e-3)):
        optimizer = dataclasses.replace(OptimizerConfig(), **{option: value})
        settings = config(folders, actor=ActorConfig(optimizer=optimizer))
        with pytest.raises(ValueError, match=f"{option}={value}: must be .*, since the actor model has no experts"):
            build_ppo_roles(settings, read_shapes(settings, settings.model.critic), build_mesh())
        with pytest.raises(ValueError, match=f"{option}=-0.5"):
            dataclasses.replace(OptimizerConfig(), **{option: -0.5})


def test_a_tokenizer_larger_than_the_model_is_refused(folders, tmp_path):
    tiny_chat_model(tmp_path, vocab_size=200)
    shape = read_shapes(config(folders, model=PPOModels(str(tmp_path)), reward=PolicyReward(functions=("a:b",))))
    with pytest.raises(ValueError, match="has 259 tokens, the model vocab_size=200"):
        load_tokenizer(str(tmp_path), shape[str(tmp_path)])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer can be read"):
        load_tokenizer(str(tmp_path), shape[str(tmp_path)])


def test_an_export_onto_the_models_own_folder_is_refused(folders, tmp_path):
    tiny_chat_model(tmp_path / "model")
    run = OnlineRun(output=str(tmp_path))
    with pytest.raises(ValueError, match="its export would replace .*model, which the run reads"):
        read_shapes(config(folders, model=PPOModels(str(tmp_path / "model")), run=run))


def test_broken_config_json_is_named(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="GPT2LMHeadModel.*allowed: LlamaForCausalLM"):
        read_shapes(config(folders, model=PPOModels(str(tmp_path))))


def test_warm_up_then_cosine_to_the_floor():
    rates = [lr_at(step, 100, peak=2.0, schedule="cosine", warmup_ratio=0.1, min_lr_ratio=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(2 / 11) and rates[9] == pytest.approx(20 / 11)
    assert rates[10] == 2.0 == max(rates)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = lr_at(50, 101, peak=1.0, schedule="cosine", warmup_ratio=0, min_lr_ratio=0.0)
    assert middle == pytest.approx(0.5)


def test_linear_and_constant_schedules():
    assert lr_at(5, 11, peak=1.0, schedule="linear", warmup_ratio=0, min_lr_ratio=0.2) == pytest.approx(0.6)
    assert lr_at(10, 11, peak=1.0, schedule="constant", warmup_ratio=0.1, min_lr_ratio=0.2) == 1.0


def test_adaptive_kl_moves_toward_its_target_and_no_faster_than_a_fifth():
    controller = KLController(0.1, target=6.0, horizon=1000)
    controller.update(60.0, samples=100)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    controller.update(5.4, samples=100)
    assert controller.coef == pytest.approx(0.102 * (1 - 0.1 * 0.1))
    fixed = KLController(0.1)
    fixed.update(60.0, samples=100)
    assert fixed.coef == 0.1
