"""The tables of devices and tasks: names, units, and orders of magnitude that a slip of a digit would break."""

from typing import get_args

import pytest

from wrinklefree.data.tasks import TASKS
from wrinklefree.training.device_kinds import DEVICE_KINDS, GIB, DeviceKind, DeviceName
from wrinklefree.training.task_sizes import task_size
from wrinklefree.utils.errors import ConfigError


def test_every_name_has_a_kind() -> None:
    assert set(DEVICE_KINDS) == set(get_args(DeviceName))


@pytest.mark.parametrize("kind", DEVICE_KINDS.values(), ids=lambda kind: kind.name)
def test_figures_are_in_the_units_that_the_class_says(kind: DeviceKind) -> None:
    assert 16 * GIB <= kind.memory <= 200 * GIB
    assert kind.bfloat16_flops > kind.float32_flops > 1e11
    assert kind.memory_bandwidth >= kind.link_bandwidth >= kind.network_bandwidth >= 1e9
    # A weight is read at least once for each product of a token: no device multiplies slower than it reads.
    assert 1 < kind.bfloat16_flops / kind.memory_bandwidth < 1000
    assert 0 < kind.price_per_hour < 20
    assert kind.flops(2) == kind.bfloat16_flops
    assert kind.flops(4) == kind.float32_flops


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_a_size(task: str) -> None:
    size = task_size(task, 1024)
    assert size.examples > 100
    assert 0 < size.response_tokens < size.tokens <= 1024


def test_recall_has_the_examples_that_it_has() -> None:
    assert task_size("recall", 1024).examples == len(TASKS["recall"].load("train"))


def test_rows_cut_examples_and_unknown_tasks_are_refused() -> None:
    assert task_size("cnn_dailymail", 512).tokens == 512
    with pytest.raises(ConfigError, match="does not know the size of task 'mine'"):
        task_size("mine", 128)
