"""Endless, seeded streams of rows, read and checked before the run, and their eval split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ..config.data import RowData
from .sources import RowReader

Row = TypeVar("Row")


class Mixture:
    """Endless, seeded draws from pools of rows: epochs of one pool, or several pools sampled by weights.

    Args:
        sizes: rows of each pool.
        weights: probability of each pool; empty for one pool.
        rows: noun of the rows, for messages.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, rows: str = "rows"):
        self.sizes, self.weights, self.rows = list(sizes), weights, rows
        self.drawn = 0
        self._seed = seed
        self._order = [_Order(size, (seed, number)) for number, size in enumerate(sizes)]

    def next(self) -> tuple[int, int]:
        """(pool, row in it)."""
        pool = 0
        if self.weights:  # keyed by the draw: the state needs no generator
            pool = int(np.random.default_rng((self._seed, self.drawn)).choice(len(self.weights), p=self.weights))
        self.drawn += 1
        return pool, self._order[pool].next()

    def state(self) -> dict[str, Any]:
        """Positions, for a checkpoint."""
        return {"drawn": self.drawn, "positions": [order.position for order in self._order], "rows": self.sizes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`. ValueError if the pools have changed."""
        if state["rows"] != self.sizes:
            raise ValueError(
                f"the {self.rows} have changed since the checkpoint: {state['rows']} rows, now {self.sizes}"
            )
        self.drawn = state["drawn"]
        for order, position in zip(self._order, state["positions"], strict=True):
            order.position = position


class _Order:
    """Endless shuffled indices below `size`: each epoch is a permutation by seed and epoch."""

    def __init__(self, size: int, seed: tuple[int, ...]):
        self.size, self.seed, self.position = size, seed, 0
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def next(self) -> int:
        epoch, place = divmod(self.position, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng((*self.seed, epoch)).permutation(self.size)
        self.position += 1
        return int(self._permutation[place])


def eval_indices(count: int, fraction: float, seed: int) -> set[int]:
    """Indices below `count` of the eval split: this fraction, at least one, chosen by the seed."""
    order = np.random.default_rng((seed, 0, 0, 1)).permutation(count)
    return set(order[: max(1, round(fraction * count))].tolist())


def split_eval(
    config: RowData, pools: Sequence[Sequence[Row]], seed: int, noun: str
) -> tuple[list[list[Row]], list[tuple[int, int]]]:
    """(the sources' pools without the eval split, its places (pool, row) in order). Raises: as `check_left`."""
    places = [(pool, row) for pool, rows in enumerate(pools) for row in range(len(rows))]
    chosen = {places[i] for i in eval_indices(len(places), config.eval_fraction, seed)}
    rest = [[r for row, r in enumerate(rows) if (pool, row) not in chosen] for pool, rows in enumerate(pools)]
    check_left(config, list(map(len, pools)), list(map(len, rest)), noun)
    return rest, sorted(chosen)


def check_left(config: RowData, before: Sequence[int], left: Sequence[int], noun: str) -> None:
    """Refuse an `eval_fraction` that leaves no training rows, or none of a source with a probability.

    Args:
        before, left: rows of each source, with and without the eval split.
    """
    option = f"{config.section}.eval_fraction={config.eval_fraction}"
    if not any(left):
        raise ValueError(f"{option} of {sum(before)} {noun} leaves none for training")
    for source, count, rest in zip(config.sources, before, left, strict=True):
        if config.probabilities and not rest:
            raise ValueError(
                f"data source {source}: {option} takes all of its {count} {noun}, but"
                f" {config.section}.probabilities sample every source"
            )


class RowStream(Generic[Row]):
    """Endless, seeded stream of rows, the same on every rank.

    Without probabilities all rows form one pool, shuffled each epoch; with them each source is a pool.

    Args:
        load: the rows of a source, including long ones.
        lengths: tokens of each sample of a row; `max_tokens` limits the longest.
        noun: of the rows, in the plural.
        reader: the reader of `load`, whose digests checkpoints keep.

    Raises:
        ValueError: no row is short enough, the eval split takes all rows, or `load` fails.
    """

    def __init__(
        self,
        config: RowData,
        load: Callable[[str], Sequence[Row]],
        lengths: Callable[[Row], Sequence[int]],
        seed: int,
        noun: str = "rows",
        reader: RowReader | None = None,
    ):
        self._reader = reader or RowReader()
        self.limit, self.noun, self.dropped, self.dropped_tokens = config.max_tokens, noun, 0, 0
        weights, section = config.weights(), config.section
        option = f"{section}.max_tokens={config.max_tokens}"

        def short(source: str, needed: bool) -> list[Row]:
            rows = load(source)
            if not rows:
                raise ValueError(f"data source {source}: holds no {noun}")
            kept = [row for row in rows if max(lengths(row)) <= self.limit]
            if not kept and needed:
                least = min(max(lengths(row)) for row in rows)
                raise ValueError(
                    f"data source {source}: all {len(rows)} {noun} are longer than {option};"
                    f" the shortest has {least} tokens"
                )
            self.dropped += len(rows) - len(kept)
            self.dropped_tokens += sum(sum(lengths(row)) for row in rows) - sum(sum(lengths(row)) for row in kept)
            return kept

        alone = len(config.sources) == 1
        pools = [short(source, alone or bool(weights)) for source in config.sources]
        self.eval_rows = [row for source in config.eval_sources for row in short(source, True)]
        if not any(pools):
            raise ValueError(f"{section}.sources: all {noun} are longer than {option}")
        if config.eval_fraction:
            rest, places = split_eval(config, pools, seed, noun)
            self.eval_rows, pools = [pools[pool][row] for pool, row in places], rest
        self.pools = pools if weights else [[row for pool in pools for row in pool]]
        self.tokens = sum(sum(lengths(row)) for row in self.rows())
        self._draws = Mixture([len(pool) for pool in self.pools], weights, seed, noun)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(map(len, self.pools))

    def rows(self) -> Iterator[Row]:
        """The rows of an epoch, unshuffled."""
        return (row for pool in self.pools for row in pool)

    def amount(self) -> str:
        """Number of rows and tokens, for the first lines of a run."""
        return f"{len(self)} {self.noun} of {self.tokens:,} tokens"

    def __str__(self) -> str:
        text = self.amount()
        if self.eval_rows:
            text += f"; {len(self.eval_rows)} for evaluation"
        if self.dropped:
            text += f"; {self.dropped} dropped for more than {self.limit} tokens ({self.dropped_tokens:,} tokens)"
        return text

    def places(self, count: int) -> list[tuple[int, int]]:
        """Draw the next `count` rows: (pool, row) of each."""
        return [self._draws.next() for _ in range(count)]

    def next(self, count: int) -> list[Row]:
        """The next `count` rows."""
        return [self.pools[pool][row] for pool, row in self.places(count)]

    def coming(self, count: int) -> list[tuple[int, int]]:
        """(pool, row) of all rows in the first `count` draws of the run, sorted, each once."""
        here = self._draws.state()
        self._draws.load_state({"drawn": 0, "positions": [0] * len(self.pools), "rows": here["rows"]})
        drawn = sorted(set(self.places(count)))
        self._draws.load_state(here)
        return drawn

    def state(self) -> dict[str, Any]:
        """Positions and digests of the data, for a checkpoint."""
        return self._draws.state() | {"digests": self._reader.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`. ValueError if the data has changed."""
        self._draws.load_state(state)
        self._reader.check(state.get("digests", ()))
