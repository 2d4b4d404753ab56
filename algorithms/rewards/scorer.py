"""Rollouts to scores: every reward function, reward model and reward server of a run, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ...engine.mesh import Mesh
from ...engine.parallel.collectives import gather_objects, run_on_all_ranks
from ..batch import Batch, Prompt, Rollout, Score, pack, response_texts, turn_texts
from ..config.reward import RewardConfig
from .encoder import ChatEncoder, completion_of, conversation
from .functions import RewardFunction
from .http import RewardClient
from .shaping import combine
from .worker import describe_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..roles.role import Role

T = TypeVar("T")
LARGEST = 3.4e38
"""Size of the largest score: what is learned from is float32."""


class Scorer:
    """All rewards of a run: functions in processes of their own, models on the mesh, servers elsewhere.

    A function is called once a step, on the first rank, with the whole batch: one that looks across its rows (a rank, a
    diversity bonus) means the same in every layout. So are servers, in requests of `server_batch_size` rows.

    Args:
        tokenizer: the policy's.
        encoders: of the reward models that do not read the policy's tokens, by folder (`reward_encoders`); they score
            what was sampled decoded, and encoded again.

    Raises:
        ValueError: a function cannot be loaded; on every rank.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        mesh: Mesh,
        encoders: Mapping[str, ChatEncoder] | None = None,
    ):
        self.config, self.tokenizer, self.mesh, self.encoders = config, tokenizer, mesh, encoders or {}
        self.functions: list[RewardFunction] = []
        self.servers: list[RewardClient] = []
        self._unscored: list[str] = []  # why samples are without a score that a scorer gave

        def start() -> None:
            abstain, sizes = (
                config.on_failure == "skip",
                {"batch": config.server_batch_size, "tries": config.server_max_attempts},
            )
            for spec in config.functions:
                self.functions.append(RewardFunction(spec, config.time_limit, skip_failures=abstain))
            for url in config.servers:
                self.servers.append(RewardClient(url, config.time_limit, skip_failures=abstain, **sizes))

        self._on_first_rank(start)

    def check(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Before the run, and before a model is loaded: whether the functions can score these rows. Collective.

        Args:
            rows: where each was read, and its columns.

        Raises:
            ValueError: they cannot, on every rank; names the row.
        """
        if self.config.functions:
            named = list(rows)
            self._on_first_rank(lambda: [function.check(named) for function in self.functions])

    def __call__(self, rollouts: Sequence[Rollout], batch: Batch, models: Sequence[Role]) -> dict[str, list[Score]]:
        """Every reward's name -> its scores, one a sample, in the order of the config's weights.

        Args:
            models: the reward models, in the order of the config.

        Raises:
            ValueError: a scorer failed, on every rank; names scorer and rows.
        """

        def call() -> list[list[Score]]:
            if not self.functions and not self.servers:
                return []
            prompts = with_conversations(rollouts, self.tokenizer)
            finished = [rollout.finish == "stop" for rollout in rollouts]
            texts = response_texts(rollouts, self.tokenizer)
            by_function = [function.score(prompts, texts) for function in self.functions]
            return by_function + [server.score(prompts, texts, finished) for server in self.servers]

        called = self._on_first_rank(call)
        unread: dict[str, dict[int, str]] = {}  # model -> samples that it cannot read, and why
        by_model: list[list[Score]] = [
            self._by_model(name, model, rollouts, batch, unread.setdefault(name, {}))
            for name, model in zip(self.config.models, models, strict=True)
        ]
        functions = len(self.config.functions)
        kinds = ["reward function"] * functions + ["reward model"] * len(by_model)
        kinds += ["reward server"] * len(self.config.servers)
        scores = called[:functions] + by_model + called[functions:]
        for kind, name, own in zip(kinds, self.config.names, scores, strict=True):
            self._check(f"{kind} {name}", own, rollouts, unread.get(name, {}), may_lack_score=kind != "reward model")
        nobodys = [r.prompt for r, own in zip(rollouts, zip(*scores, strict=True), strict=True) if set(own) == {None}]
        if nobodys and self.mesh.is_main:
            rows = list(dict.fromkeys(prompt.source or f"prompt {prompt.index}" for prompt in nobodys))
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            self._unscored.append(f"no scorer applies to {len(nobodys)} responses, of {', '.join(rows[:8])}{more}")
        return dict(zip(self.config.names, scores, strict=True))

    def combined(self, scores: Mapping[str, Sequence[Score]]) -> list[float]:
        """The weighted sum of the rewards that apply, sample by sample; NaN where one abstains, or none applies."""
        return combine(scores, self.config.weights)

    def failures(self) -> list[str]:
        """Why samples are without a score, one line each since the last call; on the first rank."""
        lines = []
        for reasons in (self._unscored, *(scorer.failures for scorer in (*self.functions, *self.servers))):
            lines += reasons
            reasons.clear()
        return lines

    def close(self) -> None:
        """Ends the functions' processes."""
        for function in self.functions:
            function.close()

    def _check(
        self,
        scorer: str,
        scores: list[Score],
        rollouts: Sequence[Rollout],
        unread: Mapping[int, str],
        *,
        may_lack_score: bool,
    ) -> None:
        """Refuses scores that float32 has no finite number for, or makes them NaN where a scorer that fails abstains.

        Args:
            unread: samples that the scorer could not read and gave NaN, and why.
            may_lack_score: a NaN is no score, which is the scorer's right, as None is everyone's.
        """
        for i, (score, rollout) in enumerate(zip(scores, rollouts, strict=True)):
            if score is None or abs(score) <= LARGEST or (may_lack_score and math.isnan(score)):
                continue
            where = rollout.prompt.source or f"prompt {rollout.prompt.index}"
            why = unread.get(i, f"gave {score} for {where}: must be a finite number of float32")
            reason = f"{scorer}: {why}"
            if self.config.on_failure == "stop":
                raise ValueError(reason)
            scores[i] = math.nan
            if self.mesh.is_main:
                self._unscored.append(reason)

    def _by_model(
        self,
        name: str,
        model: Role,
        rollouts: Sequence[Rollout],
        batch: Batch,
        unread: dict[int, str],
    ) -> list[Score]:
        """A model's scores; NaN for samples that its own tokenizer cannot encode, which are noted in `unread`."""
        if name in self.encoders:
            batch = self._encoded_again(self.encoders[name], rollouts, unread)
        scores = model.scores(batch).tolist()
        return [math.nan if i in unread else score for i, score in enumerate(scores)]

    def _encoded_again(self, encoder: ChatEncoder, rollouts: Sequence[Rollout], unread: dict[int, str]) -> Batch:
        """The rollouts as another tokenizer's tokens; a single token for one that cannot be encoded."""
        sequences: list[list[int]] = []
        for i, rollout in enumerate(rollouts):
            try:
                texts = turn_texts(rollout.policy_turns, self.tokenizer)
                sequences.append(encoder.within_positions(completion_of(rollout, texts)))
            except ValueError as error:
                unread[i] = str(error)
                sequences.append([encoder.end])
        return pack(sequences).to(self.mesh.device)

    def _on_first_rank(self, work: Callable[[], T]) -> T:
        """What `work` gives there, on every rank; where it raises, whatever it is, every rank does: the others wait."""

        def guarded() -> Any:
            try:
                return work() if self.mesh.is_main else None
            except Exception as error:
                self.close()
                raise error if isinstance(error, ValueError) else ValueError(describe_error(error)) from error

        return gather_objects(run_on_all_ranks(guarded, self.mesh.world), self.mesh.world)[0]


def with_conversations(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The rollouts' prompts; where any rollout has several turns, with the column `conversation`: the whole chat."""
    if all(len(rollout.turns) == 1 for rollout in rollouts):
        return [rollout.prompt for rollout in rollouts]
    chats = [conversation(rollout, turn_texts(rollout.policy_turns, tokenizer)) for rollout in rollouts]
    return [
        replace(rollout.prompt, fields=rollout.prompt.fields | {"conversation": chat})
        for rollout, chat in zip(rollouts, chats, strict=True)
    ]
