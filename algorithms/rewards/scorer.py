"""Scores of rollouts by the reward functions, models and servers of a run, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ...engine.heartbeat import HEARTBEAT
from ...engine.mesh import Mesh
from ...engine.parallel.collectives import run_on_first_rank
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
"""Largest absolute score: rewards are float32."""


class Scorer:
    """All scorers of a run: functions in their own processes, models on the mesh, servers.

    Functions are called once a step, on the first rank, with the whole batch: a function across rows (a rank, a
    diversity bonus) is independent of the layout. Servers likewise, in requests of `server_batch_size` rows.

    Args:
        tokenizer: of the policy.
        encoders: of the reward models with other tokenizers than the policy, by folder (`reward_encoders`): they score
            the decoded text, encoded again.

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
        self._unscored: list[str] = []  # reasons for samples without a score

        def start() -> None:
            skip = config.on_failure == "skip"
            sizes = {"batch": config.server_batch_size, "attempts": config.server_max_attempts}
            for spec in config.functions:
                self.functions.append(
                    RewardFunction(spec, config.time_limit, gpus=config.function_gpus, skip_failures=skip)
                )
            for url in config.servers:
                self.servers.append(RewardClient(url, config.time_limit, skip_failures=skip, **sizes))

        self._on_first_rank(start)

    def check(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Refuse rows that the functions cannot score, before a model is loaded. Collective.

        Args:
            rows: source and columns of each.

        Raises:
            ValueError: on every rank; names the row.
        """
        if self.config.functions:
            named = list(rows)
            self._on_first_rank(lambda: [function.check(named) for function in self.functions])

    def __call__(self, rollouts: Sequence[Rollout], batch: Batch, models: Sequence[Role]) -> dict[str, list[Score]]:
        """Scorer -> its scores, one a sample, in the order of the weights.

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
            by_function = []
            for function in self.functions:
                by_function.append(function.score(prompts, texts))
                HEARTBEAT.tick()  # the other ranks wait
            return by_function + [server.score(prompts, texts, finished) for server in self.servers]

        called = self._on_first_rank(call)
        unread: dict[str, dict[int, str]] = {}  # model -> unreadable samples and reasons
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
        unscored = [r.prompt for r, own in zip(rollouts, zip(*scores, strict=True), strict=True) if set(own) == {None}]
        if unscored and self.mesh.is_main:
            rows = list(dict.fromkeys(prompt.where for prompt in unscored))
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            self._unscored.append(f"no scorer applies to {len(unscored)} responses, of {', '.join(rows[:8])}{more}")
        return dict(zip(self.config.names, scores, strict=True))

    def combined(self, scores: Mapping[str, Sequence[Score]]) -> list[float]:
        """Weighted sum of the applicable scores of each sample; NaN if one failed or none applies."""
        return combine(scores, self.config.weights)

    def failures(self) -> list[str]:
        """Reasons for samples without a score since the last call; on the first rank."""
        lines = []
        for reasons in (self._unscored, *(scorer.failures for scorer in (*self.functions, *self.servers))):
            lines += reasons
            reasons.clear()
        return lines

    def close(self) -> None:
        """Kill the functions' processes."""
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
        """Refuse scores outside float32, or make them NaN with on_failure=skip.

        Args:
            unread: samples that the scorer could not read, and reasons.
            may_lack_score: NaN is allowed: a failure that was reported already.
        """
        for i, (score, rollout) in enumerate(zip(scores, rollouts, strict=True)):
            if score is None or abs(score) <= LARGEST or (may_lack_score and math.isnan(score)):
                continue
            why = unread.get(i, f"returned {score} for {rollout.prompt.where}: must be a finite number of float32")
            reason = f"{scorer}: {why}"
            if self.config.on_failure == "stop":
                raise ValueError(reason)
            scores[i] = math.nan
            if self.mesh.is_main:
                self._unscored.append(reason)

    def _by_model(
        self, name: str, model: Role, rollouts: Sequence[Rollout], batch: Batch, unread: dict[int, str]
    ) -> list[Score]:
        """A model's scores; NaN for samples that its tokenizer cannot encode, which are added to `unread`."""
        if name in self.encoders:
            batch = self._encoded_again(self.encoders[name], rollouts, unread)
        scores = model.scores(batch).tolist()
        return [math.nan if i in unread else score for i, score in enumerate(scores)]

    def _encoded_again(self, encoder: ChatEncoder, rollouts: Sequence[Rollout], unread: dict[int, str]) -> Batch:
        """The rollouts encoded by another tokenizer; a single token for one that cannot be encoded."""
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
        """Result of `work` on the first rank, on every rank; an error of it is raised on every rank."""

        def guarded() -> Any:
            try:
                return work()
            except Exception as error:
                self.close()
                raise error if isinstance(error, ValueError) else ValueError(describe_error(error)) from error

        return run_on_first_rank(guarded, self.mesh.world)


def with_conversations(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The rollouts' prompts; if any rollout has several turns, with the chat in a column `conversation`."""
    if all(len(rollout.turns) == 1 for rollout in rollouts):
        return [rollout.prompt for rollout in rollouts]
    chats = [conversation(rollout, turn_texts(rollout.policy_turns, tokenizer)) for rollout in rollouts]
    return [
        replace(rollout.prompt, fields=rollout.prompt.fields | {"conversation": chat})
        for rollout, chat in zip(rollouts, chats, strict=True)
    ]
