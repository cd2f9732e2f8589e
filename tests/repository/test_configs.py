"""The YAML tree: every file composes and decodes, and holds the numbers of the real models."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from wrinklefree import composition
from wrinklefree.composition import compose, compose_step, compose_tree, config_directory, groups
from wrinklefree.models.config import Architecture
from wrinklefree.training.config import STAGE_CLASSES, PipelineConfig, StageConfig

CONFIGS = config_directory()

PRESCRIBED = [
    "config.yaml",
    *(f"model/{name}.yaml" for name in ("smollm2_135m", "llama_3b", "llama_7b", "qwen_7b", "qwen3_4b", "tiny")),
    *(f"training/{name}.yaml" for name in ("stage1_subln", "stage1_9_layerwise", "stage2_pretrain", "stage3_distill")),
    "training/stage3_distill_smollm2.yaml",
    *(f"data/{name}.yaml" for name in ("falcon", "fineweb", "downstream")),
    *(f"distributed/{name}.yaml" for name in ("single_gpu", "fsdp_multi", "fsdp_large")),
    *(f"distillation/{name}.yaml" for name in ("classification", "summarization")),
]

PUBLISHED_PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "llama_3b": 3_212_749_824,
    "llama_7b": 6_738_415_616,
    "qwen_7b": 7_615_616_512,
}

WITH_RECIPES = sorted({path.parent.name for path in (CONFIGS / "recipe").rglob("*.yaml")})
REPRESENTATIVES = [*WITH_RECIPES, "llama_7b"]
"""Models that compose differently from one another; the rest differ in the numbers of their own file only."""


def count_parameters(a: Architecture) -> int:
    """Parameters of the published model, from its dimensions."""
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    attention = a.hidden_size * (queries + 2 * keys) + queries * a.hidden_size
    biases = (queries + 2 * keys) * a.attention_bias + a.hidden_size * a.attention_output_bias
    norms = 2 * a.hidden_size + 2 * a.head_dim * a.qk_norm
    block = attention + biases + norms + 3 * a.hidden_size * a.intermediate_size
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tie_word_embeddings else 2)
    return embeddings + a.num_hidden_layers * block + a.hidden_size


@pytest.mark.parametrize("path", PRESCRIBED)
def test_the_prescribed_files_exist(path: str) -> None:
    assert (CONFIGS / path).is_file()


@pytest.mark.parametrize(
    ("model", "training"), list(product(REPRESENTATIVES, groups()["training"])), ids=lambda value: str(value)
)
def test_every_stage_decodes(model: str, training: str) -> None:
    config, tree = compose([f"model={model}", f"training={training}"])
    assert config.model.name == model
    assert type(config.training) is STAGE_CLASSES[config.training.stage]
    if isinstance(config.training, StageConfig):
        # A stage's file shows every key that the stage has.
        assert set(tree["training"]) == set(type(config.training).model_fields)


@pytest.mark.parametrize("group", ["data", "distillation", "distributed", "experiment"])
def test_every_option_of_every_other_group_decodes(group: str) -> None:
    for option in groups()[group]:
        config, _ = compose(
            [f"{group}={option}", "data.sources.0.path=x" if option in {"local", "tokens"} else "seed=1"]
        )
        if group != "experiment":
            assert getattr(config, group).name == option


def test_every_recipe_belongs_to_a_model_and_a_stage() -> None:
    """An optional overlay with a misspelt name would be left out in silence."""
    for path in (CONFIGS / "recipe").rglob("*.yaml"):
        model, training = path.relative_to(CONFIGS / "recipe").with_suffix("").parts
        assert model in groups()["model"], path
        assert training in groups()["training"], path


def test_files_of_selectable_groups_carry_their_own_name() -> None:
    for path in [
        path for group in ("model", "data", "distillation", "distributed") for path in (CONFIGS / group).iterdir()
    ]:
        assert yaml.safe_load(path.read_text())["name"] == path.stem


@pytest.mark.parametrize(("model", "parameters"), PUBLISHED_PARAMETERS.items())
def test_dimensions_give_the_published_parameter_count(model: str, parameters: int) -> None:
    config, _ = compose([f"model={model}", "training=stage1_subln"])
    assert config.model.name == model
    assert count_parameters(config.model.architecture) == parameters


def test_the_tiny_model_has_about_four_million_parameters_in_multiples_of_256() -> None:
    architecture = compose(["model=tiny"]).config.model.architecture
    assert count_parameters(architecture) == 4_196_608
    assert architecture.hidden_size % 256 == architecture.intermediate_size % 256 == 0


def test_nothing_given_is_every_stage_on_the_tiny_model() -> None:
    config, tree = compose()
    assert isinstance(config.training, PipelineConfig)
    assert config.model.name == "tiny"
    assert config.distillation.name == "classification"
    assert config.distributed.strategy == "single"
    assert list(config.training.steps) == [
        "teacher", "stage1", "bitnet_sft", "stage1_9", "stage2", "stage3", "control_pretrain", "control",
    ]  # fmt: skip
    assert not config.gcs.enabled
    assert not config.influence.enabled
    assert "skip_recovery" not in tree
    assert config.skip_recovery is False


@pytest.mark.parametrize("model", REPRESENTATIVES)
def test_every_step_of_every_pipeline_composes(model: str) -> None:
    training = compose([f"model={model}"]).config.training
    assert isinstance(training, PipelineConfig)
    stages = {name: compose_step(step, [f"model={model}"]).config for name, step in training.steps.items()}
    assert {name: config.training.stage for name, config in stages.items()} == {
        "teacher": "fp_sft", "stage1": "stage1", "bitnet_sft": "bitnet_sft", "stage1_9": "stage1_9",
        "stage2": "stage2", "stage3": "stage3", "control_pretrain": "fp_pretrain", "control": "fp_sft",
    }  # fmt: skip
    tokens = {
        name: config.training.total_tokens
        for name, config in stages.items()
        if isinstance(config.training, StageConfig) and config.training.total_tokens is not None
    }
    assert tokens["control_pretrain"] == tokens["stage1_9"] + tokens["stage2"]


@pytest.mark.parametrize(
    ("model", "training", "batch_size", "max_seq_length"),
    [
        ("qwen3_4b", "stage1_subln", 8, 1024),
        ("qwen3_4b", "stage1_9_layerwise", 16, 512),
        ("qwen3_4b", "stage2_pretrain", 4, 1024),
        ("qwen3_4b", "stage3_distill", 4, 1024),
        ("smollm2_135m", "stage1_subln", 16, 1024),
        ("smollm2_135m", "stage2_pretrain", 8, 1024),
        ("smollm2_135m", "stage3_distill_smollm2", 8, 1024),
    ],
)
def test_batches_follow_the_readme(model: str, training: str, batch_size: int, max_seq_length: int) -> None:
    _, tree = compose([f"model={model}", f"training={training}"])
    assert (tree["training"]["batch_size"], tree["training"]["max_seq_length"]) == (batch_size, max_seq_length)


@pytest.mark.parametrize(
    ("name", "lambda_logits", "published_gamma"), [("classification", 10.0, 1e5), ("summarization", 1.0, 1e3)]
)
def test_coefficients_of_the_paper(name: str, lambda_logits: float, published_gamma: float) -> None:
    distillation = compose([f"distillation={name}"]).config.distillation
    assert distillation.lambda_logits == lambda_logits
    assert distillation.published_gamma == published_gamma
    assert distillation.gamma_attention == "auto"
    assert distillation.logits.temperature == 5.0


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["training=stage2_pretrain"], "fineweb"),
        (["training=stage1_9_layerwise"], "fineweb"),
        (["training=stage3_distill"], "downstream"),
        (["training=fp_sft"], "downstream"),
        (["training=stage2_pretrain", "data=falcon"], "falcon"),
        (["data=packaged", "training=stage2_pretrain"], "packaged"),
        (["experiment=tiny_base"], "tiny_base"),
        (["experiment=tiny_base", "data=packaged"], "packaged"),
    ],
)
def test_a_stage_chooses_its_data_and_the_command_line_beats_it(overrides: list[str], name: str) -> None:
    assert compose(overrides).config.data.name == name


def test_the_command_line_beats_a_stage_an_overlay_and_an_experiment() -> None:
    assert compose(["training=stage2_pretrain"]).config.optimizer.weight_decay == 0.0
    config, _ = compose(["training=stage2_pretrain", "optimizer.type=muon", "optimizer.weight_decay=0.5"])
    assert (config.optimizer.type, config.optimizer.weight_decay) == ("muon", 0.5)
    _, tree = compose(["experiment=tiny_base", "training.lr=0.5"])
    assert (tree["training"]["stage"], tree["training"]["lr"], tree["training"]["from_scratch"]) == (
        "fp_pretrain", 0.5, True,
    )  # fmt: skip
    _, tree = compose(["experiment=tiny_base", "training=stage2_pretrain", "~training.from_scratch"])
    assert tree["training"]["stage"] == "stage2"


def test_recall_replays_the_packaged_text() -> None:
    tree = compose_tree(["data=recall"])
    assert tree["data"]["replay"] == compose_tree(["data=packaged"])["data"]


def test_configs_of_a_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "wrinklefree"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "config.yaml").touch()
    monkeypatch.setattr(composition, "__file__", str(package / "composition.py"))
    assert config_directory() == package / "configs"
