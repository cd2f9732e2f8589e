"""`estimate=true`: memory, traffic, time and price of a run, from its configuration alone.

    memory        `memory_model`, by part, at the moment of the peak
    arithmetic    2 operations a weight and token, attention's two products over half of each document, the head at the
                  positions that the loss reads; the backward pass is twice the forward pass, full checkpointing repeats
                  the forward pass, the teacher runs forward only; Muon adds its Newton-Schulz products
    traffic       a sharded model's gathers (twice a micro-batch: forward and backward; tables once) and its reduction of
                  gradients, each (n - 1) / n of the bytes; what goes to the host and back
    time          the longer of arithmetic and traffic, which overlap, plus transfers of an offloaded teacher or
                  optimizer, which do not
    price         devices x hours x the price of an hour

The share of peak arithmetic that is reached (`efficiency`) and the price are assumptions, shown with the result. Not
in the time: loading, evaluation, checkpoints, stage 1. Nothing is downloaded: the sizes of tasks are in
`task_sizes`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wrinklefree.data.config import FinetuneData
from wrinklefree.distillation.combined_loss import resolve_form
from wrinklefree.training.config import PipelineConfig, RunConfig, Stage1Config, Stage3Config, StageConfig
from wrinklefree.training.device_kinds import DEVICE_KINDS, GIB, DeviceKind
from wrinklefree.training.memory_model import (
    Memory,
    Workload,
    block_dtype_bytes,
    count_parameters,
    matrices,
    optimizer_bytes,
    peak_of_run,
)
from wrinklefree.training.optimizers import resolve_optimizer
from wrinklefree.training.plan import steps_for
from wrinklefree.training.stages import STAGES, teacher_kind
from wrinklefree.training.task_sizes import task_size
from wrinklefree.utils.errors import ConfigError

NEWTON_SCHULZ_STEPS = 5
HEADROOM = {"cuda": 0.08, "cpu": 0.30}
"""Share of a device's memory kept for what is not counted, by type. GPU: the CUDA context, the libraries and the
allocator's fragmentation, assumed. CPU: what the C allocator holds on to; resident memory was measured 17 to 45% above
the estimate (`benchmark/estimator_accuracy.py`)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step."""

    gathered: float
    reduced: float
    host: float
    """To the host and back, beside the batch."""


@dataclass(frozen=True)
class Estimate:
    """What one stage will take."""

    title: str
    config: RunConfig
    workload: Workload | None
    """None: the stage trains nothing."""
    memory: Memory
    """Of a device; of the host where nothing is trained."""
    host_memory: int
    """Bytes of one process on the host."""
    device: DeviceKind
    devices: int
    nodes: int
    steps: int
    tokens: int
    traffic: Traffic
    arithmetic_seconds: float
    """Of a step."""
    traffic_seconds: float
    host_seconds: float
    efficiency: float
    price_per_hour: float
    notes: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """Arithmetic and traffic overlap; transfers to the host do not."""
        return max(self.arithmetic_seconds, self.traffic_seconds) + self.host_seconds

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_seconds / 3600

    @property
    def price(self) -> float:
        """US dollars of the whole run."""
        return self.hours * self.devices * self.price_per_hour

    @property
    def usable_memory(self) -> float:
        """Bytes of a device that tensors can have."""
        return self.device.memory * (1 - HEADROOM[self.device.type])

    @property
    def fits(self) -> bool:
        """Whether the peak fits a device."""
        return self.workload is None or self.memory.total <= self.usable_memory


def share_of_device(rows: int, accumulation: int, devices: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches) of the busiest of `devices` that share a step's rows, as `RankShare` does.

    Raises:
        ConfigError: a step has fewer rows than there are devices.
    """
    total = rows * accumulation
    if total < devices:
        raise ConfigError(
            f"a step has {total} rows (training.batch_size={rows} x training.gradient_accumulation_steps={accumulation}) "
            f"and there are {devices} devices: raise one of the two, or give fewer devices"
        )
    largest = math.ceil(total / devices)
    micro_batches = math.ceil(largest / rows)
    return math.ceil(largest / micro_batches), micro_batches


