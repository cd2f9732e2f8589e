"""Stage 3 with `training.teacher.cache`: which cache a run may read, and its part in the run's identity."""

from pathlib import Path

from wrinklefree.distillation.combined_loss import resolve_form
from wrinklefree.distillation.teacher_cache import CacheIdentity, TeacherCache
from wrinklefree.training.config import RunConfig, Stage3Config
from wrinklefree.utils.errors import ConfigError


def cache_path(config: RunConfig) -> Path | None:
    """The cache that this run reads in place of running a teacher."""
    training = config.training
    if not isinstance(training, Stage3Config) or training.teacher.cache is None:
        return None
    return Path(training.teacher.cache).expanduser()


def cache_identity(config: RunConfig, *, teacher: str, data: str, top_k: int) -> CacheIdentity:
    """What a cache for this run is made from; `teacher` and `data` are fingerprints."""
    training = config.training
    assert isinstance(training, Stage3Config)
    return CacheIdentity(
        teacher=teacher,
        data=data,
        vocabulary=config.model.architecture.vocab_size,
        max_seq_length=training.max_seq_length,
        temperature=config.distillation.logits.temperature,
        positions=resolve_form(config.distillation).positions,
        top_k=top_k,
    )


def open_cache(config: RunConfig) -> TeacherCache | None:
    """The run's cache, or None where it has none.

    Raises:
        CheckpointError: the folder holds no cache.
    """
    path = cache_path(config)
    return None if path is None else TeacherCache(path)


def checked_digest(config: RunConfig, *, teacher: str, data: str) -> str | None:
    """Identity of the run's cache, which must be of this teacher, data and temperature; None without a cache.

    Raises:
        ConfigError: the cache is another's; names what differs.
    """
    cache = open_cache(config)
    if cache is None:
        return None
    differing = cache.check(cache_identity(config, teacher=teacher, data=data, top_k=cache.identity.top_k))
    if differing is not None:
        raise ConfigError(
            f"training.teacher.cache={cache.folder} was made for another run ({differing}); make one for this run with "
            "scripts/cache_teacher.py, or set training.teacher.cache=null"
        )
    return cache.digest
