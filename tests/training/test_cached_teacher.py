"""Stage 3 from a cache: what is refused, and that the cache is part of the run's identity."""

from pathlib import Path

import pytest
from tests.distillation.test_teacher_cache import IDENTITY, write

from wrinklefree.composition import compose
from wrinklefree.training.cached_teacher import cache_identity, checked_digest
from wrinklefree.utils.errors import ConfigError

STAGE3 = ("model=tiny", "training=stage3_distill", "data.task=recall")


def test_relations_and_replay_and_no_logits_are_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigError, match="gamma_attention=auto compares Q, K and V states: set .*gamma_attention=0"):
        compose([*STAGE3, "training.teacher.cache=x"])
    with pytest.raises(ConfigError, match="lambda_logits=0 needs no teacher"):
        compose([*STAGE3, "training.teacher.cache=x", "distillation.gamma_attention=0", "distillation.lambda_logits=0"])
    with pytest.raises(ConfigError, match=r"data\.replay mixes other text in: set data\.replay=null"):
        compose([*STAGE3, "data=recall", "training.teacher.cache=x", "distillation.gamma_attention=0"])


def test_a_cache_of_another_teacher_is_refused_and_the_right_one_gives_its_digest(tmp_path: Path) -> None:
    config = compose([*STAGE3, f"training.teacher.cache={tmp_path / 'cache'}", "distillation.gamma_attention=0"]).config
    fitting = cache_identity(config, teacher="t" * 64, data="d" * 64, top_k=IDENTITY.top_k)
    cache = write(tmp_path / "cache", fitting)
    assert checked_digest(config, teacher="t" * 64, data="d" * 64) == cache.digest
    with pytest.raises(ConfigError, match=r"was made for another run \(teacher tttttttt, here ssssssss\)"):
        checked_digest(config, teacher="s" * 64, data="d" * 64)


def test_without_a_cache_there_is_no_digest() -> None:
    assert checked_digest(compose(STAGE3).config, teacher="t", data="d") is None
