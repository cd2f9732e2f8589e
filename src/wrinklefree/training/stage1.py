"""Stage 1: insert SubLN and BitLinear into the pretrained model (arXiv:2510.13998, eq. 4-5). Nothing is trained."""

from collections.abc import Sequence
from contextlib import closing

from wrinklefree.data.config import FinetuneData
from wrinklefree.data.pretrain_dataset import pretrain_stream
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.training.config import RunConfig, Stage1Config
from wrinklefree.training.stage import Stage
from wrinklefree.utils.tokenizer import TextTokenizer

STAGE = Stage(
    name="stage1",
    title="stage 1: SubLN insertion",
    folder="subln_insertion",
    pointer="stage1_checkpoint",
    reads=(),
    ternary=True,
    sections=("model", "training", "data", "packing", "subln", "seed"),
    objective=None,
)


def insert_subln(config: RunConfig, model: CausalLM, tokenizer: TextTokenizer) -> CausalLM:
    """The ternary model: weights of `model`, gains calibrated on the run's text, warm-ups at their start."""
    return to_bitnet(
        model,
        placement=config.subln.placement,
        gain=config.subln.gain,
        activation_bits=config.model.quantization.activation_bits,
        weight_scale=config.model.quantization.weight_scale,
        dead_zone_bias=config.model.quantization.dead_zone_bias,
        strength=0.0 if config.subln.warmup else 1.0,
        calibration=_calibration_text(config, tokenizer),
    )


def _calibration_text(config: RunConfig, tokenizer: TextTokenizer) -> Sequence[Batch]:
    """At least `subln.calibration_tokens` tokens of training text, where gains are measured at all."""
    training = config.training
    assert isinstance(training, Stage1Config)
    text = config.data.replay if isinstance(config.data, FinetuneData) else config.data
    if config.subln.gain == "ones" or config.subln.placement == "none" or text is None:
        return []
    stream = pretrain_stream(
        text, tokenizer,
        batch_size=training.batch_size, max_seq_length=training.max_seq_length,
        packing=config.packing, seed=config.seed,
    )  # fmt: skip
    batches = -(-config.subln.calibration_tokens // stream.tokens_per_batch)
    with closing(stream):
        return [stream.next_batch() for _ in range(batches)]
