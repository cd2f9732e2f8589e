"""What a release and a container are made of: files that they name exist, commands are ours."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_the_dockerfile_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert "uv.lock" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert [name for name in copied if name.split("/")[0] in ignored] == []
    assert (ROOT / re.findall(r'CMD \["(.+)"\]', text)[0]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_yaml_and_call_scripts_that_exist(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    assert isinstance(tree, dict)
    named = re.findall(r"(?:bash|python) ((?:\.ci|scripts)/[\w./]+)", path.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []
    if path.parent.name == "ISSUE_TEMPLATE":
        assert tree["body"]
        assert all("label" in part["attributes"] for part in tree["body"])


def test_the_wheel_is_tried_with_the_programs_own_commands() -> None:
    from wrinklefree.cli_help import COMMANDS

    used = set(re.findall(r'^"\$program" (\w+)', (ROOT / ".ci" / "try_wheel").read_text(), re.MULTILINE))
    assert used == {"train", "convert", "generate", "serve"} <= set(COMMANDS)
