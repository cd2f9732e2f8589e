"""Which dtype a run computes in, and when a CPU run is refused."""

import logging

import pytest
import torch

from wrinklefree.quantization.options import BackwardProducts
from wrinklefree.training.device import (
    Compute,
    check_products,
    choose_compute,
    multiplies_bfloat16,
    peak_flops_per_second,
    refuse_endless_cpu_run,
    training_flops,
)
from wrinklefree.training.device_kinds import kind_by_name
from wrinklefree.utils.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True, "avx512_f": True}, False), ({}, False)],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bfloat16(CPU) is expected


def test_autocast_follows_the_dtype() -> None:
    x = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        with Compute(CPU, dtype).autocast():
            assert (x @ x).dtype == dtype
    assert Compute(CPU, torch.bfloat16).dtype_name == "bfloat16"


def test_an_explicit_dtype_is_obeyed() -> None:
    assert choose_compute("float32").dtype == torch.float32


def test_a_teacher_adds_a_forward_pass() -> None:
    assert training_flops(10, 100, with_teacher=False) == 6000
    assert training_flops(10, 100, with_teacher=True) == 8000


def test_a_run_of_days_on_a_cpu_needs_insisting(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(ConfigError, match=r"about 48\.0 hours.*allow_slow=true"):
        refuse_endless_cpu_run(48 * 3600, allow_slow=False, command_hint="stage 2")
    refuse_endless_cpu_run(48 * 3600, allow_slow=True, command_hint="stage 2")
    refuse_endless_cpu_run(90, allow_slow=False, command_hint="stage 2")
    assert "estimated time 48.0 hours" in caplog.text
    assert "NO GPU: stage 2 runs on the CPU, estimated time 1.5 minutes" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_their_drivers_name(name: str, kind: str | None) -> None:
    found = kind_by_name(name)
    assert (None if found is None else found.name) == kind


def test_a_cpus_peak_is_known_once_it_is_measured() -> None:
    compute = Compute(torch.device("cpu"), torch.float32)
    assert peak_flops_per_second(compute, measure=False) is None
    measured = peak_flops_per_second(compute, measure=True)
    assert measured is not None
    assert 1e9 < measured < 1e14


@pytest.mark.parametrize(
    ("kind", "capability", "instead"),
    [
        ("fp8", (8, 9), None),
        ("fp8", (9, 0), None),
        ("fp8", (8, 6), "int8 or exact"),
        ("fp8", (7, 0), "exact"),
        ("int8", (7, 5), None),
        ("int8", (7, 0), "exact"),
        ("exact", (5, 0), None),
    ],
)
def test_a_gpu_without_the_type_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: BackwardProducts, capability: tuple[int, int], instead: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    if instead is None:
        check_products("float", kind, gpu)
        return
    with pytest.raises(ConfigError) as caught:
        check_products("float", kind, gpu)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"training.backward_products={kind} needs a GPU of capability")
    assert line.endswith(f"has {capability[0]}.{capability[1]}: use training.backward_products={instead}")


def test_forward_products_are_refused_in_their_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ConfigError, match=r"training\.forward_products=int8 .* use training\.forward_products=float$"):
        check_products("int8", "exact", torch.device("cuda", 0))


def test_a_cpu_says_in_one_line_that_nothing_is_gained(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    for instructions, kernels in ((True, False), (False, True)):
        monkeypatch.setattr("wrinklefree.training.device.CPU_MULTIPLIES_INT8", instructions)
        monkeypatch.setattr("wrinklefree.training.device.has_kernels", lambda kernels=kernels: kernels)
        check_products("int8", "int8", CPU)
    monkeypatch.setattr("wrinklefree.training.device.has_kernels", lambda: False)
    check_products("float", "exact", CPU)
    check_products("auto", "exact", CPU)
    assert caplog.text == ""
    check_products("float", "fp8", CPU)
    check_products("float", "int8", CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "training.backward_products=fp8: float8 is emulated on a CPU; use it to see what it costs, exact is faster",
        "training.backward_products=int8: this CPU has no int8 instructions; use it to see what it costs, exact is faster",
    ]
