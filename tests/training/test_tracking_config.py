"""The check before a tracked run: missing packages and keys are one line each, and cost no import."""

import sys
from pathlib import Path

import pytest

from wrinklefree.composition import compose
from wrinklefree.training import tracking_config
from wrinklefree.training.tracking_config import TrackingConfig, check_tracking
from wrinklefree.utils.errors import ConfigError, CredentialsError


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without credentials."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_CONFIG_DIR",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["none", "tensorboard", "trackio", "wandb"])
def test_every_tracker_is_an_option_and_part_of_no_fingerprint(name: str) -> None:
    from wrinklefree.utils.run_fingerprint import fingerprint

    config, tree = compose([f"tracking={name}", "training=stage2_pretrain"])
    assert config.tracking.name == name
    without = compose(["training=stage2_pretrain"]).tree
    identities = [fingerprint(t, sections=list(tree), inputs={}, repository=None).config_hash for t in (tree, without)]
    assert identities[0] == identities[1]


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_config, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"tracking=trackio needs the package trackio.*uv sync --extra track"
    ) as caught:
        check_tracking(TrackingConfig(name="trackio"))
    assert "\n" not in str(caught.value)
    check_tracking(TrackingConfig())


def test_wandb_without_a_key_is_refused_before_any_work(nobody: Path) -> None:
    before = "wandb" in sys.modules
    with pytest.raises(CredentialsError, match=r"no API key for api\.wandb\.ai.*tracking\.offline=true"):
        check_tracking(TrackingConfig(name="wandb"))
    check_tracking(TrackingConfig(name="wandb", offline=True))
    assert ("wandb" in sys.modules) == before


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_will_do(variable: str, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "x" * 40)
    check_tracking(TrackingConfig(name="wandb"))


def test_a_login_will_do_for_its_own_server_only(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    check_tracking(TrackingConfig(name="wandb"))
    settings = nobody / ".config" / "wandb"
    settings.mkdir(parents=True)
    (settings / "settings").write_text("[default]\nbase_url = https://tracker.example\n")
    with pytest.raises(CredentialsError, match=r"no API key for tracker\.example"):
        check_tracking(TrackingConfig(name="wandb"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    check_tracking(TrackingConfig(name="wandb"))


def test_an_unreadable_login_is_no_login(nobody: Path) -> None:
    (nobody / ".netrc").write_text("machine\n\0 login nonsense ]\n")
    with pytest.raises(CredentialsError):
        check_tracking(TrackingConfig(name="wandb"))


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandbs_own_switch_is_respected(mode: str, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    check_tracking(TrackingConfig(name="wandb"))


def test_the_command_refuses_in_one_line(nobody: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wrinklefree import cli

    assert cli.train_main(["tracking=wandb", "training=stage1_subln"]) == 77
    error = capsys.readouterr().err
    assert error.startswith("error: tracking=wandb found no API key")
    assert error.count("\n") == 1
