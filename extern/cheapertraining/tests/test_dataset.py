"""Proportions, changes while workers run, resume, ranks, and refusals of `MixedDataset`."""

import itertools
import json
from collections import Counter

import pytest
from torch.utils.data import DataLoader, get_worker_info

from cheapertraining import CheaperTrainingError, MixedDataset, StreamSource

WEIGHTS = {"a": 0.6, "b": 0.3, "c": 0.1}


class Numbers:
    """Items (name, index, worker)."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        worker = get_worker_info()
        return self.name, index, -1 if worker is None else worker.id


def mixed(weights=WEIGHTS, **options):
    return MixedDataset({name: Numbers(name, 50) for name in weights}, weights, **{"lead": 64, **options})


def loader(dataset, workers=0):
    return DataLoader(dataset, batch_size=4, sampler=dataset.sampler, num_workers=workers, collate_fn=list)


def take(dataset, batches, workers=0, changes=None):
    """Items of so many batches; `changes` maps a batch number to weights set after it."""
    items = []
    for number, batch in enumerate(itertools.islice(loader(dataset, workers), batches)):
        items.extend(batch)
        dataset.advance(len(batch))
        if changes and number in changes:
            dataset.set_weights(changes[number])
    return items


def test_realised_proportions_are_within_two_items_at_any_time():
    counts = Counter()
    for number, (name, _, _) in enumerate(take(mixed(), 500), start=1):
        counts[name] += 1
        assert all(abs(counts[key] - number * weight) <= 2 for key, weight in WEIGHTS.items())
    assert counts == {"a": 1200, "b": 600, "c": 200}


def test_draws_are_not_periodic():
    """Two equal sources: each rank of two gets both, not one each."""
    names = [name for name, _, _ in take(mixed({"a": 0.5, "b": 0.5}), 500)]
    for rank in (0, 1):
        assert 450 <= names[rank::2].count("a") <= 550
    alternations = sum(first != second for first, second in itertools.pairwise(names))
    assert 900 < alternations < 1900


def test_every_item_once_an_epoch_in_a_new_order():
    indices = [index for _, index, _ in take(mixed({"a": 1.0}), 25)]
    assert sorted(indices[:50]) == sorted(indices[50:]) == list(range(50))
    assert indices[:50] != indices[50:] and indices[:50] != sorted(indices[:50])
    assert [index for _, index, _ in take(mixed({"a": 1.0}, shuffle=False), 25)] == [*range(50), *range(50)]


@pytest.mark.parametrize("workers", [0, 2])
def test_changed_weights_hold_from_lead_in_every_worker(workers):
    changes = {24: {"a": 0.0, "b": 0.5, "c": 0.5}}
    items = take(mixed(), 300, workers, changes)
    start = 25 * 4 + 64
    before, after = Counter(n for n, _, _ in items[:start]), Counter(n for n, _, _ in items[start:])
    assert all(abs(before[name] - start * weight) <= 2 for name, weight in WEIGHTS.items())
    assert after["a"] == 0
    assert abs(after["b"] - after["c"]) <= 3
    for worker in {worker for _, _, worker in items}:
        assert "a" not in {name for name, _, w in items[start:] if w == worker}
    assert len({worker for _, _, worker in items}) == max(workers, 1)


def test_items_do_not_depend_on_the_number_of_workers():
    changes = {10: {"a": 0.1, "b": 0.1, "c": 0.8}, 40: {"a": 1.0, "b": 0.0, "c": 0.0}}
    runs = [[item[:2] for item in take(mixed(), 80, workers, changes)] for workers in (0, 1, 2)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_also_between_a_change_and_its_start(workers):
    changes = {10: {"a": 0.1, "b": 0.1, "c": 0.8}, 30: {"a": 1.0, "b": 0.0, "c": 0.0}}
    whole = [item[:2] for item in take(mixed(), 80, 0, changes)]
    for stop in (1, 11, 15, 27, 33, 60):
        first = mixed()
        taken = [item[:2] for item in take(first, stop, workers, changes)]
        state = json.loads(json.dumps(first.state_dict()))
        second = mixed()
        second.load_state_dict(state)
        later = {number - stop: weights for number, weights in changes.items() if number >= stop}
        taken += [item[:2] for item in take(second, 80 - stop, workers, later)]
        assert taken == whole, f"stopped after {stop} batches"


def test_what_workers_prefetched_but_training_did_not_use_is_drawn_again():
    dataset = mixed()
    unused = iter(loader(dataset, 2))
    first = next(unused)
    dataset.advance(len(first))
    second = next(unused)  # fetched, not used
    del unused
    assert [item[:2] for item in next(iter(loader(dataset)))] == [item[:2] for item in second]
    assert dataset.position == 4
    assert sum(dataset.counts.values()) == 4


def test_ranks_share_the_items():
    whole = [item[:2] for item in take(mixed(), 60)]
    shares = []
    for rank in range(2):
        dataset = mixed(rank=rank, world_size=2)
        items = []
        for batch in itertools.islice(loader(dataset), 30):
            items.extend(batch)
            dataset.advance(2 * len(batch))
        shares.append([item[:2] for item in items])
    assert [item for pair in zip(*shares, strict=True) for item in pair] == whole


def open_squares(start):
    return ((number, number**2) for number in itertools.count(start))


def open_three(start):
    return iter([(number, 0) for number in range(3)][start:])


def test_streams_are_read_in_order_whoever_reads():
    def run(workers, stop=None):
        dataset = MixedDataset({"s": StreamSource(open_squares), "b": Numbers("b", 9)}, {"s": 0.5, "b": 0.5})
        items = take(dataset, stop or 40, workers)
        if stop:
            state = dataset.state_dict()
            dataset = MixedDataset({"s": StreamSource(open_squares), "b": Numbers("b", 9)}, {"s": 0.5, "b": 0.5})
            dataset.load_state_dict(state)
            items += take(dataset, 40 - stop, workers)
        return [item[:2] for item in items]

    assert run(0) == run(2) == run(2, stop=13)
    stream = [item for item in run(0) if item[0] != "b"]
    assert stream == [(number, number**2) for number in range(len(stream))]
    with pytest.raises(CheaperTrainingError, match="the stream ended before item 3"):
        take(MixedDataset({"s": StreamSource(open_three)}, {"s": 1.0}), 1)


def test_a_zero_weight_is_never_drawn_and_may_come_back():
    dataset = mixed({"a": 0.0, "b": 1.0})
    items = take(dataset, 100, 0, {40: {"a": 0.5, "b": 0.5}})
    start = 41 * 4 + 64
    assert {name for name, _, _ in items[:start]} == {"b"}
    assert abs(Counter(name for name, _, _ in items[start:])["a"] - (400 - start) / 2) <= 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.4, "c": 0.0}, "sum to 0.9: they must sum to 1"),
        ({"a": 0.5, "b": 0.5}, "no weight for c: give every source a weight"),
        ({"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1}, "no source named d"),
        ({"a": 1.5, "b": -0.5, "c": 0.0}, "source b has weight -0.5"),
        ({}, "no sources"),
    ],
)
def test_refused_weights(weights, message):
    sources = {name: Numbers(name, 5) for name in "abc"}
    with pytest.raises(CheaperTrainingError, match=message):
        MixedDataset(sources, weights)
    dataset = MixedDataset(sources, {"a": 0.5, "b": 0.25, "c": 0.25})
    with pytest.raises(CheaperTrainingError, match=message):
        dataset.set_weights(weights)
    assert dataset.weights == {"a": 0.5, "b": 0.25, "c": 0.25}


def test_other_refusals():
    with pytest.raises(CheaperTrainingError, match="source b is empty"):
        MixedDataset({"a": [1], "b": []}, {"a": 0.5, "b": 0.5})
    with pytest.raises(CheaperTrainingError, match="rank 2 of 2: it must be between 0 and 1"):
        mixed(rank=2, world_size=2)
    with pytest.raises(CheaperTrainingError, match="lead is 0"):
        mixed(lead=0)
    with pytest.raises(CheaperTrainingError, match=r"advance\(1\): the loader has drawn 0 items"):
        mixed().advance(1)
    with pytest.raises(CheaperTrainingError, match="saved mixture has seed 0, this one has 1"):
        mixed(seed=1).load_state_dict(mixed().state_dict())
    dataset = mixed(lead=2)
    next(iter(loader(dataset)))
    with pytest.raises(CheaperTrainingError, match="drawn 4 items ahead, lead is 2: raise lead"):
        dataset.set_weights(WEIGHTS)