def workload_of(
    config: RunConfig, *, device: DeviceKind, devices: int, target_share: float, documents_a_row: float = 1.0
) -> Workload:
    """The work of one device in a stage that trains, fully quantized."""
    training, distillation, layerwise = config.training, config.distillation, config.layerwise
    assert isinstance(training, StageConfig)
    stage, kind = STAGES[config.training.stage], teacher_kind(config)
    is_stage3, is_layerwise = isinstance(training, Stage3Config), stage.name == "stage1_9"
    relations = is_stage3 and distillation.gamma_attention != 0
    logits_kl = distillation.lambda_logits > 0 if is_stage3 else stage.name == "stage2" and kind != "none"
    teacher = "none" if kind == "none" else "resident"
    if isinstance(training, Stage3Config):
        if training.teacher.offload:
            teacher = "offloaded"
        if training.teacher.cache is not None:
            teacher = "cached"
        if not relations and not logits_kl:
            teacher = "none"
    checkpointing = "full" if training.activation_checkpointing else config.distributed.activation_checkpointing
    compute_bytes = 4 if training.dtype == "float32" else 2
    shards = devices if config.distributed.strategy == "fsdp" else 1
    rows, accumulation = share_of_device(training.batch_size, training.gradient_accumulation_steps, shards)
    return Workload(
        architecture=config.model.architecture,
        device_type=device.type,
        compute_bytes=compute_bytes,
        rows=rows,
        length=training.max_seq_length,
        accumulation=accumulation,
        target_share=1.0 if logits_kl and resolve_form(distillation).positions == "all" else target_share,
        ternary=stage.ternary,
        placement=config.subln.placement,
        quantized_inputs=config.model.quantization.activation_bits is not None,
        quantized=True,
        cross_entropy=not is_layerwise or layerwise.lm_loss_weight > 0,
        logits_kl=logits_kl,
        relation_heads=distillation.attention.relation_heads if relations else 0,
        layerwise=is_layerwise,
        logit_lens=is_layerwise and layerwise.loss_type == "kl",
        teacher=teacher,
        optimizer=resolve_optimizer(config.optimizer, stage.name, device.type).type,
        optimizer_rank=config.optimizer.rank,
        optimizer_offload=config.distributed.optimizer_offload and shards > 1,
        checkpointing=checkpointing,
        shards=shards,
        # FSDP gathers the next block by itself.
        gathered_blocks=1 + (config.distributed.prefetch_blocks if config.distributed.prefetch else 1),
        keeps_gathered=not config.distributed.reshard_after_forward,
        codes_gathered=config.distributed.gather == "auto" and not config.distributed.optimizer_offload,
        documents_a_row=documents_a_row,
    )


def device_count(config: RunConfig) -> int:
    """Devices of the estimate: as given, else one, or one node of them where the model is sharded."""
    given, sharded = config.estimation.devices, config.distributed.strategy == "fsdp"
    if given is not None:
        return given
    return config.estimation.devices_per_node if sharded else 1


def estimate_stage(config: RunConfig) -> Estimate:
    """Memory, traffic, time and price of one stage.

    Raises:
        ConfigError: a length that cannot be known, or several devices without sharding.
    """
    settings, training = config.estimation, config.training
    device, devices = DEVICE_KINDS[settings.device], device_count(config)
    if isinstance(training, Stage1Config):
        return _estimate_stage1(config, device)
    assert isinstance(training, StageConfig)
    if devices > 1 and config.distributed.strategy == "single":
        raise ConfigError(
            f"estimation.devices={devices}, and distributed={config.distributed.name} trains on one: choose "
            "distributed=fsdp_multi or fsdp_large"
        )
    share, documents, batches, notes = _data_shape(config, training)
    workload = workload_of(config, device=device, devices=devices, target_share=share, documents_a_row=documents)
    steps = steps_for(training, batches)
    flops = step_flops(workload)
    traffic = step_traffic(workload)
    efficiency = settings.efficiency if settings.efficiency is not None else device.efficiency
    link = device.link_bandwidth if devices <= settings.devices_per_node else device.network_bandwidth
    price = settings.price_per_hour if settings.price_per_hour is not None else device.price_per_hour
    warms_up = training.quantization_warmup.schedule != "none"
    parameters = count_parameters(config.model.architecture, workload.placement if workload.ternary else None)
    copies = 1 if workload.teacher in {"none", "cached"} else 2
    return Estimate(
        title=STAGES[training.stage].title,
        config=config,
        workload=workload,
        memory=peak_of_run(workload, warms_up=warms_up),
        host_memory=_host_memory(workload, copies * 4 * parameters.total),
        device=device,
        devices=devices,
        nodes=math.ceil(devices / settings.devices_per_node),
        steps=steps,
        tokens=steps * training.batch_size * training.gradient_accumulation_steps * training.max_seq_length,
        traffic=traffic,
        arithmetic_seconds=flops / (device.flops(workload.compute_bytes) * efficiency),
        traffic_seconds=(traffic.gathered + traffic.reduced) / link,
        host_seconds=traffic.host / device.host_bandwidth,
        efficiency=efficiency,
        price_per_hour=price,
        notes=notes,
    )


def estimate_pipeline(config: RunConfig, overrides: Sequence[str]) -> list[tuple[str, Estimate]]:
    """The steps of a pipeline by name, each as `estimate_stage`; for one seed."""
    from wrinklefree.composition import compose_step
    from wrinklefree.training.pipeline import CONTROL_STEPS, WIRING

    training = config.training
    assert isinstance(training, PipelineConfig)
    estimates: list[tuple[str, Estimate]] = []
    tokens = 0
    for name in WIRING:
        if name in CONTROL_STEPS and not training.controls:
            continue
        command = [*overrides, *([f"training.total_tokens={tokens}"] if name == "control_pretrain" else [])]
        estimate = estimate_stage(compose_step(training.steps[name], command).config)
        if name in {"stage1_9", "stage2"}:
            tokens += estimate.tokens
        estimates.append((name, estimate))
    return estimates


