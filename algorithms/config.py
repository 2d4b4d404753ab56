"""Every knob of PPO, with the default its first paper or the trainers in wide use publish.

Where they differ the choice is said beside the knob: [P] PPO (Schulman et al. 2017), [I] InstructGPT (Ouyang et al.
2022), [D] dual clip (Ye et al. 2020), [Z] fine-tuning from human preferences (Ziegler et al. 2019), [O] OpenRLHF,
[V] verl. A 0 or an empty string turns a thing off where the text says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ..engine.mesh import check_layout


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuses an impossible value, naming it and what is allowed. NaN fails every comparison, so it is refused too."""
    if not holds:
        raise ValueError(f"{name}={value}: must be {allowed}")


@dataclass(frozen=True)
class ModelPaths:
    """The four roles' weights."""

    path: str = ""
    """folder in Hugging Face format, tokenizer included: the actor starts from it, the reference stays at it"""
    critic: str = ""
    """folder the critic's body starts from, a reward model's for instance ("": the actor's)"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute type; optimizer states and master weights are float32 in any case"""


@dataclass(frozen=True)
class DataConfig:
    """Prompts, and text for the pretraining mix."""

    sources: tuple[str, ...] = ()
    """prompts: .jsonl or .parquet files, folders saved by `datasets`, or names on the Hugging Face hub (name:split)"""
    probabilities: str = ""
    """how often each source is drawn from, as 0.5,0.4,0.1 ("": all rows alike)"""
    prompt_key: str = "prompt"
    """column that holds the prompt: a string, or a list of {role, content} messages"""
    max_prompt_tokens: int = 1024
    """prompts with more tokens, template included, are counted and dropped"""
    chat_template: bool = True
    """wrap prompts in the tokenizer's chat template; false feeds the bare text"""
    system_prompt: str = ""
    """system message put before prompts that bring none ("": the template's own)"""
    ptx_source: str = ""
    """text for the pretraining mix (actor.ptx_coef), given like a source"""
    ptx_key: str = "text"
    """column of ptx_source that holds the text"""
    ptx_tokens: int = 512
    """tokens of a sequence of the pretraining mix; each minibatch takes as many sequences as it has samples"""

    def __post_init__(self) -> None:
        _require(self.max_prompt_tokens >= 1, "max_prompt_tokens", self.max_prompt_tokens, "at least 1")
        _require(bool(self.prompt_key), "prompt_key", repr(self.prompt_key), "the name of a column")
        _require(self.ptx_tokens >= 2, "ptx_tokens", self.ptx_tokens, "at least 2")
        self.weights()

    def weights(self) -> tuple[float, ...]:
        """`probabilities` as numbers that add up to 1; empty where all rows are drawn alike."""
        if not self.probabilities:
            return ()
        try:
            numbers = tuple(float(part) for part in self.probabilities.split(","))
        except ValueError:
            raise ValueError(
                f"probabilities={self.probabilities!r}: must be numbers with commas, as 0.5,0.4,0.1"
            ) from None
        if len(numbers) != len(self.sources):
            raise ValueError(
                f"probabilities={self.probabilities!r}: {len(numbers)} numbers for {len(self.sources)} sources"
            )
        if not all(0 <= number < math.inf for number in numbers) or sum(numbers) <= 0:
            raise ValueError(f"probabilities={self.probabilities!r}: must be 0 or more, and not all 0")
        return tuple(number / sum(numbers) for number in numbers)


