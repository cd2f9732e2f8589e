"""Overrides of a command: their forms, their mistakes, and how a pipeline hands them to its steps."""

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from wrinklefree.composition import compose, compose_step, config_directory, normalize_overrides
from wrinklefree.utils.errors import ConfigError


def mistake(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


@pytest.mark.parametrize("form", ["skip_recovery=true", "+skip_recovery=true", "++skip_recovery=true"])
def test_a_key_absent_from_yaml_takes_any_form(form: str) -> None:
    assert compose([form]).config.skip_recovery is True


def test_overrides_become_what_hydra_always_takes() -> None:
    given = [
        "model=tiny",
        "+experiment=tiny_base",
        "seed=1",
        "+a.b=2",
        "++c=3",
        "~packing.enabled",
        "hydra.verbose=true",
    ]
    assert normalize_overrides(given) == [
        "model=tiny", "experiment=tiny_base", "++seed=1", "++a.b=2", "++c=3", "~packing.enabled", "hydra.verbose=true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "modael=tiny",
            "modael: unknown key, given 'tiny'; the configuration has no modael; did you mean model?",
        ),
        (
            "training.optimizer.type=muon",
            "training.optimizer.type: unknown key, given 'muon'; training (stage=bitdistill) has no optimizer; "
            "did you mean optimizer.type?",
        ),
        (
            "distillation=null",
            "distillation=null chooses nothing; choose one of classification, summarization, or leave distillation out",
        ),
        ("lr=3", "lr: unknown key, given 3; the configuration has no lr; did you mean training.lr?"),
        (
            "gcs.enable=true",
            "gcs.enable: unknown key, given true; gcs has no enable; did you mean gcs.enabled?",
        ),
        (
            "optimizer.type=adamww",
            "optimizer.type: expected 'auto', 'adamw', 'adamw_8bit', 'muon', 'apollo' or 'apollo_mini', "
            "given 'adamww'; did you mean adamw?",
        ),
        ("training.lr=fast", "training.lr: expected a number, given 'fast'"),
        (
            "training.total_tokens=5",
            "training.total_tokens: unknown key, given 5; training (stage=bitdistill) has no total_tokens, but "
            "stage=stage1_9, stage=stage2, stage=stage3, stage=fp_pretrain, stage=fp_sft or stage=bitnet_sft has",
        ),
        (
            "distillation=summarizatoin",
            "distillation: expected one of classification, summarization, given 'summarizatoin'; "
            "did you mean summarization?",
        ),
        ("qwen3_4b", "'qwen3_4b' is not an override: write key=value, for example training.batch_size=4"),
        (
            "training.lr=[1",
            "'training.lr=[1' cannot be read (no viable alternative at input '[1'): put quotes around text that holds "
            "brackets, commas, colons or =",
        ),
        ("model.source=path", "model: model.source=path needs model.path=..."),
    ],
)
def test_a_mistake_is_one_line(override: str, line: str) -> None:
    assert mistake(override) == line


def test_a_value_that_the_yaml_leaves_to_the_user_is_asked_for() -> None:
    assert mistake("data=local", "training=stage2_pretrain") == (
        "data.sources.0.path: missing; set it with data.sources.0.path=..."
    )


def test_an_unknown_interpolation_is_one_line() -> None:
    assert mistake("seed=${sede}").startswith("Interpolation key 'sede' not found")


def test_composing_inside_a_hydra_application_leaves_it_alone() -> None:
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert compose(["model=smollm2_135m"]).config.model.name == "smollm2_135m"
        with pytest.raises(ConfigError):
            compose(["model=nothing"])
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()


COMMAND = [
    "model=smollm2_135m",
    "training=bitdistill",
    "training.lr=0.25",
    "training.controls=false",
    "seeds=3",
    "seed=7",
]


def test_a_step_takes_what_it_has_from_the_pipelines_command() -> None:
    config, tree = compose_step(["training=stage2_pretrain", "training.lr=0.5"], COMMAND)
    assert config.model.name == "smollm2_135m"
    assert (tree["training"]["stage"], tree["training"]["lr"]) == ("stage2", 0.25)
    assert (config.seed, config.seeds) == (7, 1)
    assert "controls" not in tree["training"]


def test_a_step_without_the_key_is_spared() -> None:
    _, tree = compose_step(["training=stage1_subln"], [*COMMAND, "training.batch_size=2"])
    assert tree["training"] == {"stage": "stage1", "init_from": None, "batch_size": 2, "max_seq_length": 1024}


def test_nested_keys_reach_the_steps() -> None:
    _, tree = compose_step(["training=fp_sft"], ["training.checkpoint.save_interval=5"])
    assert tree["training"]["checkpoint"] == {"save_interval": 5, "keep_last_n": 2}


@pytest.mark.parametrize(
    ("command", "pretraining", "task"),
    [
        (["data=packaged_wide"], "packaged_wide", "recall"),
        (["data.task=boolq"], "falcon", "boolq"),
        (["data=downstream"], "falcon", "sst2"),
        (["data=downstream", "data.task=sst2"], "falcon", "sst2"),
    ],
)
def test_data_goes_to_the_steps_of_its_kind(command: list[str], pretraining: str, task: str) -> None:
    assert compose_step(["training=stage2_pretrain", "data=falcon"], command).config.data.name == pretraining
    _, tree = compose_step(["training=fp_sft", "data=recall"], command)
    assert tree["data"]["task"] == task
