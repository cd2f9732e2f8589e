"""`scripts/cache_teacher.py`: run stage 3's teacher once over the task's examples and keep its largest logits.

The command takes the overrides of the stage 3 run that the cache is for. It needs the teacher and the data, not the
student, so it can run right after `training=fp_sft`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from wrinklefree.data.config import FinetuneData
from wrinklefree.data.finetune_dataset import encode_examples, task_examples
from wrinklefree.data.packing import collate, pack_whole
from wrinklefree.data.pretrain_dataset import data_fingerprint
from wrinklefree.data.tasks import get_task
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.distillation.teacher_cache import CacheIdentity, TeacherCache
from wrinklefree.distillation.teacher_cache_writer import CacheWriter
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.hf import load_pretrained
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch, Wants
from wrinklefree.training.cached_teacher import cache_identity
from wrinklefree.training.config import RunConfig, Stage3Config
from wrinklefree.training.device import choose_compute
from wrinklefree.training.inputs import StageInput, find_task_teacher
from wrinklefree.training.plan import base_input, data_name
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


def run_cache(config: RunConfig, output: Path, top_k: int) -> str:
    """Write the cache, and return its summary.

    Raises:
        ConfigError: the configuration is not of stage 3 on a task, or `top_k` exceeds the vocabulary.
    """
    training, data = config.training, config.data
    if not isinstance(training, Stage3Config) or not isinstance(data, FinetuneData):
        raise ConfigError("a teacher is cached for stage 3 on a task: give training=stage3_distill data.task=<name>")
    if data.replay is not None:
        raise ConfigError(
            "the cache holds a task's examples, and replayed text never repeats: set data.replay=null data.replay_share=0"
        )
    vocabulary = config.model.architecture.vocab_size
    if not 1 <= top_k <= vocabulary:
        raise ConfigError(f"--top-k {top_k}: expected 1 to {vocabulary}, the vocabulary of model={config.model.name}")
    base = base_input(config)
    source = find_task_teacher(
        source=training.teacher.source,
        model_name=config.model.name,
        output_dir=Path(config.output_dir),
        task=data_name(config),
        base=base,
    )
    logger.info("teacher: %s", source.describe())
    model, tokenizer = _load(source, config)
    identity = cache_identity(
        config, teacher=source.fingerprint, data=data_fingerprint(data, base.fingerprint), top_k=top_k
    )
    compute = choose_compute(training.dtype)
    teacher = Teacher(model.to(compute.device))
    with CacheWriter(output, identity) as writer:
        for number, batch in enumerate(_batches(config, data, training, tokenizer), start=1):
            with compute.autocast():
                hidden = teacher(batch.to(compute.device), Wants())
            writer.add(batch, hidden)
            if number % 100 == 0:
                logger.info("%d documents, %d positions", writer.documents, writer.errors.positions)
    return summary(TeacherCache(output), identity)


def _load(source: StageInput, config: RunConfig) -> tuple[CausalLM, TextTokenizer]:
    if source.path is None:
        return load_pretrained(config.model)
    artifact = read_artifact(source.path, expect_architecture=config.model.architecture, expect_bitnet=False)
    return artifact.load_model(), artifact.load_tokenizer()


def _batches(
    config: RunConfig, data: FinetuneData, training: Stage3Config, tokenizer: TextTokenizer
) -> Iterator[Batch]:
    """Every training example once; how they are packed makes no difference, since documents do not see each other."""
    length = training.max_seq_length
    pieces = encode_examples(get_task(data.task), task_examples(data, "train"), tokenizer, length)
    rows = pack_whole(pieces, length, enabled=config.packing.enabled)
    for start in range(0, len(rows), training.batch_size):
        yield collate(rows[start : start + training.batch_size], length, tokenizer.pad_token_id)


def summary(cache: TeacherCache, identity: CacheIdentity) -> str:
    """What the cache holds and how far it is from the teacher."""
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    errors, temperature = cache.errors, identity.temperature
    lines = [
        f"{cache.folder}: {cache.documents:,} documents, {cache.positions:,} positions ({identity.positions}), "
        f"{identity.top_k} of {identity.vocabulary:,} logits each, {size / 2**20:.1f} MiB",
        f"at temperature {temperature:g}, a position on average:",
        f"  mass outside the {identity.top_k} tokens   {errors['tail']:.4f} (kept as a sum, spread evenly)",
        f"  KL(teacher || cache)         {errors['kl']:.2e} nats, at most {errors['largest_kl']:.2e}: what a student that "
        f"matches the cache lacks, of {errors['uniform_kl']:.2e} that the teacher has over chance",
        f"  error of a student's KL      at most {errors['kl_error_bound']:.2e} nats (beside a constant), if its logits "
        "range as widely as the teacher's",
        f"  error of a logit's gradient  {errors['l1'] / temperature:.2e} summed over the vocabulary, "
        f"of {2 / temperature:.2g} possible",
        f"use it with training.teacher.cache={cache.folder} distillation.gamma_attention=0",
    ]
    return "\n".join(lines)