def step_flops(workload: Workload) -> float:
    """Operations of one device in a step."""
    a = workload.architecture
    parameters = count_parameters(a, None)
    query = a.num_attention_heads * a.head_dim
    attended = workload.length / workload.documents_a_row / 2
    body = 2 * parameters.hidden + 4 * query * attended * a.num_hidden_layers
    head = 2 * parameters.head * workload.target_share
    student_head = head if workload.cross_entropy or workload.logits_kl or workload.logit_lens else 0.0
    student = 3 * (body + student_head) + (body if workload.checkpointing == "full" else 0.0)
    with_teacher = workload.teacher in {"resident", "offloaded"}
    teacher = (body + (head if workload.logits_kl or workload.logit_lens else 0.0)) if with_teacher else 0.0
    return workload.tokens * workload.accumulation * (student + teacher) + _newton_schulz_flops(workload)


def _newton_schulz_flops(workload: Workload) -> float:
    if workload.optimizer != "muon":
        return 0.0
    sides = [sorted(shape) for shape in matrices(workload.architecture)]
    block = sum(NEWTON_SCHULZ_STEPS * (4 * short**2 * long + 2 * short**3) for short, long in sides)
    return workload.architecture.num_hidden_layers * block / workload.shards


def step_traffic(workload: Workload) -> Traffic:
    """Bytes that one device sends in a step: gathers, reduction of gradients, and what goes through the host."""
    parameters = count_parameters(workload.architecture, workload.placement if workload.ternary else None)
    with_teacher = workload.teacher in {"resident", "offloaded"}
    share = (workload.shards - 1) / workload.shards
    coded = workload.ternary and workload.quantized and workload.codes_gathered
    weight = 0.25 if coded else block_dtype_bytes(workload)
    blocks = weight * parameters.hidden + 4 * parameters.vectors
    gathered = (1 if workload.keeps_gathered else 2) * blocks + 4 * parameters.table
    if with_teacher:
        gathered += workload.compute_bytes * parameters.hidden + 4 * parameters.table
    host = 0.0
    if workload.teacher == "offloaded":
        # Its blocks come once a micro-batch, the rest once a step.
        host += 4 * (parameters.total + (workload.accumulation - 1) * parameters.hidden) / workload.shards
    if workload.optimizer_offload:
        # Gradients leave once; masters come back for each gather, two to a micro-batch.
        host += 4 * parameters.total / workload.shards * (1 + 2 * workload.accumulation)
    return Traffic(
        gathered=workload.accumulation * gathered * share,
        reduced=workload.accumulation * 4 * parameters.total * share,
        host=host,
    )


def _data_shape(config: RunConfig, training: StageConfig) -> tuple[float, float, int | None, tuple[str, ...]]:
    """(share of positions that are targets, documents a row, micro-batches of an epoch or None, notes)."""
    given, data = config.estimation.target_share, config.data
    if not isinstance(data, FinetuneData):
        return (1.0 if given is None else given), 1.0, None, ()
    if given is not None and (training.max_steps is not None or training.total_tokens is not None):
        return given, 1.0, None, ()
    size = task_size(data.task, training.max_seq_length)
    examples = size.examples if data.max_examples is None else min(size.examples, data.max_examples)
    per_row = max(1, int(training.max_seq_length / size.tokens)) if config.packing.enabled else 1
    rows = math.ceil(examples / per_row) / (1 - data.replay_share)
    filled = min(1.0, per_row * size.response_tokens / training.max_seq_length)
    share = data.replay_share + (1 - data.replay_share) * filled
    note = f"task {data.task}: {examples:,} examples of about {size.tokens:.0f} tokens (assumed), {per_row} to a row"
    return (share if given is None else given), float(per_row), math.ceil(rows / training.batch_size), (note,)


def _estimate_stage1(config: RunConfig, device: DeviceKind) -> Estimate:
    """Stage 1 converts on the host: the pretrained weights and the ternary model, in float32."""
    before = 4 * count_parameters(config.model.architecture, None).total
    after = 4 * count_parameters(config.model.architecture, config.subln.placement).total
    return Estimate(
        title=STAGES["stage1"].title,
        config=config,
        workload=None,
        memory=Memory("conversion", {"masters": before + after}),
        host_memory=before + after,
        device=device,
        devices=1,
        nodes=1,
        steps=0,
        tokens=0,
        traffic=Traffic(0.0, 0.0, 0.0),
        arithmetic_seconds=0.0,
        traffic_seconds=0.0,
        host_seconds=0.0,
        efficiency=1.0,
        price_per_hour=0.0,
        notes=("converts on the CPU in minutes and needs no GPU",),
    )


def _host_memory(workload: Workload, loaded: int) -> int:
    """Weights are read on the host; an offloaded teacher and optimizer stay there."""
    if workload.device_type == "cpu":
        return 0
    parameters = count_parameters(workload.architecture, workload.placement if workload.ternary else None)
    kept = 4 * parameters.total // workload.shards if workload.teacher == "offloaded" else 0
    if workload.optimizer_offload:
        kept += (8 * parameters.total + optimizer_bytes(workload)) // workload.shards
    return max(loaded // workload.shards, kept)


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
