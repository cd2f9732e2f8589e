"""Everything a run is told: `RunConfig`, and one config class a stage. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from wrinklefree.data.config import DataConfig, FinetuneData, PackingConfig, TextSource
from wrinklefree.distillation.config import DistillationConfig, LayerwiseConfig
from wrinklefree.models.config import Gain, ModelConfig, Placement
from wrinklefree.quantization.options import BackwardProducts, ForwardProducts
from wrinklefree.training.device_kinds import DeviceName
from wrinklefree.training.tracking_config import TrackingConfig
from wrinklefree.utils.config import Config


class SubLNConfig(Config):
    """The root key `subln`: what stage 1 inserts."""

    placement: Placement = "output"
    gain: Gain = "median"
    warmup: bool = False
    """Start at strength 0 (the identity, so the pretrained function is kept) and let the next stages raise it to 1."""
    calibration_tokens: int = Field(default=4096, ge=64)
    """Tokens of held-in text that the gain is measured on."""


class OptimizerConfig(Config):
    """The root key `optimizer`. `training.lr` is AdamW's rate for every type: switching the type keeps the scale."""

    type: Literal["auto", "adamw", "adamw_8bit", "muon", "apollo", "apollo_mini"] = "auto"
    """auto: the stage's optimizer on a GPU, adamw on a CPU (one line says so); anything else is obeyed or refused."""
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon only."""
    rank: int = Field(default=256, ge=1)
    """APOLLO only; apollo_mini always uses 1."""
    update_projection_every: int = Field(default=200, ge=1)
    """APOLLO only: steps between fresh random projections."""


class ScheduleConfig(Config):
    """Learning rate over a run: linear warm-up, then one of four shapes that end with the run."""

    type: Literal["cosine", "linear", "wsd", "two_stage", "constant"] = "cosine"
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    """Overrides `warmup_share`; refused when longer than the run."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final rate over peak rate."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the run spent decaying."""


class WarmupConfig(Config):
    """`training.quantization_warmup`: how lambda (and the SubLN strength, where stage 1 left it at 0) rises to 1."""

    schedule: Literal["none", "linear", "cosine", "sigmoid"] = "none"
    """none: fully quantized from the first step."""
    share: float = Field(default=0.2, gt=0, le=0.8)
    """Share of the run spent rising, at most `max_steps` steps."""
    max_steps: int = Field(default=1000, ge=1)


class CheckpointConfig(Config):
    """`training.checkpoint`."""

    save_interval: int = Field(default=500, ge=1)
    """Steps between resumable checkpoints."""
    keep_last_n: int = Field(default=2, ge=1)
    asynchronous: Literal["auto"] | bool = "auto"
    """Write in a thread from a copy in memory, while training goes on. auto: where there is a GPU."""


class LoggingConfig(Config):
    """`training.logging`."""

    log_interval: int = Field(default=10, ge=1)
    measure_peak: bool = False
    """Measure the device's best rate of matrix products at the start, and log which share of it the run reaches (`mfu`). Known
    GPUs need no measurement: their data sheet's rate is taken."""


