import random

import numpy
import torch

from wrinklefree.utils.determinism import deterministic, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), float(torch.rand(()))


def test_one_seed_seeds_every_generator() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(6)
    assert not set(draw()) & set(first)
    seed_everything(5)
    assert draw() == first


def test_a_seed_may_exceed_what_numpy_takes() -> None:
    seed_everything(2**40 + 1)


def test_settings_hold_inside_and_are_put_back() -> None:
    threads = torch.get_num_threads()
    with deterministic(threads + 1):
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(None):
        assert torch.get_num_threads() == threads
