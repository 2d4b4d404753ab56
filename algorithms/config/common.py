"""The sections that the scripts' configs share; what is one algorithm's own is in the file named after it.

Defaults are those the first paper or the trainers in wide use publish: [O] OpenRLHF, [V] verl, [T] TRL. A 0 or an
empty string turns a thing off where the text says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

from ...engine.config import AUTO, NEW, ContentPath, FilePath
from ...engine.mesh import check_layout
from ...engine.parallel.lora import LoRA
from ...models.config import ModelConfig
from ...models.lora import MOE_TARGETS, TARGETS, Choice

AS_CONFIG = -1.0
"""what config.json says"""


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuses an impossible value, naming it and what is allowed. NaN fails every comparison, so it is refused too."""
    if not holds:
        raise ValueError(f"{name}={value}: must be {allowed}")


@dataclass(frozen=True)
class ModelPaths:
    """The model that is trained."""

    path: ContentPath = ""
    """folder in Hugging Face format, tokenizer included, from which training starts"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute type; optimizer states and master weights are float32 in any case, and begin as precise as the folder"""


@dataclass(frozen=True)
class DataConfig:
    """Rows and how they become tokens."""

    section: ClassVar[str] = "data"  # of the config, as messages name its knobs
    sources: tuple[FilePath, ...] = ()
    """files (.jsonl, .json, .csv, .tsv, .parquet), folders of them or by `datasets`, hub names (name:config:split)"""
    probabilities: str = ""
    """how often each source is drawn from, as 0.5,0.4,0.1 ("": all rows alike)"""
    chat_template: bool = True
    """wrap the messages in the tokenizer's chat template; false feeds the bare text"""
    system_prompt: str = ""
    """system message put before rows that bring none ("": the template's own)"""

    def __post_init__(self) -> None:
        self.weights()

    @property
    def keys(self) -> dict[str, str]:
        """Option -> the column that it names."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_key")}

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
class PromptData(DataConfig):
    """Prompts."""

    prompt_key: str = "prompt"
    """column that holds the prompt: a string, or a list of {role, content} messages"""
    max_prompt_tokens: int = 1024
    """prompts with more tokens, template included, are counted and dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_prompt_tokens >= 1, "max_prompt_tokens", self.max_prompt_tokens, "at least 1")
        require(bool(self.prompt_key), "prompt_key", repr(self.prompt_key), "the name of a column")


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
        require(
            0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 (greedy answers explore nothing)"
        )
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        limit = self.max_new_tokens
        require(
            0 <= self.min_new_tokens <= limit, "min_new_tokens", self.min_new_tokens, f"0 to max_new_tokens={limit}"
        )
        for name in ("samples_per_prompt", "kv_block", "max_running"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


SHAPING = ("normalize", "clip", "missing_eos_penalty")
"""Knobs of what is done to scores before they are learned from."""


@dataclass(frozen=True)
class RewardConfig:
    """Where rewards come from and what is done to them: weighted sum, normalize, clip, penalty."""

    functions: tuple[ContentPath, ...] = ()
    """path/to/file.py:function or module:function: (prompts, completions, **fields) -> one float each"""
    models: tuple[ContentPath, ...] = ()
    """folders of reward models (a decoder with a scalar head) in Hugging Face format"""
    servers: tuple[str, ...] = ()
    """addresses that score by HTTP, as http://host:8000/score of launch/serve_reward.py"""
    weights: tuple[float, ...] = ()
    """weight of each function, then of each model, then of each server (none: 1 each)"""
    time_limit: float = 60.0
    """seconds a function may take for one batch before it is killed, and a server for one request"""
    server_batch: int = 64
    """answers in one request to a server"""
    server_tries: int = 3
    """times a request is made before the server counts as failed; what is no score is not asked for again"""
    on_failure: Literal["stop", "abstain"] = "stop"
    """what a scorer does that fails: it stops the run, or the answers it has no score for are left out of the step"""
    normalize: bool = False
    """subtract the running mean of all rewards so far and divide by their deviation"""
    clip: float = -1.0
    """rewards are clipped to this size, after normalizing (0: off; -1: as convention.preset says, ours 10) [O]"""
    missing_eos_penalty: float = 0.0
    """taken off the reward of an answer cut at max_new_tokens"""

    def __post_init__(self) -> None:
        count = len(self.names)
        if self.weights and len(self.weights) != count:
            kinds = "functions and models" if not self.servers else "functions, models and servers"
            raise ValueError(f"weights={self.weights}: {len(self.weights)} weights for {count} {kinds}")
        require(all(math.isfinite(weight) for weight in self.weights), "weights", self.weights, "finite numbers")
        if len(set(self.names)) != count:
            servers = f", servers={self.servers}" if self.servers else ""
            raise ValueError(f"functions={self.functions}, models={self.models}{servers}: each may be named once")
        for url in self.servers:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"servers={url!r}: must be an address as http://host:8000/score")
        for name in ("server_batch", "server_tries"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for spec in self.functions:
            if not all(spec.rpartition(":")[::2]):
                raise ValueError(f"functions={spec!r}: must be path/to/file.py:function or module:function")
        require(0 < self.time_limit < math.inf, "time_limit", self.time_limit, "above 0 (seconds)")
        allowed = "0 (off) or more, or -1 (as convention.preset says)"
        require(self.clip == -1 or 0 <= self.clip < math.inf, "clip", self.clip, allowed)
        require(0 <= self.missing_eos_penalty < math.inf, "missing_eos_penalty", self.missing_eos_penalty, "0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """Every scorer, in the order of the weights."""
        return self.functions + self.models + self.servers

    def check_given(self) -> None:
        """Raises ValueError where nothing scores."""
        if not self.names:
            raise ValueError("no reward: give reward.functions, reward.models, reward.servers or several")

    def check_time_limit(self, timeout: float, path: str) -> None:
        """Raises ValueError where a function's call or a server's tries of a request may take `timeout` seconds."""
        if self.names and self.time_limit >= timeout:
            raise ValueError(f"{path}.time_limit={self.time_limit:g}: must be below run.timeout={timeout:g}")
        if self.servers and self.time_limit * self.server_tries >= timeout:
            raise ValueError(
                f"{path}.time_limit x {path}.server_tries = {self.time_limit:g} x {self.server_tries}:"
                f" must be below run.timeout={timeout:g}"
            )

    def check_unshaped(self) -> None:
        """Raises ValueError where one of `SHAPING` is set: for scripts that take scores as they are."""
        plain = RewardConfig()
        for name in SHAPING:
            if getattr(self, name) != getattr(plain, name):
                value, default = getattr(self, name), getattr(plain, name)
                raise ValueError(f"reward.{name}={value}: must be {default} here, where scores are taken as they are")


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: world size = tp x pp x dp."""

    tp: int = 1
    """tensor parallelism: ranks that share every matrix"""
    pp: int = 1
    """pipeline parallelism: stages of layers"""
    pp_layers: tuple[int, ...] = ()
    """layers of each pipeline stage (none given: as equal as they can be, the last never the largest)"""
    dp: int = 0
    """data parallelism: copies that share the batch (0: what tp x pp leaves)"""
    ep: int = 1
    """expert parallelism: data-parallel ranks that share one set of experts; of no use to models without"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one"""
    recompute: bool = False
    """keep only each layer's input and compute the rest again in the backward pass"""

    def __post_init__(self) -> None:
        for name, least in (("tp", 1), ("pp", 1), ("dp", 0), ("ep", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters are trained and the weights are frozen (LoRA), kept in 4 bits if asked for (QLoRA)."""

    rank: int = 0
    """rank of the adapters (0: off, the weights themselves are trained)"""
    alpha: float = 32.0
    """adapters are scaled by alpha / rank [T]"""
    rslora: bool = False
    """scale by alpha / √rank instead, which keeps large ranks from learning too slowly"""
    targets: tuple[Choice, ...] = ()
    """matrices that get an adapter (docs/lora.md), or all (none: q k v output, and gate up down if without experts)"""
    dropout: float = 0.0
    """must be 0: ranks could not draw one mask for any layout, and PPO's first ratios would not be 1"""
    quantize: bool = False
    """keep the frozen matrices in NF4 with double quantization, 4.13 bits a weight"""
    adapter: ContentPath = ""
    """PEFT folder with adapters of this very kind that the actor's begin from ("": from none)"""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", self.rank, "0 (off) or more")
        require(
            self.dropout == 0,
            "dropout",
            self.dropout,
            "0: a mask would have to be the same in every layout, and the ratio of two passes 1",
        )
        for name in ("quantize", "adapter"):
            require(not getattr(self, name) or self.rank > 0, name, getattr(self, name), "off where rank is 0")
        LoRA(max(self.rank, 1), self.alpha, self.targets or TARGETS)

    def adapters(self, shape: ModelConfig) -> LoRA | None:
        """What adapters a trained model of this shape gets; None for none."""
        targets = self.targets or (TARGETS if shape.moe is None else MOE_TARGETS)
        return LoRA(self.rank, self.alpha, targets, self.rslora, self.quantize) if self.rank else None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule, over the updates of the whole run; the weights of a mixture's router losses."""

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
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """what a NaN or an infinity in rewards, advantages, losses or gradients does: it stops the run by name, or its
    step is left out: weights, moments, average and schedule stay as they are"""
    max_skipped: int = 10
    """steps left out in a row; one more stops the run"""
    router_aux_coef: float = AS_CONFIG
    """weight of the load-balancing loss of a model with experts (-1: router_aux_loss_coef of its config.json)"""
    router_z_coef: float = 0.0
    """weight of the z-loss of the router of a model with experts (0: off; ST-MoE has 0.001)"""

    def __post_init__(self) -> None:
        require(0 <= self.lr < math.inf, "lr", self.lr, "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "0 or more and below 1")
        require(0 < self.eps < math.inf, "eps", self.eps, "above 0")
        require(self.max_skipped >= 1, "max_skipped", self.max_skipped, "at least 1")
        for name in ("weight_decay", "max_grad_norm"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in ("warmup_ratio", "min_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        aux, z = self.router_aux_coef, self.router_z_coef
        require(
            aux == AS_CONFIG or 0 <= aux < math.inf, "router_aux_coef", aux, "-1 (as config.json says) or 0 or more"
        )
        require(0 <= z < math.inf, "router_z_coef", z, "0 (off) or more")


@dataclass(frozen=True)
class UpdateConfig:
    """How a batch of rows becomes one optimizer step."""

    batch_size: int = 128
    """rows of a step, over all ranks [O]"""
    micro_batch_size: int = 8
    """rows in one forward and backward of a data-parallel rank; changes speed and memory only"""
    micro_batch_tokens: int = 0
    """instead of a number of rows, at most this many tokens a micro-batch (0: by rows)"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off)"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.micro_batch_tokens >= 0, "micro_batch_tokens", self.micro_batch_tokens, "0 (off) or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")

    def check(self, dp: int, longest: int, knob: str, *, even: bool = True) -> None:
        """Cross-checks with the layout and with the most tokens a row may have, which is what `knob` says.

        Args:
            even: every DP rank is to have equally many rows.

        Raises:
            ValueError: naming the knobs and numbers that do not fit.
        """
        if even and self.batch_size % dp:
            raise ValueError(f"update.batch_size={self.batch_size} rows do not divide by dp={dp}")
        if self.batch_size < dp:
            raise ValueError(f"update.batch_size={self.batch_size} rows are fewer than dp={dp}: one a rank at least")
        if 0 < self.micro_batch_tokens < longest:
            raise ValueError(
                f"update.micro_batch_tokens={self.micro_batch_tokens} is less than one row may have: {knob}={longest}"
            )


@dataclass(frozen=True)
class FolderConfig:
    """The folder of a run. One that holds a run already is refused, unless it is said what becomes of that."""

    output: str = "runs/trialign"
    """folder for what the run leaves"""
    resume: str = NEW
    """auto: go on with the run in run.output from its newest whole checkpoint, or begin it where there is none; a
    folder: go on with the run in it, whose config.toml gives the defaults ("": begin a run)"""
    overwrite: bool = False
    """delete the run that run.output holds, and begin anew"""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", repr(self.output), "a folder")
        if self.overwrite and self.resume not in (NEW, AUTO):
            raise ValueError(f"overwrite=True: deletes a run, and resume={self.resume} goes on with one")

    @property
    def folder(self) -> str:
        """Where this run lives: a resumed one stays in its own folder."""
        return self.output if self.resume in (NEW, AUTO) else self.resume


@dataclass(frozen=True)
class RunConfig(FolderConfig):
    """The run itself."""

    output: str = "runs/trialign"
    """folder for logs, checkpoints and the exported model"""
    save_every: int = 50
    """steps between checkpoints (0: only at the end)"""
    keep: int = 2
    """newest checkpoints that stay"""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """where metrics go beside the JSONL file"""
    seed: int = 0
    """seeds shuffling, sampling and new heads"""
    timeout: float = 1800.0
    """seconds that a rank may keep the others waiting before the run ends and the late rank is named"""
    grace: float = 15.0
    """seconds after a request to stop in which the step at hand may still end; one that will not is dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seconds(self.timeout, self.grace)
        require(self.keep >= 1, "keep", self.keep, "at least 1")
        for name in ("save_every", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True)
class EpochRun(RunConfig):
    """A run that goes over its rows in epochs."""

    epochs: int = 1
    """passes over the rows; the last step fills up with rows of one more"""
    steps: int = 0
    """optimizer steps of the run, whatever the epochs (0: the epochs decide)"""
    eval_every: int = 50
    """steps between measurements on the held-out rows (0: only before the first step and after the last)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        for name in ("steps", "eval_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    def total(self, rows: int, batch_size: int) -> int:
        """Optimizer steps over `rows` rows."""
        return self.steps or -(-self.epochs * rows // batch_size)


def require_seconds(timeout: float, grace: float = 0.0) -> None:
    """Raises ValueError where run.timeout or run.grace makes no sense."""
    require(0 < timeout < math.inf, "timeout", timeout, "above 0 (seconds)")
    require(0 <= grace < math.inf, "grace", grace, "0 (a step is dropped at once) or more (seconds)")


def check_time_limits(config: Any, timeout: float, path: str = "") -> None:
    """Raises ValueError where a scorer may take longer than `timeout`, in any section: the other ranks wait for it."""
    for field in fields(config):
        section, name = getattr(config, field.name), f"{path}{field.name}"
        if isinstance(section, RewardConfig):
            section.check_time_limit(timeout, name)
        elif is_dataclass(section):
            check_time_limits(section, timeout, f"{name}.")


def check_given(model: ModelPaths, data: DataConfig, parallel: ParallelConfig, world: int, rows: str) -> int:
    """What every script needs: a model, rows to read, and a layout that makes up the world.

    Args:
        rows: what the sources hold, for the message.

    Returns:
        The size of the data axis.

    Raises:
        ValueError: naming the knob.
    """
    if not model.path:
        raise ValueError("model.path is not given: the folder of the model to start from, in Hugging Face format")
    if not data.sources:
        raise ValueError(f"data.sources is not given: at least one file of {rows}")
    return check_layout(world, tp=parallel.tp, pp=parallel.pp, dp=parallel.dp or None, ep=parallel.ep)