class EvaluationConfig(Config):
    """`training.evaluation`: validation during a run."""

    interval: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates at the end only."""
    max_tokens: int = Field(default=20_000, ge=0)
    """Held-out tokens scored each time; 0 leaves bits per byte out."""
    max_examples: int = Field(default=300, ge=0)
    """Validation examples of a task scored each time; 0 leaves the task out."""


class StageConfig(Config):
    """Keys that every training stage has."""

    init_from: str | None = None
    """Artifact to start from; null: found by lineage among the earlier stages' outputs."""
    lr: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    """Rows a micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_seq_length: int = Field(ge=8)
    total_tokens: int | None = Field(default=None, ge=1)
    """Token positions to train on (rows x length); the run's length unless `max_steps` or `epochs` is given."""
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over a task's training examples."""
    grad_clip: float = Field(default=1.0, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    quantization_warmup: WarmupConfig = WarmupConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; masters are always float32. auto: bfloat16 where the device multiplies it in hardware."""
    forward_products: ForwardProducts = "auto"
    """In what a ternary layer multiplies its codes once lambda is 1. float: the compute dtype. int8: exact integers, by our own
    kernels on a CPU, on a GPU of capability 7.5 in hardware (not yet measured). auto: the faster on a CPU, float on a GPU."""
    backward_products: BackwardProducts = "exact"
    """In what the two products of a ternary layer's backward pass are made once lambda is 1. exact: the compute dtype. int8,
    fp8: gradients are rounded to a byte first, which changes them (measured: training_performance.md). int8 needs a GPU of
    capability 7.5, fp8 one of 8.9; a CPU computes the same values, more slowly. Full-precision stages have no such layers."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks (a minute at the start). auto: long bfloat16 runs of one process on a CPU with a C++ compiler."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Steps in a row with a non-finite loss or gradient that are skipped before the run aborts."""

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        lengths = {k: getattr(self, k) for k in ("total_tokens", "max_steps", "epochs")}
        if all(value is None for value in lengths.values()):
            raise ValueError("set one of training.total_tokens, training.max_steps or training.epochs")
        return self


class Stage1Config(Config):
    """Stage 1: insert SubLN and BitLinear; no training."""

    stage: Literal["stage1"] = "stage1"
    init_from: str | None = None
    batch_size: int = Field(default=8, ge=1)
    max_seq_length: int = Field(default=1024, ge=8)
    """Rows of the calibration batch."""


class Stage19Config(StageConfig):
    """Stage 1.9: align hidden states with the base model."""

    stage: Literal["stage1_9"] = "stage1_9"


class PretrainLogitsConfig(Config):
    """`training.logits`: KL of the pretrained model's next-token distribution beside the cross-entropy of stage 2."""

    weight: float = Field(default=0.0, ge=0)
    """Factor of the KL, a mean over the tokens of text. 0 (the paper): no teacher is loaded."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both models; the KL is not multiplied by its square."""
    token_scaling: float | None = Field(default=None, gt=0)
    """As `distillation.logits.token_scaling`."""


class Stage2Config(StageConfig):
    """Stage 2: continue pretraining, ternary."""

    stage: Literal["stage2"] = "stage2"
    logits: PretrainLogitsConfig = PretrainLogitsConfig()


class TeacherConfig(Config):
    """`training.teacher`."""

    source: str = "auto"
    """auto: this model's and task's fp_sft artifact, else the base model with a warning; `base`; or a path."""
    offload: bool = False
    """Keep the teacher on the CPU; its blocks come to the device for each forward pass, its head for the whole step."""
    cache: str | None = None
    """Folder that `scripts/cache_teacher.py` wrote: its logits take the place of the teacher's forward pass."""


class Stage3Config(StageConfig):
    """Stage 3: distil on the task."""

    stage: Literal["stage3"] = "stage3"
    teacher: TeacherConfig = TeacherConfig()


class PretrainConfig(StageConfig):
    """Full-precision pretraining: from scratch, or continued (the control of every ternary run)."""

    stage: Literal["fp_pretrain"] = "fp_pretrain"
    from_scratch: bool = False
    """Random weights and a tokenizer trained on the data, instead of the pretrained model."""


class SftConfig(StageConfig):
    """Fine-tuning on the task with cross-entropy: the teacher (fp_sft) and the baseline to beat (bitnet_sft)."""

    stage: Literal["fp_sft", "bitnet_sft"]


class PipelineConfig(Config):
    """All stages in order, with their controls; each step is the command that a user could type."""

    stage: Literal["bitdistill"] = "bitdistill"
    steps: dict[str, tuple[str, ...]]
    """Step name -> Hydra overrides of that step's command; overrides of the pipeline's own command come after them."""
    controls: bool = True
    """Train the full-precision control, the naive ternary model and BitNet-SFT too, for the table."""
    evaluation_tokens: int = Field(default=50_000, ge=1)
    """Held-out test tokens of the table."""
    export: bool = True
    """End with a verified GGUF file of the ternary model and a sample from the engine that serves it."""
    lr: float | None = Field(default=None, gt=0)
    """This key and those below, given on a pipeline's command, go to every step that has them."""
    batch_size: int | None = Field(default=None, ge=1)
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    max_seq_length: int | None = Field(default=None, ge=8)
    grad_clip: float | None = Field(default=None, gt=0)
    dtype: Literal["auto", "bfloat16", "float32"] | None = None
    forward_products: ForwardProducts | None = None
    backward_products: BackwardProducts | None = None
    activation_checkpointing: bool | None = None
    compile: Literal["auto"] | bool | None = None
    checkpoint: CheckpointConfig | None = None
    logging: LoggingConfig | None = None
    evaluation: EvaluationConfig | None = None


STAGE_CLASSES: dict[str, type[Config]] = {
    "stage1": Stage1Config,
    "stage1_9": Stage19Config,
    "stage2": Stage2Config,
    "stage3": Stage3Config,
    "fp_pretrain": PretrainConfig,
    "fp_sft": SftConfig,
    "bitnet_sft": SftConfig,
    "bitdistill": PipelineConfig,
}
"""`training.stage` -> the class that holds its keys."""

TrainingConfig = Annotated[
    Stage1Config | Stage19Config | Stage2Config | Stage3Config | PretrainConfig | SftConfig | PipelineConfig,
    Field(discriminator="stage"),
]


class InfluenceWeights(Config):
    """Knobs of the influence calculation."""

    lambda_val: float = Field(default=0.1, gt=0)
    """Damping of the curvature, in units of a layer's mean squared gradient norm; `score: dot` does not use it."""
    gamma_val: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest scores in their running average; 1 forgets the earlier ones."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the evidence: towards infinity weights stay at those of `data.sources`."""
    score: Literal["exact", "datainf", "dot"] = "exact"
    """What a source is worth to the probes: with the exact inverse curvature of the sampled gradients, DataInf's
    approximation of it, or none."""
    rows: int = Field(default=32, ge=8)
    """Rows scored of each source and of each probe at an update, over all processes."""


class InfluenceConfig(Config):
    """The root key `influence`: weights of the text sources that follow what helps. Stages 2 and 3, and fp_pretrain."""

    enabled: bool = False
    update_interval: int = Field(default=1000, ge=1)
    """Optimizer steps between updates of the weights."""
    learning_rate: float = Field(default=0.2, gt=0, le=1)
    """Share of the way to the target that the weights go at an update."""
    min_weight: float = Field(default=0.0, ge=0, lt=1)
    """No source's share falls below this."""
    probes: tuple[TextSource, ...] = ()
    """Text that the mixture should serve; `weight` is its share of the score. Empty: what the run is validated on (held-out
    text of its own sources, which makes each of them its own judge; in stage 3 the task's validation examples)."""
    config: InfluenceWeights = InfluenceWeights()


MIXING_STAGES = ("stage2", "stage3", "fp_pretrain")
"""Stages whose text sources influence may weigh."""


class DistributedConfig(Config):
    """The `distributed` group."""

    name: str
    strategy: Literal["single", "fsdp"] = "single"
    prefetch: bool = False
    """fsdp: gather blocks ahead of the one that computes, `prefetch_blocks` of them."""
    prefetch_blocks: int = Field(default=2, ge=1)
    """Each costs the memory of one gathered block."""
    reshard_after_forward: bool = True
    """fsdp: give a block's gathered weights back between forward and backward pass. false: half the traffic, and the
    memory of the whole model in the compute dtype."""
    gather: Literal["auto", "full"] = "auto"
    """fsdp: ternary weights travel as 2-bit codes where they can (auto), or in float32 (full)."""
    optimizer_offload: bool = False
    """fsdp: shards, gradients and optimizer state on the CPU, and the update there."""
    activation_checkpointing: Literal["off", "selective", "full"] = "off"
    """What blocks compute again in the backward pass: nothing, all but matrix products and attention, everything."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """How long a process waits for the others before it gives the run up."""


class GcsConfig(Config):
    """The root key `gcs`."""

    enabled: bool = False
    bucket: str = "wrinklefree-checkpoints"
    experiment_prefix: str = "experiments"


class ResumeConfig(Config):
    """The root key `resume`."""

    skip_completed: bool = True
    """A run whose fingerprint is complete is not trained again."""
    allow_device_change: bool = False
    """Resume although dtype, optimizer, attention backend or compiling now resolve differently (no longer bit-identical)."""


class AuditConfig(Config):
    """The root key `audit`."""

    enabled: bool = True
    directory: str = "training_logs/warnings"


class EstimationConfig(Config):
    """The root key `estimation`: what `estimate=true` assumes of the machine. It never changes a run."""

    device: DeviceName = "h100_80gb"
    """Kind of device, a row of `device_kinds.DEVICE_KINDS`."""
    devices: int | None = Field(default=None, ge=1)
    """How many; null: one, or one node of them where `distributed` shards the model."""
    devices_per_node: int = Field(default=8, ge=1)
    price_per_hour: float | None = Field(default=None, ge=0)
    """US dollars for an hour of one device; null: the table's assumption."""
    efficiency: float | None = Field(default=None, gt=0, le=1)
    """Share of the device's peak that arithmetic reaches; null: the table's assumption."""
    target_share: float | None = Field(default=None, gt=0, le=1)
    """Share of positions that are targets; null: all of a text, the responses of a known task."""


class RunConfig(Config):
    """The whole configuration of one command."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    distributed: DistributedConfig
    distillation: DistillationConfig
    layerwise: LayerwiseConfig = LayerwiseConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    packing: PackingConfig = PackingConfig()
    subln: SubLNConfig = SubLNConfig()
    influence: InfluenceConfig = InfluenceConfig()
    gcs: GcsConfig = GcsConfig()
    resume: ResumeConfig = ResumeConfig()
    audit: AuditConfig = AuditConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(default=42, ge=0)
    seeds: int = Field(default=1, ge=1)
    """Pipelines only: train this many seeds and report means and intervals."""
    output_dir: str = "outputs"
    dry_run: bool = False
    """Compose, resolve inputs, print the plan, exit."""
    estimate: bool = False
    """Print memory, traffic, time and price, and exit; needs no GPU and downloads nothing."""
    estimation: EstimationConfig = EstimationConfig()
    allow_slow: bool = False
    """Run although the estimate on this machine is above 24 hours."""
    skip_recovery: bool = False
    """Start fresh: neither skip a completed run nor resume an interrupted one."""

    @model_validator(mode="after")
    def _cache_serves_the_losses(self) -> "RunConfig":
        if not isinstance(self.training, Stage3Config) or self.training.teacher.cache is None:
            return self
        if self.distillation.gamma_attention != 0:
            raise ValueError(
                f"training.teacher.cache holds logits, and distillation.gamma_attention={self.distillation.gamma_attention} "
                "compares Q, K and V states: set distillation.gamma_attention=0, or training.teacher.cache=null"
            )
        if self.distillation.lambda_logits == 0:
            raise ValueError(
                "training.teacher.cache is given, and distillation.lambda_logits=0 needs no teacher: set "
                "training.teacher.cache=null, or distillation.lambda_logits=10"
            )
        if self.distillation.logits.token_scaling is not None:
            raise ValueError(
                f"distillation.logits.token_scaling={self.distillation.logits.token_scaling:g} needs the teacher's "
                "cross-entropy, and training.teacher.cache holds its largest logits only: set one of them to null"
            )
        if isinstance(self.data, FinetuneData) and self.data.replay is not None:
            raise ValueError(
                "training.teacher.cache holds a task's examples, and data.replay mixes other text in: set data.replay=null "
                "data.replay_share=0, or training.teacher.cache=null"
            )
        return self

    @model_validator(mode="after")
    def _influence_has_a_choice(self) -> "RunConfig":
        if not self.influence.enabled or self.training.stage not in MIXING_STAGES:
            return self
        if isinstance(self.data, FinetuneData):
            text, key = self.data.replay, "data.replay.sources"
        else:
            text, key = self.data, "data.sources"
        count = 0 if text is None else len(text.sources)
        if count < 2:
            raise ValueError(
                f"influence.enabled=true weighs text sources against each other, and data={self.data.name} has {count} in "
                f"{key}: give it two or more, or set influence.enabled=false"
            )
        if self.influence.min_weight * count > 1:
            raise ValueError(
                f"influence.min_weight={self.influence.min_weight:g} for each of {count} sources is more than 1 together: "
                f"set it to {1 / count:.2g} at most"
            )
        return self
