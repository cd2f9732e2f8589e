"""No key is decoration: every leaf of the composed configurations changes the decoded settings, and is read by code."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.composition import compose_tree
from wrinklefree.training.config import RunConfig
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError

SOURCE = Path(__file__).resolve().parents[2] / "src" / "wrinklefree"
COMMANDS = (
    ["training=stage1_subln"],
    ["training=stage1_9_layerwise", "data=packaged"],
    ["training=stage2_pretrain", "data=local", "data.sources.0.path=a", "distributed=fsdp_large", "tracking=wandb"],
    ["training=stage3_distill"],
    ["training=fp_sft"],
    ["training=fp_pretrain"],
)
OTHER_VALUES: tuple[Any, ...] = (7, 0.7, 3, 1.5, True, False, "other", None, [], [0.5], "none", 8)
"""Tried in turn until one is another value that the key takes."""
NAMES_ONLY = {"name", "kind", "weight_bits"}
"""They name what the other keys say; weight_bits takes 1.58 and no other value."""
TOGETHER = {"training.teacher.cache"}
"""Keys that only fit with others; tests of their own change them."""


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        for index, value in enumerate(node):
            yield from leaves(value, (*path, index))
    else:
        yield path


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def value_at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_another_value_of_a_key_is_another_configuration(command: list[str]) -> None:
    tree = compose_tree(command)
    before = decode(RunConfig, tree)
    fixed: list[str] = []
    for path in leaves(tree):
        old = value_at(tree, path)
        for value in OTHER_VALUES:
            if value == old and type(value) is type(old):
                continue
            try:
                changed = decode(RunConfig, replaced(tree, path, value))
            except ConfigError:
                continue
            if changed != before:
                break
        else:
            fixed.append(".".join(map(str, path)))
    # What is left takes only certain words (its neighbours test those), or fits only together with others.
    unexplained = [name for name in fixed if name not in TOGETHER and not takes_words(name, tree)]
    assert unexplained == []


def takes_words(name: str, tree: Any) -> bool:
    """Whether the key refuses a word that is none of its own, and names those that are."""
    path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    with pytest.raises(ConfigError) as caught:
        decode(RunConfig, replaced(tree, path, "no such word"))
    return bool(re.search(r"expected|must|needs|takes|not|one of", str(caught.value)))


def fields(model: Any, seen: set[Any]) -> Iterator[tuple[str, str]]:
    """(class, field) of a configuration class and of all that it holds."""
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        yield model.__name__, name
        for part in classes_in(field.annotation):
            yield from fields(part, seen)


def classes_in(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from classes_in(part)


def test_every_key_is_read_somewhere() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")]
    read = set(re.findall(r"\.(\w+)\b", "\n".join(texts)))
    found = list(fields(RunConfig, set()))
    assert len(found) > 150
    ignored = [f"{model}.{name}" for model, name in found if name not in read and name not in NAMES_ONLY]
    assert ignored == []
