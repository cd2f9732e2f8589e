"""`DataInfCalculator`: scores of a real model, several probes, cache size, refusals; and the toys."""

import itertools

import pytest
import torch

from cheapertraining import (
    CheaperTrainingError,
    DataInfCalculator,
    InfluenceAwareOptimizer,
    MixedDataset,
    MixtureWeightCalculator,
    Probe,
    benefits,
)


def fixed(batch):
    return lambda update: [batch]


@pytest.mark.parametrize("score", ["datainf", "exact", "dot"])
def test_scores_are_benefits_of_group_gradients(tiny_lm, loss, make_language, score):
    """Without projection: against mean-loss gradients of each group through `.grad`."""
    model = tiny_lm()
    texts = {"one": make_language(1, rows=6, seed=1), "two": make_language(2, rows=6, seed=2)}
    probe = make_language(1, rows=4, seed=3)
    calculator = DataInfCalculator(model, loss, groups=3, projection_size=1000, lambda_val=0.2, score=score)
    scored = calculator.scores(
        {name: (lambda update, t=text: [t[:4], t[4:]]) for name, text in texts.items()}, {"p": Probe(fixed(probe))}
    )

    def gradient(rows):
        model.zero_grad()
        sums, counts = loss(model, rows)
        (sums.sum() / counts.sum()).backward()
        return torch.cat([layer.module.weight.grad.flatten() for layer in calculator.projector.layers])

    groups = torch.stack([gradient(text[i : i + 2]) for text in texts.values() for i in (0, 2, 4)])
    expected = benefits(
        groups, gradient(probe)[None], calculator.projector.spans, score=score, lambda_val=0.2
    ).flatten()
    actual = torch.tensor(scored.combined["one"] + scored.combined["two"], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert scored.rows == 16
    assert scored.cache_bytes == 7 * 4 * calculator.projector.width == calculator.cache_bytes(2, 1)


def test_probes_combine_by_weight(tiny_lm, loss, make_language):
    sources = {"one": fixed(make_language(1, rows=8, seed=1)), "two": fixed(make_language(2, rows=8, seed=2))}
    probes = {
        "a": Probe(fixed(make_language(1, rows=4, seed=3)), weight=2.0),
        "b": Probe(fixed(make_language(2, rows=4, seed=4)), weight=-0.5),
    }
    scored = DataInfCalculator(tiny_lm(), loss).scores(sources, probes)
    for name in sources:
        expected = [
            2 * a - 0.5 * b for a, b in zip(scored.by_probe["a"][name], scored.by_probe["b"][name], strict=True)
        ]
        assert scored.combined[name] == pytest.approx(expected)


def test_scoring_leaves_gradients_and_parameters(tiny_lm, loss, make_language):
    model = tiny_lm()
    text = make_language(1, rows=8, seed=1)
    loss(model, text)[0].sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    rng = torch.get_rng_state()

    def draws_randomly(update):
        torch.rand(5)
        return [text]

    DataInfCalculator(model, loss).scores({"a": draws_randomly}, {"p": Probe(draws_randomly)})
    for (value, grad), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, p) and torch.equal(grad, p.grad)
    assert torch.equal(rng, torch.get_rng_state())


def test_refusals(tiny_lm, loss, make_language):
    text = fixed(make_language(1, rows=4, seed=1))
    with pytest.raises(CheaperTrainingError, match="groups is 1"):
        DataInfCalculator(tiny_lm(), loss, groups=1)
    with pytest.raises(CheaperTrainingError, match="lambda_val -1"):
        DataInfCalculator(tiny_lm(), loss, lambda_val=-1)
    with pytest.raises(CheaperTrainingError, match="score 'best'"):
        DataInfCalculator(tiny_lm(), loss, score="best")
    calculator = DataInfCalculator(tiny_lm(), loss)
    with pytest.raises(CheaperTrainingError, match="1 sources and 0 probes"):
        calculator.scores({"a": text}, {})
    with pytest.raises(CheaperTrainingError, match="source a: 4 rows do not fill 8 groups"):
        calculator.scores({"a": text}, {"p": Probe(text)})
    with pytest.raises(CheaperTrainingError, match="probe p drew no batch at update 0"):
        calculator.scores({"a": text}, {"p": Probe(lambda update: [])})