@dataclass(frozen=True)
class RolloutConfig:
    """How the actor answers."""

    temperature: float = 1.0
    """sampling temperature; training uses the same, so that old and new logprobs speak of one distribution"""
    top_k: int = 0
    """sample among the k likeliest tokens (0: all)"""
    top_p: float = 1.0
    """sample among the likeliest tokens that hold this probability (1: all)"""
    max_new_tokens: int = 1024
    """longest answer in tokens"""
    min_new_tokens: int = 0
    """no end of sequence before this many tokens"""
    samples_per_prompt: int = 1
    """answers to each prompt"""
    kv_block: int = 16
    """tokens in a block of the paged KV cache"""
    max_running: int = 256
    """sequences decoded at once on a data-parallel rank; the others wait"""

    def __post_init__(self) -> None:
        _require(
            0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 (greedy answers explore nothing)"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        limit = self.max_new_tokens
        _require(
            0 <= self.min_new_tokens <= limit, "min_new_tokens", self.min_new_tokens, f"0 to max_new_tokens={limit}"
        )
        for name in ("samples_per_prompt", "kv_block", "max_running"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class RewardConfig:
    """Where rewards come from and what is done to them: weighted sum, normalise, clip, penalty."""

    functions: tuple[str, ...] = ()
    """path/to/file.py:function or module:function: (prompts, completions, **fields) -> one float each"""
    models: tuple[str, ...] = ()
    """folders of reward models (a decoder with a scalar head) in Hugging Face format"""
    weights: tuple[float, ...] = ()
    """weight of each function, then of each model (none: 1 each)"""
    time_limit: float = 60.0
    """seconds a function may take for one batch before it is killed and the run stops"""
    normalise: bool = False
    """subtract the running mean of all rewards so far and divide by their deviation"""
    clip: float = 10.0
    """rewards are clipped to this size, after normalising (0: off) [O]"""
    missing_eos_penalty: float = 0.0
    """taken off the reward of an answer cut at max_new_tokens"""

    def __post_init__(self) -> None:
        count = len(self.functions) + len(self.models)
        if self.weights and len(self.weights) != count:
            raise ValueError(f"weights={self.weights}: {len(self.weights)} weights for {count} functions and models")
        _require(all(math.isfinite(weight) for weight in self.weights), "weights", self.weights, "finite numbers")
        if len(set(self.functions + self.models)) != count:
            raise ValueError(f"functions={self.functions}, models={self.models}: each may be named once")
        for spec in self.functions:
            if not all(spec.rpartition(":")[::2]):
                raise ValueError(f"functions={spec!r}: must be path/to/file.py:function or module:function")
        _require(0 < self.time_limit < math.inf, "time_limit", self.time_limit, "above 0 (seconds)")
        _require(0 <= self.clip < math.inf, "clip", self.clip, "0 (off) or more")
        _require(0 <= self.missing_eos_penalty < math.inf, "missing_eos_penalty", self.missing_eos_penalty, "0 or more")


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: world size = tp x pp x dp."""

    tp: int = 1
    """tensor parallelism: ranks that share every matrix"""
    pp: int = 1
    """pipeline parallelism: stages of layers"""
    dp: int = 0
    """data parallelism: copies that share the batch (0: what tp x pp leaves)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one"""
    recompute: bool = False
    """keep only each layer's input and compute the rest again in the backward pass"""

    def __post_init__(self) -> None:
        for name, least in (("tp", 1), ("pp", 1), ("dp", 0)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule, over the updates of the whole run."""

    lr: float = 1e-6
    """peak learning rate [O, V]"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the first and second moments [O]"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.0
    """decoupled decay of matrices; norms and biases are spared [O]"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """decay after the warm-up [O]"""
    warmup_ratio: float = 0.03
    """share of the updates in which lr climbs from 0 to its peak [O]"""
    min_lr_ratio: float = 0.1
    """where the decay ends, as a share of lr [O]"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm (0: off)"""

    def __post_init__(self) -> None:
        _require(0 <= self.lr < math.inf, "lr", self.lr, "0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "0 or more and below 1")
        _require(0 < self.eps < math.inf, "eps", self.eps, "above 0")
        for name in ("weight_decay", "max_grad_norm"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in ("warmup_ratio", "min_lr_ratio"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")


@dataclass(frozen=True)
class ActorConfig:
    """The policy's update."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low [P]"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high; larger than clip_low lets rare tokens rise [P]"""
    dual_clip: float = 0.0
    """bounds the loss of a negative advantage at this many times it (0: off; the paper has 3) [D]"""
    entropy_coef: float = 0.0
    """entropy bonus"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off; [O] has 0.992)"""
    ptx_coef: float = 0.0
    """weight of the pretraining loss mixed in, PPO-ptx (0: off; [I] has 27.8)"""

    def __post_init__(self) -> None:
        _require(0 < self.clip_low < 1, "clip_low", self.clip_low, "above 0 and below 1")
        _require(0 < self.clip_high < math.inf, "clip_high", self.clip_high, "above 0")
        _require(
            self.dual_clip == 0 or 1 < self.dual_clip < math.inf, "dual_clip", self.dual_clip, "0 (off) or above 1"
        )
        _require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")
        _require(0 <= self.ptx_coef < math.inf, "ptx_coef", self.ptx_coef, "0 (off) or more")


@dataclass(frozen=True)
class CriticConfig:
    """The value function's update."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    value_clip: float = 0.5
    """values move at most this far from their old ones (0: off) [O, V]"""
    warmup_steps: int = 0
    """first steps in which only the critic learns"""

    def __post_init__(self) -> None:
        _require(0 <= self.value_clip < math.inf, "value_clip", self.value_clip, "0 (off) or more")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages, KL penalty, and how a batch becomes updates."""

    gamma: float = 1.0
    """discount [I]"""
    lam: float = 0.95
    """GAE's lambda [P, I]; [O] and [V] have 1"""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL to the reference in the per-token reward [O]"""
    kl_coef: float = 0.01
    """weight of that penalty [O]; with kl_target only where it starts"""
    kl_target: float = 0.0
    """the weight adapts so that a sequence's KL stays near this (0: fixed; [Z] has 6)"""
    kl_horizon: int = 10000
    """samples over which the adaptive weight moves [Z]"""
    whiten: bool = True
    """advantages get mean 0 and deviation 1 over the response tokens of the global batch"""
    epochs: int = 1
    """passes over each batch"""
    minibatches: int = 1
    """optimizer steps a pass: the batch is cut into this many equal parts"""
    micro_batch_size: int = 8
    """samples in one forward and backward of a data-parallel rank; changes speed and memory only"""
    micro_batch_tokens: int = 0
    """instead of a number of samples, at most this many tokens a micro-batch (0: by samples)"""
    importance_cap: float = 0.0
    """weights tokens by the ratio of actor to sampler, truncated here (0: off; 2 is usual)"""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for name in ("kl_coef", "kl_target", "importance_cap"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in ("kl_horizon", "epochs", "minibatches", "micro_batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        adapts = self.kl_target > 0
        _require(
            not adapts or self.kl_coef > 0, "kl_coef", self.kl_coef, f"above 0 to adapt to kl_target={self.kl_target}"
        )
        _require(self.micro_batch_tokens >= 0, "micro_batch_tokens", self.micro_batch_tokens, "0 (off) or more")


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    output: str = "runs/ppo"
    """folder for logs, checkpoints and the exported model"""
    steps: int = 100
    """steps of the run; each answers, scores and learns from one batch"""
    prompts_per_step: int = 128
    """prompts of a step, over all ranks: the global batch is this many times rollout.samples_per_prompt"""
    save_every: int = 50
    """steps between checkpoints (0: only at the end)"""
    keep: int = 2
    """newest checkpoints that stay"""
    resume: Annotated[str, tyro.conf.arg(aliases=("--resume",))] = ""
    """folder of a run to go on with, from its newest whole checkpoint; its config.toml gives the defaults"""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """where metrics go beside the JSONL file"""
    seed: int = 0
    """seeds shuffling, sampling and the value head"""
    show: int = 4
    """prompts answered greedily before and after, for the table at the end"""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("save_every", "seed", "show"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(bool(self.output), "output", repr(self.output), "a folder")

    @property
    def folder(self) -> str:
        """Where this run lives: a resumed one stays in its own folder."""
        return self.resume or self.output


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimization from rewards: actor, critic, reference and reward on one 3D-parallel mesh.

    Where defaults come from: [P] PPO, [I] InstructGPT, [D] dual clip, [Z] Ziegler et al., [O] OpenRLHF, [V] verl.
    """

    model: ModelPaths = field(default_factory=ModelPaths)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.run.prompts_per_step * self.rollout.samples_per_prompt


def check(config: PPOConfig, world: int) -> int:
    """Cross-checks that need no model: what must be given, and the sizes that must divide.

    The model's own sizes (heads by tp, layers by pp) are checked by models/config.py's check_layout.

    Returns:
        The size of the data axis.

    Raises:
        ValueError: naming the knobs and numbers that do not fit.
    """
    if not config.model.path:
        raise ValueError("model.path is not given: the folder of the model to align, in Hugging Face format")
    if not config.data.sources:
        raise ValueError("data.sources is not given: at least one file of prompts")
    if not config.reward.functions and not config.reward.models:
        raise ValueError("no reward: give reward.functions, reward.models or both")
    if config.actor.ptx_coef and not config.data.ptx_source:
        raise ValueError(f"actor.ptx_coef={config.actor.ptx_coef} needs text to learn from: give data.ptx_source")
    dp = check_layout(world, tp=config.parallel.tp, pp=config.parallel.pp, dp=config.parallel.dp or None)
    samples = config.batch_size
    parts = config.ppo.minibatches
    batch = (
        f"run.prompts_per_step x rollout.samples_per_prompt = {config.run.prompts_per_step} x"
        f" {config.rollout.samples_per_prompt} = {samples} samples"
    )
    if samples % parts:
        raise ValueError(f"{batch} do not divide by ppo.minibatches={parts}")
    if samples // parts % dp:
        raise ValueError(f"{batch} in ppo.minibatches={parts} parts of {samples // parts} do not divide by dp={dp}")
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if 0 < config.ppo.micro_batch_tokens < longest:
        raise ValueError(
            f"ppo.micro_batch_tokens={config.ppo.micro_batch_tokens} is less than one sample may have:"
            f" data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
        )
    if config.critic.warmup_steps >= config.run.steps:
        raise ValueError(
            f"critic.warmup_steps={config.critic.warmup_steps} leaves the actor none of run.steps={config.run.steps}"
        )
    return dp
