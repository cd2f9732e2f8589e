"""What `estimate=true` prints: one block of lines a stage, a sum for a pipeline; and Markdown rows for documents."""

from collections.abc import Sequence

from wrinklefree.training.config import PipelineConfig, RunConfig, StageConfig
from wrinklefree.training.device_kinds import PRICES_AS_OF
from wrinklefree.training.estimator import HEADROOM, Estimate, estimate_pipeline, estimate_stage, gib
from wrinklefree.training.memory_advice import advise
from wrinklefree.training.memory_model import PART_TITLES, PARTS

_WIDTH = 28


def run_estimate(config: RunConfig, overrides: Sequence[str]) -> str:
    """The text of `estimate=true` for a stage, or for a pipeline: its steps and their sum over all seeds."""
    if not isinstance(config.training, PipelineConfig):
        return "\n".join(stage_lines(estimate_stage(config)))
    named = estimate_pipeline(config, overrides)
    lines: list[str] = []
    for name, estimate in named:
        lines += [f"== {name}", *stage_lines(estimate), ""]
    return "\n".join([*lines, *_sum_lines(config, [estimate for _, estimate in named])])


def stage_lines(estimate: Estimate) -> list[str]:
    """Everything about one stage."""
    config, workload = estimate.config, estimate.workload
    if workload is None:
        return [
            f"{estimate.title} of {config.model.name}: estimated",
            _line(
                "host memory", f"{gib(estimate.host_memory)} (the pretrained weights and the ternary model, float32)"
            ),
            *(_line("note", note) for note in estimate.notes),
        ]
    dtype = "bfloat16" if workload.compute_bytes == 2 else "float32"
    nodes = "" if estimate.nodes == 1 else f" on {estimate.nodes} nodes"
    where = f"{estimate.devices} x {estimate.device.name}{nodes}"
    lines = [
        f"{estimate.title} of {config.model.name} on {where}, distributed={config.distributed.name}, {dtype}, "
        f"{workload.optimizer}, checkpointing {workload.checkpointing}: estimated",
        _line("micro-batch of a device", f"{workload.rows} x {workload.length} tokens, {workload.accumulation} a step"),
        *(_line("note", note) for note in estimate.notes),
        f"memory of a device at its peak ({estimate.memory.moment})",
        *(_line(PART_TITLES[part], gib(estimate.memory.parts[part])) for part in PARTS if estimate.memory.parts[part]),
        _line("total", f"{gib(estimate.memory.total)} of {gib(estimate.device.memory)}: {_verdict(estimate)}"),
    ]
    if estimate.host_memory:
        lines.append(_line("host memory a process", gib(estimate.host_memory)))
    if not estimate.fits:
        lines += _advice_lines(estimate)
    return [*lines, *_time_lines(estimate)]


def _verdict(estimate: Estimate) -> str:
    context = "the CUDA context and fragmentation" if estimate.device.type == "cuda" else "the C allocator"
    reserve = f"with {HEADROOM[estimate.device.type]:.0%} kept for {context}"
    return f"{'fits' if estimate.fits else 'DOES NOT FIT'}, {reserve}"


def _advice_lines(estimate: Estimate) -> list[str]:
    workload = estimate.workload
    assert workload is not None
    offers = advise(
        estimate.config, device_type=estimate.device.type, memory=estimate.device.memory, shards=workload.shards
    )
    if not offers:
        return [_line("would fit", "nothing of this kind: more or larger devices, or distributed=fsdp_large")]
    return [_line("would fit", f"{' '.join(offer.overrides)} ({gib(offer.peak)})") for offer in offers]


def _time_lines(estimate: Estimate) -> list[str]:
    traffic, workload = estimate.traffic, estimate.workload
    assert workload is not None
    peak = estimate.device.flops(workload.compute_bytes) / 1e12
    lines = ["traffic of a device in a step"]
    if traffic.gathered + traffic.reduced + traffic.host == 0:
        lines = ["traffic of a device in a step: none"]
    if traffic.gathered + traffic.reduced:
        lines.append(_line("weights gathered", gib(traffic.gathered)))
        lines.append(_line("gradients reduced", gib(traffic.reduced)))
    if traffic.host:
        lines.append(_line("to and from the host", gib(traffic.host)))
    arithmetic = f"{_seconds(estimate.arithmetic_seconds)} at {estimate.efficiency:.0%} of {peak:.3g} TFLOP/s"
    beside, after = _seconds(estimate.traffic_seconds), _seconds(estimate.host_seconds)
    step_tokens = estimate.tokens // max(estimate.steps, 1)
    hourly = f"${estimate.price_per_hour:.2f} a device and hour ({_price_source(estimate)})"
    return [
        *lines,
        "time and price",
        _line("arithmetic of a step", f"{arithmetic} ({_efficiency_source(estimate)})"),
        _line("traffic of a step", f"{beside} beside it, {after} after it"),
        _line("a step", f"{_seconds(estimate.step_seconds)} for {step_tokens:,} tokens"),
        _line("the run", f"{estimate.steps:,} steps, {estimate.tokens:,} tokens, {_hours(estimate.hours)}"),
        _line("price", f"${estimate.price:,.2f} at {hourly}"),
    ]


def _efficiency_source(estimate: Estimate) -> str:
    if estimate.config.estimation.efficiency is not None:
        return "given"
    return "measured on small models" if estimate.device.type == "cpu" else "assumed, not measured"


def _price_source(estimate: Estimate) -> str:
    return "given" if estimate.config.estimation.price_per_hour is not None else f"assumed, {PRICES_AS_OF}"


def _sum_lines(config: RunConfig, estimates: Sequence[Estimate]) -> list[str]:
    trained = [estimate for estimate in estimates if estimate.workload is not None]
    seeds = config.seeds
    largest = max(trained, key=lambda estimate: estimate.memory.total)
    hours, price = sum(e.hours for e in trained), sum(e.price for e in trained)
    times = "" if seeds == 1 else f", for {seeds} seeds"
    return [
        f"the whole job of {config.model.name}{times}: estimated",
        _line("largest peak", f"{gib(largest.memory.total)} a device ({largest.title})"),
        _line("all fit", "yes" if all(estimate.fits for estimate in trained) else "NO"),
        _line("tokens", f"{seeds * sum(e.tokens for e in trained):,}"),
        _line("time", _hours(seeds * hours)),
        _line("price", f"${seeds * price:,.2f}"),
    ]


MARKDOWN_HEADER = (
    "| Stage | Memory of a device (estimated) | Batch Size | Seq Length | Devices | Peak at |\n"
    "|---|---|---|---|---|---|"
)


def markdown_row(name: str, estimate: Estimate) -> str:
    """A row of the README's memory tables."""
    if estimate.workload is None:
        training = estimate.config.training
        shape = (training.batch_size, training.max_seq_length) if not isinstance(training, PipelineConfig) else ("", "")
        return (
            f"| {name} | none; {gib(estimate.host_memory)} of the host | {shape[0]} | {shape[1]} | CPU | conversion |"
        )
    training = estimate.config.training
    assert isinstance(training, StageConfig)
    verdict = "" if estimate.fits else " (does not fit)"
    return (
        f"| {name} | {gib(estimate.memory.total)}{verdict} | {training.batch_size} | {training.max_seq_length} | "
        f"{estimate.devices} x {estimate.device.name} | {estimate.memory.moment} |"
    )


def _line(key: str, value: str) -> str:
    return f"  {key:<{_WIDTH}} {value}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2f} ms"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours:,.0f} hours ({hours / 24:.1f} days)"
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