class Rows:
    """Endless rows of one toy language, by index; an item is (source, tokens, worker)."""

    def __init__(self, make_language, name, successor, noise):
        self.make, self.name, self.successor, self.noise = make_language, name, successor, noise

    def __len__(self):
        return 5000

    def __getitem__(self, index):
        info = torch.utils.data.get_worker_info()
        row = self.make(self.successor, rows=1, seed=index, noise=self.noise)[0]
        return self.name, row, -1 if info is None else info.id

    def draw(self, salt):
        return lambda update: [self.make(self.successor, rows=16, seed=10_000 + 100 * update + salt, noise=self.noise)]


@pytest.fixture
def run_toy(tiny_lm, loss, make_language):
    """Train 60 steps with a mixture that follows the probes; returns (weights, items after the last change)."""

    def run(sources, probes, *, workers=0, score="exact", steps=60, interval=5, seed=0):
        model = tiny_lm()
        rows = {name: Rows(make_language, name, *language) for name, language in sources.items()}
        prior = dict.fromkeys(rows, 1 / len(rows))
        mixed = MixedDataset(rows, prior, lead=64, seed=seed)
        optimizer = InfluenceAwareOptimizer(
            torch.optim.AdamW(model.parameters(), lr=3e-3),
            DataInfCalculator(model, loss, score=score, projection_size=8, seed=seed),
            MixtureWeightCalculator(prior),
            sources={name: source.draw(97 * seed + i) for i, (name, source) in enumerate(rows.items())},
            probes={
                name: Probe(Rows(make_language, name, *language).draw(50 + i), weight)
                for i, (name, (language, weight)) in enumerate(probes.items())
            },
            on_weights=mixed.set_weights,
            update_interval=interval,
        )
        loader = torch.utils.data.DataLoader(
            mixed, batch_size=8, sampler=mixed.sampler, num_workers=workers, collate_fn=list
        )
        seen = []
        for batch in itertools.islice(loader, steps):
            sums, counts = loss(model, torch.stack([tokens for _, tokens, _ in batch]))
            (sums.sum() / counts.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            mixed.advance(len(batch))
            seen.extend((name, worker) for name, _, worker in batch)
        return optimizer.weights, seen

    return run


@pytest.mark.parametrize("score", ["datainf", "exact", "dot"])
def test_the_weight_of_noise_falls_in_every_worker(run_toy, score):
    weights, seen = run_toy(
        {"clean": (1, 0.1), "noise": (1, 1.0)},
        {"clean": ((1, 0.1), 1.0)},
        workers=2 if score == "exact" else 0,
        score=score,
    )
    assert weights["noise"] < 0.25
    late = seen[-160:]
    for worker in {worker for _, worker in seen}:
        mine = [name for name, w in late if w == worker]
        assert mine.count("noise") < 0.35 * len(mine), f"worker {worker}"


def test_opposing_probes_move_weights_in_opposite_directions(run_toy):
    sources = {"plus_one": (1, 0.1), "plus_two": (2, 0.1)}
    to_one, _ = run_toy(sources, {"p": ((1, 0.1), 1.0)})
    to_two, _ = run_toy(sources, {"p": ((2, 0.1), 1.0)})
    away_from_one, _ = run_toy(sources, {"p": ((1, 0.1), -1.0)})
    assert to_one["plus_one"] > 0.6 > 0.4 > to_two["plus_one"]
    assert away_from_one["plus_one"] < 0.4


def test_identical_sources_keep_the_prior(run_toy):
    for seed in range(3):
        weights, _ = run_toy({"a": (1, 0.3), "b": (1, 0.3), "c": (1, 0.3)}, {"p": ((1, 0.3), 1.0)}, seed=seed)
        assert weights == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=0.05)
