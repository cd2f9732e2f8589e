"""`MixedDataset`: several sources behind one DataLoader, in proportions that may change while its workers run.

Which source an item comes from is decided in the main process, by a sampler; workers only fetch what they are told, so
no copy of the weights can go stale in them. New weights hold from a fixed number of items ahead (`lead`) of what
training has used, never "from wherever prefetching happens to be": the sequence of items is then a function of the seed
and of when weights were set, whatever the number of workers, and resume is exact.

Draws are random but even: each source has a credit that grows by its weight with every item and falls by one when it is
drawn, and the draw is among sources with credit, in proportion to it. Credits sum to zero, so a source's count is never
further from the sum of its weights than the number of sources less one.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy
from torch.utils.data import Dataset, Sampler

from cheapertraining.errors import CheaperTrainingError
from cheapertraining.mixture import checked_weights


class Source(Protocol):
    """What a source offers: a fixed number of items by index."""

    def __len__(self) -> int:
        """Items of one epoch."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """The item; called in a worker."""
        ...


class StreamSource:
    """A source that can only be read in order, endlessly: it has no length and is not shuffled.

    Every worker reads the stream itself and passes over items meant for others; what happens to an item afterwards
    (tokenization) is done by one worker only.

    Args:
        open_at: `open_at(n)` iterates from the n-th item on; cheap where the storage can seek. The iterator must not end.
    """

    def __init__(self, open_at: Callable[[int], Iterator[Any]]) -> None:
        self._open_at = open_at
        self._items: Iterator[Any] | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        """A worker opens its own stream."""
        return {"_open_at": self._open_at, "_items": None, "_next": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getitem__(self, ordinal: int) -> Any:
        """The ordinal-th item of the stream.

        Raises:
            CheaperTrainingError: when the stream ends before it.
        """
        if self._items is None or ordinal < self._next:
            self._items, self._next = self._open_at(ordinal), ordinal
        for item in self._items:
            self._next += 1
            if self._next > ordinal:
                return item
        raise CheaperTrainingError(f"the stream ended before item {ordinal}: repeat it, a stream source is endless")


class MixedDataset(Dataset[Any]):
    """Items of several sources in given proportions.

    Pass `sampler` to the DataLoader beside the data set; after each batch call `advance` with the number of items that
    all ranks together have used:

        loader = DataLoader(mixed, batch_size=8, sampler=mixed.sampler, num_workers=4)

    Args:
        sources: Name -> source. Within a source every item comes once an epoch, in an order of that epoch.
        weights: Name -> share of the items, sum 1; a source may have 0.
        seed: Of the draws and the orders.
        shuffle: Whether a source with a length is read in random order.
        lead: Items, over all ranks, by which new weights stay ahead of what is used. At least what workers prefetch:
            workers x prefetch_factor x batch size x ranks, and a batch more.
        rank: This process among `world_size`; of every `world_size` successive items it reads one.
        world_size: Processes that share the items.

    Raises:
        CheaperTrainingError: for no source, an empty one, weights that do not fit the sources or do not sum to 1, or a
            rank outside the world.
    """

    def __init__(
        self,
        sources: Mapping[str, Source | StreamSource],
        weights: Mapping[str, float],
        *,
        seed: int = 0,
        shuffle: bool = True,
        lead: int = 1024,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise CheaperTrainingError(f"rank {rank} of {world_size}: it must be between 0 and {world_size - 1}")
        if lead < 1:
            raise CheaperTrainingError(f"lead is {lead}: it must be at least 1 item")
        self.sources = dict(sources)
        lengths: dict[str, int | None] = {}
        for name, source in self.sources.items():
            lengths[name] = None if isinstance(source, StreamSource) else len(source)
            if lengths[name] == 0:
                raise CheaperTrainingError(f"source {name} is empty: give it items or leave it out")
        self.lead = lead
        self._plan = _Plan(lengths, self._checked(weights), seed=seed, shuffle=shuffle)
        self.sampler = _MixedSampler(self._plan, rank=rank, world_size=world_size)

    def __getitem__(self, key: tuple[str, int]) -> Any:
        """The item that the sampler's key (source, index) names."""
        name, index = key
        return self.sources[name][index]

    def __getstate__(self) -> dict[str, Any]:
        """Workers get the sources only: the plan lives in the main process."""
        return {"sources": self.sources}

    @property
    def position(self) -> int:
        """Items used so far, over all ranks."""
        return self._plan.used

    @property
    def weights(self) -> dict[str, float]:
        """The weights set last; they hold from `lead` items after the position at which they were set."""
        return dict(self._plan.schedule[-1][1])

    @property
    def counts(self) -> dict[str, int]:
        """Items used of each source so far, over all ranks."""
        return self._plan.counts_used()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draw by these weights from item `position + lead` on. Every rank must set the same at the same position.

        Raises:
            CheaperTrainingError: for weights that do not fit, or when the DataLoader has drawn that far already.
        """
        start = self._plan.used + self.lead
        if self._plan.drawn > start:
            raise CheaperTrainingError(
                f"the loader has drawn {self._plan.drawn - self._plan.used} items ahead, lead is {self.lead}: raise lead above "
                "workers x prefetch_factor x batch size x ranks, and call advance after every batch"
            )
        self._plan.set_weights(start, self._checked(weights))

    def advance(self, items: int) -> None:
        """Say that training has used so many more items, over all ranks.

        Raises:
            CheaperTrainingError: for more items than were drawn.
        """
        self._plan.use(items)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the items after `position`; plain numbers and strings."""
        return self._plan.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the position of `state_dict`; iterate over the DataLoader anew afterwards.

        Raises:
            CheaperTrainingError: when it was saved with other sources, lengths or another seed.
        """
        self._plan.load_state_dict(state)

    def _checked(self, weights: Mapping[str, float]) -> dict[str, float]:
        checked = checked_weights(weights)
        missing, unknown = sorted(set(self.sources) - set(checked)), sorted(set(checked) - set(self.sources))
        if missing or unknown:
            problems = [f"no weight for {name}" for name in missing] + [f"no source named {name}" for name in unknown]
            raise CheaperTrainingError(f"{', '.join(problems)}: give every source a weight and every weight a source")
        return {name: checked[name] for name in self.sources}


class _MixedSampler(Sampler[tuple[str, int]]):
    """Keys of this rank's items, endlessly, from the first item not used yet."""

    def __init__(self, plan: "_Plan", *, rank: int, world_size: int) -> None:
        self._plan, self._rank, self._world_size = plan, rank, world_size

    def __iter__(self) -> Iterator[tuple[str, int]]:
        self._plan.rewind()
        while True:
            # All ranks draw alike; each keeps its own of every world_size items.
            keys = [self._plan.draw() for _ in range(self._world_size)]
            yield keys[self._rank]


