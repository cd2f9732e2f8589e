"""Cached teacher logits: found by content, exact where all logits are kept, and never further off than measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from wrinklefree.distillation.cached_logits_loss import CachedLogitsDistillation
from wrinklefree.distillation.logits_loss import LOGITS, LogitsDistillation, logits_kl
from wrinklefree.distillation.teacher_cache import CacheIdentity, TeacherCache, spread
from wrinklefree.distillation.teacher_cache_writer import CacheWriter, truncate, truncation_errors
from wrinklefree.distillation.weighted_sum import CROSS_ENTROPY
from wrinklefree.models.records import IGNORE, Batch, ModelOutput
from wrinklefree.utils.errors import CheckpointError, DataError

V, D, T = 40, 12, 16
IDENTITY = CacheIdentity(
    teacher="t" * 64, data="d" * 64, vocabulary=V, max_seq_length=T, temperature=2.0, positions="response", top_k=V
)


def batch_of(*rows: tuple[int, ...]) -> Batch:
    """Rows of documents by seed: a document's length, tokens and targets follow from its seed. 0 pads."""
    ids, labels = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), IGNORE)
    documents, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, seeds in enumerate(rows):
        start = 0
        for number, seed in enumerate(seeds, start=1):
            generator = torch.Generator().manual_seed(seed)
            length = 3 + seed % 3
            part = slice(start, start + length)
            ids[row, part] = torch.randint(1, V, (length,), generator=generator)
            labels[row, start + length - 2 : start + length] = torch.randint(1, V, (2,), generator=generator)
            documents[row, part] = number
            positions[row, part] = torch.arange(length)
            start += length
    return Batch(ids, labels, positions, documents)


def output_of(batch: Batch, seed: int = 0, scale: float = 1.0) -> ModelOutput:
    """Hidden states that depend on the token and its position only, as a document's would on the document."""
    generator = torch.Generator().manual_seed(seed)
    table, places = (torch.randn(n, D, generator=generator) for n in (V, T))
    head = torch.randn(V, D, generator=generator)
    return ModelOutput(scale * (table[batch.input_ids] + places[batch.position_ids]), head, lambda x: x)


def write(folder: Path, identity: CacheIdentity = IDENTITY, *batches: Batch) -> TeacherCache:
    with CacheWriter(folder, identity) as writer:
        for batch in batches or (batch_of((1, 2, 3), (4, 5)),):
            writer.add(batch, output_of(batch))
    return TeacherCache(folder)


