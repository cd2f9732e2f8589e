"""L_LD against a cache of teacher logits (`teacher_cache`): no teacher is loaded or run."""

from collections.abc import Mapping

from wrinklefree.distillation.logits_loss import LogitsDistillation
from wrinklefree.distillation.teacher_cache import CachedTargets, TeacherCache
from wrinklefree.distillation.weighted_sum import TermValues
from wrinklefree.models.records import Batch, ModelOutput, Wants


class CachedLogitsDistillation(LogitsDistillation):
    """The logit KL, and cross-entropy from the same pass, with the teacher's side read from a cache.

    Looking up needs the batch's tokens on the host: a copy of 32 bytes a position, for which a GPU is waited for once
    a micro-batch.
    """

    teacher_wants: Wants | None = None

    def __init__(self, cache: TeacherCache, *, t_squared: bool, with_cross_entropy: bool = False) -> None:
        """Temperature and positions are the cache's."""
        super().__init__(
            temperature=cache.identity.temperature,
            t_squared=t_squared,
            positions=cache.identity.positions,
            with_cross_entropy=with_cross_entropy,
        )
        self._cache = cache

    def __call__(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """KL (and cross-entropy) of the micro-batch, each over its global count."""
        found = self._cache.look_up(batch.to("cpu"))
        device = student.hidden.device
        rows = found.rows.to(device)
        soft = CachedTargets(
            differences=found.differences.to(device),
            ids=found.ids.to(device),
            normalizers=found.normalizers.to(device),
            vocabulary=self._cache.identity.vocabulary,
            rows=rows.new_ones(len(rows)).bool(),
            temperature=self.temperature,
            t_squared=self.t_squared,
        )
        hidden_ND = student.hidden.flatten(0, 1).index_select(0, rows)
        return self._values(student, hidden_ND, batch.labels.flatten()[rows], soft, counts, weights)
