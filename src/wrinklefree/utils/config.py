"""Typed, frozen configuration: the base class of every config, and `decode`.

`decode` is where a composed tree stops being a tree. It is strict (text is not a number, 1 is not true) and turns what
pydantic reports into one line a mistake: the dotted key, what was expected, what was given, what was probably meant.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from wrinklefree.utils.errors import ConfigError


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, field docstrings kept for the configuration guide."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=False, allow_inf_nan=False
    )


ConfigType = TypeVar("ConfigType", bound=Config)

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a group of keys",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "model_attributes_type": "a group of keys",
    "model_type": "a group of keys",
    "none_required": "null",
    "string_type": "text",
    "tuple_type": "a list",
}


def decode(kind: type[ConfigType], tree: Mapping[str, Any]) -> ConfigType:
    """Return the composed plain `tree` as a frozen `kind`.

    Raises:
        ConfigError: with one line for every key that is unknown, missing, of another type or out of range.
    """
    try:
        # Through JSON because only there is "strict" what a user expects: a list may become a tuple, 1 may become 1.0,
        # but neither "1" nor true may become 1.
        return kind.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, tree, error.errors(include_url=False)))) from None


class Declared(NamedTuple):
    """One key that a config class declares."""

    path: str
    """Dotted; items of lists are left out (`data.sources.path`)."""
    owner: type[Config]


def declared_keys(kind: type[Config], prefix: str = "") -> Iterator[Declared]:
    """Yield every key of `kind`, through nested configs, lists and all branches of unions."""
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        yield Declared(path, kind)
        for child in config_classes(field.annotation):
            yield from declared_keys(child, f"{path}.")


def config_classes(annotation: Any) -> list[type[Config]]:
    """Return the config classes that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) is Literal:
        return []
    return [found for argument in get_args(annotation) for found in config_classes(argument)]


class _Place(NamedTuple):
    """Where an error stands: its dotted key, and the config classes that hold the key."""

    key: str
    holders: list[type[Config]]
    branch: str
    """What the discriminator of the holder says, such as `stage=stage2`; empty where there is none."""


def _explain(kind: type[Config], tree: Mapping[str, Any], errors: Sequence[ErrorDetails]) -> list[str]:
    """Return one line a key; what several branches of a union expected of one key is joined by "or"."""
    grouped: dict[str, list[tuple[_Place, ErrorDetails]]] = {}
    for error in errors:
        place = _locate(kind, tree, error)
        grouped.setdefault(place.key, []).append((place, error))
    # A list or group that became too short because of an error inside is reported by that error.
    inner = [key for key in grouped if not any(other.startswith(f"{key}.") for other in grouped)]
    return [_line(kind, grouped[key]) for key in inner]


def _locate(kind: type[Config], tree: Mapping[str, Any], error: ErrorDetails) -> _Place:
    """Drop the names of union branches from an error's location by walking it beside the tree and the classes."""
    node: Any = tree
    inside: list[type[Config]] = [kind]
    holders, branch, key = inside, "", list[str]()
    last = len(error["loc"]) - 1
    for index, item in enumerate(error["loc"]):
        keys, items = _mapping(node), _items(node)
        if items is not None and isinstance(item, int):
            key.append(str(item))
            node, holders = items[item], inside
        elif keys is not None and (item in keys or (index == last and error["type"] == "missing")):
            key.append(str(item))
            holders = inside
            fields = [held.model_fields[str(item)] for held in inside if item in held.model_fields]
            inside = [child for field in fields for child in config_classes(field.annotation)]
            node = keys.get(str(item))
            branch = branch if index == last else ""
        else:
            narrowed = [(held, name) for held in inside for name, values in _tags(held).items() if item in values]
            inside = [held for held, _ in narrowed] or inside
            branch = f"{narrowed[0][1]}={item}" if narrowed else branch
    return _Place(".".join(key), holders, branch)


def _mapping(node: Any) -> Mapping[str, Any] | None:
    return cast(Mapping[str, Any], node) if isinstance(node, Mapping) else None


def _items(node: Any) -> Sequence[Any] | None:
    return cast(Sequence[Any], node) if isinstance(node, list | tuple) else None


def _tags(kind: type[Config]) -> dict[str, tuple[Any, ...]]:
    """Return the fields that tell union branches apart (`stage`, `kind`) with the values of this branch."""
    names = [name for name in ("stage", "kind") if name in kind.model_fields]
    return {name: get_args(kind.model_fields[name].annotation) for name in names}


