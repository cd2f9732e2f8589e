"""What a benchmark is told: decoded, refused in one line, and turned into the overrides of a trial."""

from pathlib import Path
from typing import Any

import pytest

from benchmark.config.settings import Settings, change_settings, read_settings
from benchmark.core.job import Job, effective, make_job, write_synthetic_text
from benchmark.optimization.search import leave_out_useless
from wrinklefree.composition import compose
from wrinklefree.utils.errors import ConfigError


@pytest.fixture(scope="module")
def defaults() -> Settings:
    """Text of two kinds, so that there is a mixture to weigh."""
    return read_settings(["data=packaged"])


def overrides(job: Job) -> dict[str, str]:
    return dict(override.split("=", 1) for override in job.overrides)


def test_the_defaults_are_those_of_the_seed(defaults: Settings) -> None:
    told = defaults.benchmark
    assert (told.num_trials, told.output_dir, told.optimizers) == (50, "benchmark_results", ("muon",))
    knobs = defaults.knobs
    assert (knobs["learning_rate"].low, knobs["learning_rate"].high) == (1e-4, 1e-2)
    assert knobs["gradient_accumulation_steps"].values == (1, 2, 4, 8)
    assert (knobs["weight_decay"].low, knobs["weight_decay"].high) == (0.01, 0.2)
    assert (knobs["warmup_steps"].low, knobs["warmup_steps"].high) == (500, 2000)
    assert set(knobs) == {
        "learning_rate",
        "gradient_accumulation_steps",
        "weight_decay",
        "warmup_steps",
        "influence_enabled",
        "influence_lambda_reg",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark.num_trial=3"], "did you mean"),
        (["benchmark.num_trials=0"], "benchmark.num_trials"),
        (["benchmark.optimizers=[sgd]"], "sgd"),
        (["benchmark.optimizers=[muon,muon]"], "stands twice"),
        (["search_space.learning_rate.low=1"], "must be below high"),
        (["search_space.influence_enabled=null"], "influence_lambda_reg needs influence_enabled"),
        (["training.lr=1e-3"], "training.lr is searched"),
        (["training.max_steps=5"], "benchmark.measurement_steps"),
        (["optimizer.type=adamw"], "benchmark.optimizers"),
        (["model=tinny"], "tinny"),
        (["benchmark.num_trials=1,2"], "a list is written in brackets"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "key", "spelled"),
    [
        ("learning_rate", 0.002, "training.lr", "0.002"),
        ("gradient_accumulation_steps", 8, "training.gradient_accumulation_steps", "8"),
        ("weight_decay", 0.05, "optimizer.weight_decay", "0.05"),
        ("influence_enabled", True, "influence.enabled", "true"),
    ],
)
def test_every_knob_changes_the_run(
    name: str, value: Any, key: str, spelled: str, defaults: Settings, tmp_path: Path
) -> None:
    before = make_job(defaults, {}, seed=1, folder=tmp_path, source=None)
    after = make_job(defaults, {name: value}, seed=1, folder=tmp_path, source=None)
    assert overrides(after)[key] == spelled
    assert compose(after.overrides).config != compose(before.overrides).config


def test_a_warm_up_keeps_its_share_of_the_run(defaults: Settings, tmp_path: Path) -> None:
    job = make_job(defaults, {"warmup_steps": 2000}, seed=1, folder=tmp_path, source=None)
    config = compose(job.overrides).config.training
    steps = int(overrides(job)["training.max_steps"])
    assert config.schedule.warmup_steps == round(2000 / 10_000 * steps)  # type: ignore[union-attr]
    shortest = make_job(
        defaults, {"warmup_steps": 500, "gradient_accumulation_steps": 8}, seed=1, folder=tmp_path, source=None
    )
    assert int(overrides(shortest)["training.schedule.warmup_steps"]) >= 1  # fmt: skip


def test_a_knob_that_is_switched_off_is_left_out(defaults: Settings, tmp_path: Path) -> None:
    off = {"influence_enabled": False, "influence_lambda_reg": 1e-3}
    assert effective(defaults, off) == {"influence_enabled": False}
    on = make_job(defaults, off | {"influence_enabled": True}, seed=1, folder=tmp_path, source=None)
    config = compose(on.overrides).config
    assert config.influence.config.lambda_val == 1e-3
    # As often as in a run of the reference length: once in a tenth of it.
    steps = int(overrides(on)["training.max_steps"])
    assert config.influence.update_interval == max(1, round(steps * 1000 / 10_000))
    assert on.mixture_share == steps / 10_000


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_all_trials_train_on_the_same_tokens(accumulation: int, defaults: Settings, tmp_path: Path) -> None:
    told = defaults.benchmark
    job = make_job(defaults, {"gradient_accumulation_steps": accumulation}, seed=1, folder=tmp_path, source=None)
    training = compose(job.overrides).config.training
    assert training.max_seq_length == told.sequence_length  # type: ignore[union-attr]
    a_step = accumulation * training.batch_size * told.sequence_length  # type: ignore[union-attr]
    tokens = training.max_steps * a_step  # type: ignore[union-attr]
    wanted = (told.unmeasured_steps + told.measurement_steps) * training.batch_size * told.sequence_length  # type: ignore[union-attr]
    assert wanted <= tokens < wanted + 2 * a_step
    assert job.unmeasured_tokens >= a_step
    assert job.unmeasured_tokens % a_step == 0


def test_resuming_refuses_what_makes_trials_incomparable(defaults: Settings) -> None:
    assert change_settings(defaults, ["benchmark.num_trials=60"]).benchmark.num_trials == 60
    for argument in ("benchmark.sequence_length=512", "search_space.weight_decay=null", "model=smollm2_135m"):
        with pytest.raises(ConfigError, match="--resume keeps what the trials so far were made with"):
            change_settings(defaults, [argument])
    with pytest.raises(ConfigError, match=r"leave benchmark\.output_dir out"):
        change_settings(defaults, ["benchmark.output_dir=elsewhere"])


def test_generated_text_is_the_same_for_all_and_is_read(tmp_path: Path) -> None:
    first = write_synthetic_text(tmp_path / "a", 1)
    write_synthetic_text(tmp_path / "b", 1)
    assert (tmp_path / "a/ordered.jsonl").read_bytes() == (tmp_path / "b/ordered.jsonl").read_bytes()
    assert (tmp_path / "a/ordered.jsonl").read_bytes() != (tmp_path / "a/shuffled.jsonl").read_bytes()
    config = compose(["training=stage2_pretrain", *first]).config
    assert len(config.data.sources) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        ([], []),
        (["benchmark.use_synthetic_data=false", "data=packaged"], []),
        (["benchmark.use_synthetic_data=false", "data=fineweb"], ["influence_enabled", "influence_lambda_reg"]),
        (["training=fp_sft"], ["influence_enabled", "influence_lambda_reg"]),
    ],
)
def test_knobs_of_a_mixture_need_one(arguments: list[str], left_out: list[str]) -> None:
    settings, names = leave_out_useless(read_settings(arguments))
    assert names == left_out
    assert not set(names) & set(settings.knobs)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job(("a=1", "b=[x]"), 12, None)
    job.write(tmp_path / "folder" / "job.json")
    assert Job.read(tmp_path / "folder" / "job.json") == job