def losses(
    term: LogitsDistillation, batch: Batch, teacher: ModelOutput | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    student = output_of(batch, seed=7)
    hidden = student.hidden.clone().requires_grad_()
    values = term(
        replace(student, hidden=hidden), teacher, batch, term.counts(batch), {CROSS_ENTROPY: 1.0, LOGITS: 10.0}
    )
    values.weighted.backward()
    assert hidden.grad is not None
    return values.values, hidden.grad


@pytest.mark.parametrize("positions", ["response", "all"])
@pytest.mark.parametrize("t_squared", [False, True])
def test_with_all_logits_it_is_the_teacher(tmp_path: Path, positions: str, t_squared: bool) -> None:
    identity = replace(IDENTITY, positions=positions)
    cache = write(tmp_path / "cache", identity)
    # Other neighbours, another order, padding elsewhere: a document is found by its content.
    batch = batch_of((5, 1), (3,), (2, 4))
    cached = CachedLogitsDistillation(cache, t_squared=t_squared, with_cross_entropy=True)
    online = LogitsDistillation(temperature=2.0, t_squared=t_squared, positions=positions, with_cross_entropy=True)  # type: ignore[arg-type]
    from_cache, from_teacher = losses(cached, batch, None), losses(online, batch, output_of(batch))
    # bfloat16 differences of up to about 20: a relative rounding of 2^-9 over a temperature of 2.
    torch.testing.assert_close(from_cache[0], from_teacher[0], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(from_cache[1], from_teacher[1], rtol=0.05, atol=5e-3)
    assert cached.teacher_wants is None
    assert cached.counts(batch) == online.counts(batch)


def test_stored_values_are_the_largest_logits_and_what_normalises_them() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(1)) * 4
    stored = truncate(logits, 6, 2.0)
    assert torch.equal(stored.ids.long(), logits.topk(6).indices)
    probabilities = (stored.differences.float() / 2.0 - stored.normalizers[:, None]).exp()
    exact = functional.softmax(logits / 2.0, dim=1).gather(1, stored.ids.long())
    torch.testing.assert_close(probabilities, exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("top_k", [1, 8, V])
def test_the_cached_distribution_sums_to_one_and_spreads_the_tail_evenly(top_k: int) -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(2)) * 4
    stored = truncate(logits, top_k, 5.0)
    dense = spread(stored.differences, stored.ids, stored.normalizers, V, 5.0)
    torch.testing.assert_close(dense.sum(1), torch.ones(5), rtol=1e-5, atol=0.02 if top_k == V else 1e-5)
    if top_k < V:
        rest = dense.scatter(1, stored.ids.long(), float("nan"))
        rest = rest[~rest.isnan()].view(5, V - top_k)
        assert torch.equal(rest.amax(1), rest.amin(1))


def test_the_measured_errors_bound_what_a_student_sees() -> None:
    """KL(p || s) - KL(q || s) varies between students by no more than the bound of the widest allows."""
    temperature = 5.0
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, V, generator=generator) * 4
    stored = truncate(logits, 8, temperature)
    errors = truncation_errors(logits, stored, temperature)
    teacher = functional.softmax(logits / temperature, dim=1).double()
    cached = spread(stored.differences, stored.ids, stored.normalizers, V, temperature).double()
    entropy_gap = (teacher * teacher.log()).sum(1) - (cached * cached.log()).sum(1)
    for seed in range(20):
        student = torch.randn(64, V, generator=torch.Generator().manual_seed(seed)) * 4
        log_student = functional.log_softmax(student.double() / temperature, dim=1)
        seen = (cached * (cached.log() - log_student)).sum(1)
        error = logits_kl(student, logits, temperature=temperature) - seen - entropy_gap
        spread_of_student = (student.amax(1) - student.amin(1)) / temperature
        assert (error.abs() <= errors.distance / 2 * spread_of_student + 1e-5).all()
    matching = (teacher * (teacher.log() - cached.log())).sum(1)
    torch.testing.assert_close(errors.divergence.double(), matching, rtol=1e-4, atol=1e-6)
    assert (errors.divergence <= errors.flat + 1e-6).all()  # never worse than knowing nothing


def test_more_logits_lose_less(tmp_path: Path) -> None:
    means = [write(tmp_path / str(k), replace(IDENTITY, top_k=k)).errors for k in (2, 8, 32)]
    for name in ("kl", "l1", "tail", "kl_error_bound"):
        assert means[0][name] > means[1][name] > means[2][name], name
    assert len({mean["uniform_kl"] for mean in means}) == 1


def test_repeated_documents_are_stored_once(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", IDENTITY, batch_of((1, 2)), batch_of((2, 1), (3,)))
    assert (cache.documents, cache.positions) == (3, 6)


def test_an_unknown_document_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache")
    with pytest.raises(DataError, match="holds no teacher logits for a document of 3 tokens: .*cache_teacher.py"):
        cache.look_up(batch_of((1, 6)))
    relabelled = batch_of((1,))
    relabelled.labels[0, 0] = 5
    with pytest.raises(DataError, match="holds no teacher logits"):
        cache.look_up(relabelled)


def test_a_batch_without_documents_has_no_rows(tmp_path: Path) -> None:
    found = write(tmp_path / "cache").look_up(batch_of(()))
    assert found.rows.numel() == found.ids.numel() == 0


def test_identities_are_compared_but_for_how_many_logits(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache")
    assert cache.check(replace(IDENTITY, top_k=3)) is None
    differing = cache.check(replace(IDENTITY, temperature=5.0, teacher="x" * 64))
    assert differing == "teacher tttttttt, here xxxxxxxx; temperature 2.0, here 5.0"


def test_a_failed_writer_leaves_nothing_and_an_older_cache_alone(tmp_path: Path) -> None:
    before = write(tmp_path / "cache").digest
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path / "cache", IDENTITY) as writer:
        writer.add(batch_of((1,)), output_of(batch_of((1,))))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert TeacherCache(tmp_path / "cache").digest == before


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache")
    with (cache.folder / "ids.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"ids\.bin has not the \d+ bytes that were saved"):
        TeacherCache(cache.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is no cache of ours"):
        CacheWriter(tmp_path / "other", IDENTITY)