def _line(kind: type[Config], found: list[tuple[_Place, ErrorDetails]]) -> str:
    place, error = found[0]
    if error["type"] == "extra_forbidden":
        return _unknown_key(kind, place, error["input"])
    if error["type"] in {"value_error", "assertion_error"}:
        where = f"{place.key}: " if place.key else ""
        return where + str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    expected = " or ".join(dict.fromkeys(_expected(each) for _, each in found))
    if error["type"] == "missing":
        return f"{place.key}: missing; set it with {place.key}=..."
    if error["type"] == "union_tag_not_found":
        name = str(error.get("ctx", {}).get("discriminator", "")).strip("'")
        return f"{place.key}.{name}: missing; set it with {place.key}.{name}=..."
    key, given = place.key, error["input"]
    if error["type"] == "union_tag_invalid":
        name = str(error.get("ctx", {}).get("discriminator", "")).strip("'")
        key, given = f"{key}.{name}", error.get("ctx", {}).get("tag", given)
    return f"{key}: expected {expected}, given {_short(given)}{_meant_value(given, found)}"


def _expected(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] in _EXPECTED:
        return _EXPECTED[error["type"]]
    if error["type"] == "union_tag_invalid":
        return str(context.get("expected_tags", ""))
    if error["type"] in {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}:
        return f"a number {str(error['msg']).removeprefix('Input should be ')}"
    return str(error["msg"]).removeprefix("Input should be ")


def _meant_value(given: Any, found: list[tuple[_Place, ErrorDetails]]) -> str:
    """Return "; did you mean X?" for a misspelt choice."""
    if not isinstance(given, str):
        return ""
    texts = [str(each.get("ctx", {}).get(name, "")) for _, each in found for name in ("expected", "expected_tags")]
    choices = [choice for text in texts for choice in text.split("'")[1::2]]
    close = difflib.get_close_matches(given, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_key(kind: type[Config], place: _Place, given: Any) -> str:
    parent, _, name = place.key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    # `training.optimizer.type=muon` arrives as training.optimizer = {type: muon}: name the key that was typed.
    typed = [name]
    while (inner := _mapping(given)) is not None and len(inner) == 1:
        child = next(iter(inner))
        typed.append(child)
        given = inner[child]
    siblings = [sibling for holder in place.holders for sibling in holder.model_fields]
    where = f"{parent or 'the configuration'}{f' ({place.branch})' if place.branch else ''}"
    line = f"{prefix}{'.'.join(typed)}: unknown key, given {_short(given)}; {where} has no {name}"
    everywhere = [declared.path for declared in declared_keys(kind)]
    moved = _same_ending(prefix, typed, [path for path in everywhere if not path.startswith(f"{prefix}{name}")])
    branches = _other_branches(kind, place, name)
    if branches:
        return f"{line}, but {branches} has"
    close = difflib.get_close_matches(name, siblings, n=1)
    if close and (not moved or difflib.SequenceMatcher(None, name, close[0]).ratio() >= 0.85):
        return f"{line}; did you mean {'.'.join([prefix + close[0], *typed[1:]])}?"
    if moved:
        return f"{line}; did you mean {moved}?"
    near = difflib.get_close_matches(f"{prefix}{'.'.join(typed)}", everywhere, n=1, cutoff=0.75)
    return f"{line}; did you mean {near[0]}?" if near else f"{line}; known there: {', '.join(sorted(set(siblings)))}"


def _same_ending(prefix: str, typed: list[str], paths: list[str]) -> str | None:
    """Return the declared key that ends as the typed one does, the longest such ending first."""
    for start in range(len(typed)):
        ending = ".".join(typed[start:])
        matches = [path for path in paths if path == ending or path.endswith(f".{ending}")]
        if matches:
            return min(matches, key=lambda path: (not path.startswith(prefix), path.count("."), path))
    return None


def _other_branches(kind: type[Config], place: _Place, name: str) -> str:
    """Name the branches of the same union that do have the key: `stage=stage2 or stage=stage3`."""
    parent = place.key.rpartition(".")[0]
    wanted = f"{parent}.{name}" if parent else name
    owners = dict.fromkeys(declared.owner for declared in declared_keys(kind) if declared.path == wanted)
    tags = [(tag, value) for owner in owners for tag, values in _tags(owner).items() for value in values]
    names = [f"{tag}={value}" for tag, value in tags if f"{tag}={value}" != place.branch]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