class _Plan:
    """The sequence of (source, index), as a function of the seed and the schedule of weights."""

    def __init__(
        self, lengths: Mapping[str, int | None], weights: dict[str, float], *, seed: int, shuffle: bool
    ) -> None:
        self.names = list(lengths)
        self.schedule: list[tuple[int, dict[str, float]]] = [(0, weights)]
        self._lengths, self._seed, self._shuffle = dict(lengths), seed, shuffle
        zeros = [0] * len(self.names)
        self._drawn, self._used = _Tally(zeros), _Tally(zeros)
        """Where drawing and training stand; the first runs ahead of the second by what `_ahead` lists."""
        self._ahead: deque[int] = deque()
        self._orders: dict[int, tuple[int, numpy.ndarray]] = {}
        self._uniforms: tuple[int, list[float]] | None = None

    @property
    def used(self) -> int:
        """Items that training has used."""
        return self._used.position

    @property
    def drawn(self) -> int:
        """Items that the DataLoader has asked for."""
        return self._drawn.position

    def counts_used(self) -> dict[str, int]:
        """Items used, by source."""
        return dict(zip(self.names, self._used.counts, strict=True))

    def draw(self) -> tuple[str, int]:
        """The next key."""
        self._accrue(self._drawn)
        point = self._uniform(self._drawn.position) * sum(credit for credit in self._drawn.credits if credit > 0)
        pick = -1
        for source, credit in enumerate(self._drawn.credits):
            if credit > 0:
                pick = source
                point -= credit
                if point < 0:
                    break
        ordinal = self._drawn.counts[pick]
        self._drawn.take(pick)
        self._ahead.append(pick)
        return self.names[pick], self._index(pick, ordinal)

    def use(self, items: int) -> None:
        """See `MixedDataset.advance`."""
        if not 0 <= items <= len(self._ahead):
            raise CheaperTrainingError(
                f"advance({items}): the loader has drawn {len(self._ahead)} items that are not used yet"
            )
        for _ in range(items):
            self._accrue(self._used)
            self._used.take(self._ahead.popleft())
        # Weights that no item can need any more.
        while len(self.schedule) > 1 and self.schedule[1][0] <= self.used:
            del self.schedule[0]

    def set_weights(self, start: int, weights: dict[str, float]) -> None:
        """Weights from item `start` on, which no draw has reached."""
        self.schedule = [entry for entry in self.schedule if entry[0] < start] + [(start, weights)]

    def rewind(self) -> None:
        """Draw again from the first item that is not used."""
        self._drawn = self._used.copy()
        self._ahead.clear()

    def state_dict(self) -> dict[str, Any]:
        """See `MixedDataset.state_dict`."""
        return {
            "identity": self._identity(),
            "position": self.used,
            "counts": list(self._used.counts),
            "credits": list(self._used.credits),
            "schedule": [[start, dict(weights)] for start, weights in self.schedule],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `MixedDataset.load_state_dict`."""
        now = self._identity()
        for key, value in now.items():
            if state["identity"][key] != value:
                raise CheaperTrainingError(
                    f"the saved mixture has {key} {state['identity'][key]}, this one has {value}: they must be equal "
                    "to continue"
                )
        self._used = _Tally(state["counts"], state["credits"])
        self.schedule = [
            (int(start), {name: float(weights[name]) for name in self.names}) for start, weights in state["schedule"]
        ]
        self.rewind()

    def _identity(self) -> dict[str, Any]:
        return {
            "sources": list(self.names),
            "lengths": [self._lengths[name] for name in self.names],
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _accrue(self, tally: "_Tally") -> None:
        """Add the weights that hold at the tally's position to its credits."""
        entry = bisect_right(self.schedule, tally.position, key=lambda item: item[0]) - 1
        start, weights = self.schedule[entry]
        if tally.position == start:
            tally.settle(list(weights.values()))
        tally.credits = [credit + weight for credit, weight in zip(tally.credits, weights.values(), strict=True)]

    def _uniform(self, position: int) -> float:
        """In [0, 1); a function of the seed and the position."""
        block, offset = divmod(position, 1024)
        if self._uniforms is None or self._uniforms[0] != block:
            self._uniforms = (block, numpy.random.default_rng([self._seed, 0, block]).random(1024).tolist())
        return self._uniforms[1][offset]

    def _index(self, source: int, ordinal: int) -> int:
        """The source's `ordinal`-th item over all epochs."""
        length = self._lengths[self.names[source]]
        if length is None:
            return ordinal
        epoch, offset = divmod(ordinal, length)
        if not self._shuffle:
            return offset
        if source not in self._orders or self._orders[source][0] != epoch:
            order = numpy.random.default_rng([self._seed, 1, source, epoch]).permutation(length)
            self._orders[source] = (epoch, order)
        return int(self._orders[source][1][offset])


class _Tally:
    """Counts and credits by source after so many items."""

    def __init__(self, counts: Sequence[int], credits: Sequence[float] | None = None) -> None:
        self.counts = list(counts)
        self.credits = [0.0] * len(self.counts) if credits is None else list(credits)
        self.position = sum(self.counts)

    def copy(self) -> "_Tally":
        return _Tally(self.counts, self.credits)

    def take(self, source: int) -> None:
        """An item of this source was drawn."""
        self.counts[source] += 1
        self.credits[source] -= 1
        self.position += 1

    def settle(self, weights: Sequence[float]) -> None:
        """At a change of weights: a source that now has none keeps no claim; the others share what it was owed."""
        owed = sum(credit for credit, weight in zip(self.credits, weights, strict=True) if weight == 0)
        self.credits = [
            credit + owed * weight if weight > 0 else 0.0 for credit, weight in zip(self.credits, weights, strict=True)
        ]
