"""Influence on a real model: gradients are the layer's own, each knob does what it says, runs resume bit by bit."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cheapertraining import GradientProjector
from wrinklefree.composition import compose
from wrinklefree.data.packing import collate, next_token_piece, pack
from wrinklefree.distillation.cross_entropy import target_nll
from wrinklefree.models.bitlinear import BitLinear, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.training.callbacks import Callback, StepReport, read_metrics
from wrinklefree.training.config import OptimizerConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.influence import MixtureOptimizer, codes_input, row_losses, shares, weigh_sources
from wrinklefree.training.optimizers import build_optimizer
from wrinklefree.training.placement import Student
from wrinklefree.training.plan import StagePlan, plan_stage
from wrinklefree.training.run import run_stage
from wrinklefree.utils.errors import ConfigError

ARCHITECTURE = Architecture(
    family="llama", vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
TERNARY = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0, subln_strength=1.0)
CPU = Compute(torch.device("cpu"), torch.float32)


class ByteTokenizer:
    eos_token_id, bos_token_id, pad_token_id, add_bos, fingerprint = 256, None, 257, False, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def rows() -> Batch:
    generator = torch.Generator().manual_seed(5)
    pieces = [
        next_token_piece(torch.randint(0, 256, (n,), generator=generator).int().numpy()) for n in (30, 9, 17, 24, 12)
    ]
    return collate(pack(pieces, 32)[:3], 32, 257)


def build(bitnet: BitNetSpec | None = TERNARY) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ARCHITECTURE, bitnet)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("bitnet", [TERNARY, None], ids=["ternary", "full precision"])
def test_gradients_of_rows_add_up_to_those_of_the_layers(bitnet: BitNetSpec | None) -> None:
    """No side is longer than 24, so that projections of that size keep gradients as they are."""
    model, batch = build(bitnet), rows()
    projector = GradientProjector(model, size=24, layer_input=codes_input)
    found, counts = projector.per_sample(batch, lambda module, b: row_losses(CPU, module, b))
    assert counts.sum() == batch.num_targets
    sums, _ = row_losses(CPU, model, batch)
    sums.sum().backward()
    assert len(projector.layers) == 2 * 7
    for layer in projector.layers:
        gradient = layer.module.weight.grad
        assert gradient is not None
        ours = found[:, layer.span].sum(0).view(layer.rows, layer.columns)
        torch.testing.assert_close(ours, gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()))


def test_losses_of_rows_are_the_sums_of_their_targets() -> None:
    model, batch = build(), rows()
    sums, counts = row_losses(CPU, model, batch)
    torch.testing.assert_close(sums.detach(), target_nll(model(batch), batch.labels).sum(1), rtol=1e-5, atol=1e-5)
    assert counts.tolist() == (batch.labels >= 0).sum(1).tolist()


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_the_input_is_what_the_weight_multiplies(value: float) -> None:
    layer = BitLinear(12, 5, bias=False)
    set_quantization(layer, value)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    mixed = layer.weight + value * (ternarize(layer.weight).dequantize() - layer.weight)
    torch.testing.assert_close(functional.linear(codes_input(layer, x), mixed), layer(x), rtol=1e-5, atol=1e-6)


def test_every_process_has_two_groups_and_one_process_the_rows_asked_for() -> None:
    assert shares(32, 1) == (8, 32)
    assert shares(33, 2) == (4, 34)
    assert shares(32, 4) == (2, 32)
    assert shares(8, 8) == (2, 16)


# -- a run's parts -----------------------------------------------------------------------------------------------------


def write_texts(folder: Path) -> dict[str, Path]:
    """Words in order, words in order once more for the probe, and letters without any order."""
    generator = random.Random(3)
    words = [
        "the",
        "old",
        "sea",
        "ship",
        "turns",
        "in",
        "the",
        "wind",
        "and",
        "sails",
        "to",
        "the",
        "red",
        "harbour",
        "lamp",
        "by",
        "night",
    ]
    files = {}
    for name in ("order", "noise", "probe"):
        files[name] = folder / f"{name}.jsonl"
        lines = []
        for _ in range(120):
            first = generator.randrange(len(words))
            text = " ".join(words[(first + n) % len(words)] for n in range(30))
            if name == "noise":
                text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz .", k=len(text)))
            lines.append(json.dumps({"text": text}) + "\n")
        files[name].write_text("".join(lines), encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_texts(tmp_path_factory.mktemp("texts"))


def overrides(texts: dict[str, Path], training: str = "stage2_pretrain", sources: str | None = None) -> list[str]:
    both = f"{{kind: local, path: '{texts['order']}', weight: 0.5}}, {{kind: local, path: '{texts['noise']}', weight: 0.5}}"
    return [
        "model=tiny", f"training={training}", "data=local", f"data.sources=[{sources or both}]", "training.batch_size=8",
        "training.max_seq_length=32", "influence.enabled=true", "influence.update_interval=2",
        f"influence.probes=[{{kind: local, path: '{texts['probe']}'}}]", "training.dtype=float32",
    ]  # fmt: skip


class Weights:
    """A stream that notes the weights it is given."""

    def __init__(self) -> None:
        self.given: list[list[float]] = []

    def set_weights(self, weights: Sequence[float]) -> None:
        self.given.append(list(weights))


def weigh(texts: dict[str, Path], *changes: str, steps: int = 100) -> tuple[MixtureOptimizer, Weights]:
    config, _ = compose([*overrides(texts), *changes])
    model, stream = build(), Weights()
    optimizer = weigh_sources(
        config, build_optimizer(model, "adamw", OptimizerConfig(), 1e-3), student=Student(model, None),
        tokenizer=ByteTokenizer(), compute=CPU, stream=stream, total_steps=steps,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return optimizer, stream


def after_updates(texts: dict[str, Path], *changes: str, count: int = 1) -> dict[str, Any]:
    """Scores, evidence, target and weights of the last of some updates of an untrained model."""
    optimizer, _ = weigh(texts, *changes)
    for _ in range(count):
        report = optimizer.update_weights()
    assert report.mixture is not None
    return {
        "scores": report.scores.combined["order"], "z": report.mixture.z["order"], "rows": report.scores.rows,
        "target": report.mixture.target["order"], "weight": report.mixture.weights["order"],
    }  # fmt: skip


def test_weights_go_to_the_stream_in_its_order_and_to_the_better_source(texts: dict[str, Path]) -> None:
    optimizer, stream = weigh(texts)
    for _ in range(3):
        optimizer.update_weights()
    assert len(stream.given) == 3
    assert stream.given[-1] == [optimizer.weights["order"], optimizer.weights["noise"]]
    assert optimizer.weights["order"] > 0.55
    assert all(parameter.grad is None for parameter in optimizer.calculator.projector.model.parameters())


def test_each_knob_changes_what_it_says_and_nothing_before_it(texts: dict[str, Path]) -> None:
    plain = after_updates(texts, count=2)

    def changed(*changes: str) -> set[str]:
        other = after_updates(texts, *changes, count=2)
        return {name for name, value in plain.items() if other[name] != value}

    assert changed("influence.config.lambda_val=3") >= {"scores", "z"}
    assert changed("influence.config.score=dot") >= {"scores", "z"}
    assert changed("influence.config.score=datainf") >= {"scores", "z"}
    assert changed("influence.config.rows=16") >= {"rows", "scores", "z"}
    assert "z" in changed("influence.config.gamma_val=1") and "scores" not in changed("influence.config.gamma_val=1")
    assert changed("influence.config.temperature=4") == {"target", "weight"}
    assert changed("influence.learning_rate=0.5") == {"weight"}
    assert changed("influence.min_weight=0.45") == {"weight"}
    assert changed(f"influence.probes=[{{kind: local, path: '{texts['noise']}'}}]") >= {"scores", "z"}
    assert changed("seed=7") >= {"scores", "z"}


def test_the_weight_of_a_probe_is_its_share_of_the_score(texts: dict[str, Path]) -> None:
    order, noise = (f"{{kind: local, path: '{texts[name]}', weight: %g}}" for name in ("probe", "noise"))
    optimizer, _ = weigh(texts, f"influence.probes=[{order % 3}, {noise % 1}]")
    scores = optimizer.update_weights().scores
    for source, values in scores.combined.items():
        for group, value in enumerate(values):
            parts = [scores.by_probe[probe][source][group] for probe in ("probe", "noise")]
            assert value == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-9)


def test_what_cannot_be_weighed_is_refused_in_one_line(texts: dict[str, Path]) -> None:
    one = f"{{kind: local, path: '{texts['order']}', weight: 1.0}}"
    with pytest.raises(
        ConfigError, match=r"influence.enabled=true weighs text sources .*data=local has 1 in data.sources"
    ):
        compose(overrides(texts, sources=one))
    with pytest.raises(ConfigError, match=r"data=downstream has 0 in data.replay.sources: give it two or more"):
        compose(["model=tiny", "training=stage3_distill", "influence.enabled=true"])
    with pytest.raises(ConfigError, match=r"influence.min_weight=0.6 for each of 2 sources .* set it to 0.5 at most"):
        compose([*overrides(texts), "influence.min_weight=0.6"])
    with pytest.raises(ConfigError, match=r"influence: source order.* do not fill|influence: .*rows"):
        optimizer, _ = weigh(texts)
        optimizer.calculator.groups = 64
        optimizer.update_weights()


def test_an_interval_beyond_the_run_is_said(texts: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    weigh(texts, "influence.update_interval=50", steps=20)
    assert "influence.update_interval=50 is longer than the run of 20 steps" in caplog.text


# -- whole runs --------------------------------------------------------------------------------------------------------


def plan(texts: dict[str, Path], output: Path, *changes: str) -> StagePlan:
    """From scratch: a small tokenizer of its own, and random weights."""
    small = {
        "vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    command = [
        *overrides(texts, "fp_pretrain"), *(f"model.architecture.{key}={value}" for key, value in small.items()),
        "training.from_scratch=true", "training.max_steps=12", "training.lr=3e-3", "training.checkpoint.save_interval=3",
        "training.gradient_accumulation_steps=1", "audit.enabled=false", "training.evaluation.max_tokens=0",
        f"output_dir={output}",
    ]  # fmt: skip
    return plan_stage(*compose([*command, *changes]))


class Stop(Callback):
    """Ends the process, as far as a test can, in the middle of a run."""

    def on_step(self, report: StepReport) -> None:
        if report.step == 7:
            raise KeyboardInterrupt


def mixtures(done: StagePlan) -> list[float]:
    steps = [line for line in read_metrics(done.run_folder / "metrics.jsonl") if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    return [line["metrics"]["mixture/order"] for line in steps]


def digest(done: StagePlan) -> str:
    return hashlib.sha256((done.artifact / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_moves_the_mixture_and_resumes_bit_by_bit(texts: dict[str, Path], tmp_path: Path) -> None:
    whole = plan(texts, tmp_path / "whole")
    run_stage(whole)
    order = mixtures(whole)
    assert order[0] == 0.5
    assert order[-1] > 0.55
    # Weights move after every second step and at no other.
    assert [n + 1 for n in range(1, 12) if order[n] != order[n - 1]] == [2, 4, 6, 8, 10, 12]
    broken = plan(texts, tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_stage(broken, callbacks=[Stop()])
    run_stage(broken)
    assert mixtures(broken) == order
    assert digest(broken) == digest(whole)
    # The weights reached the training: without them another model comes out.
    still = plan(texts, tmp_path / "still", "influence.enabled=false")
    run_stage(still)
    assert digest(still) != digest(whole)


def test_the_fingerprint_covers_the_knobs_and_what_the_probes_hold(texts: dict[str, Path], tmp_path: Path) -> None:
    value = plan(texts, tmp_path).fingerprint.value
    assert plan(texts, tmp_path, "influence.config.temperature=2").fingerprint.value != value
    own = write_texts(tmp_path)
    changed = own | {"order": texts["order"], "noise": texts["noise"]}
    own["probe"].write_text('{"text": "another probe"}\n' * 9, encoding="utf-8")
    first = plan(changed, tmp_path).fingerprint.value
    own["probe"].write_text('{"text": "and another"}\n' * 9, encoding="utf-8")
    assert plan(changed, tmp_path).fingerprint.value != first
