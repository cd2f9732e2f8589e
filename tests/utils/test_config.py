"""`decode`: strict types, and one line for every mistake."""

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from wrinklefree.utils.config import Config, config_classes, declared_keys, decode
from wrinklefree.utils.errors import ConfigError


class Paint(Config):
    color: Literal["red", "green"] = "red"
    layers: int | Literal["auto"] = "auto"


class Wall(Config):
    kind: Literal["wall"] = "wall"
    height: float = Field(gt=0)
    paint: Paint = Paint()


class Door(Config):
    kind: Literal["door"] = "door"
    is_open: bool = False
    handle: str | None = None

    @model_validator(mode="after")
    def _open_doors_have_handles(self) -> "Door":
        if self.is_open and self.handle is None:
            raise ValueError("part.is_open=true needs part.handle=...")
        return self


Part = Annotated[Wall | Door, Field(discriminator="kind")]


class House(Config):
    part: Part
    rooms: tuple[Part, ...] = ()
    windows: int = 4
    street: Paint = Paint()


WALL: dict[str, Any] = {"kind": "wall", "height": 2.5}
DOOR: dict[str, Any] = {"kind": "door"}


def mistake(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        decode(House, tree)
    return str(caught.value)


def test_a_good_tree_becomes_frozen_objects() -> None:
    house = decode(House, {"part": {"kind": "wall", "height": 2, "paint": {"layers": 3}}, "rooms": [DOOR]})
    assert house == House(part=Wall(height=2.0, paint=Paint(layers=3)), rooms=(Door(),))
    assert isinstance(house.part, Wall)
    with pytest.raises(ValidationError, match="frozen"):
        house.part.height = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (
            {"part": {**WALL, "heeight": 3}},
            "part.heeight: unknown key, given 3; part (kind=wall) has no heeight; did you mean part.height?",
        ),
        (
            {"part": WALL, "window": 3},
            "window: unknown key, given 3; the configuration has no window; did you mean windows?",
        ),
        (
            {"part": {**WALL, "windows": 3}},
            "part.windows: unknown key, given 3; part (kind=wall) has no windows; did you mean windows?",
        ),
        (
            {"part": {**WALL, "street": {"color": "red"}}},
            "part.street.color: unknown key, given 'red'; part (kind=wall) has no street; did you mean street.color?",
        ),
        (
            {"part": {**DOOR, "height": 1}},
            "part.height: unknown key, given 1; part (kind=door) has no height, but kind=wall has",
        ),
        (
            {"part": {**WALL, "xyzzy": 1}},
            "part.xyzzy: unknown key, given 1; part (kind=wall) has no xyzzy; known there: height, kind, paint",
        ),
        (
            {"part": WALL, "rooms": [DOOR, {**WALL, "heeight": 1}]},
            "rooms.1.heeight: unknown key, given 1; rooms.1 (kind=wall) has no heeight; did you mean rooms.1.height?",
        ),
        ({"part": {**WALL, "height": "tall"}}, "part.height: expected a number, given 'tall'"),
        ({"part": {**WALL, "height": "2.5"}}, "part.height: expected a number, given '2.5'"),
        ({"part": {**WALL, "height": True}}, "part.height: expected a number, given true"),
        ({"part": {**WALL, "height": -1}}, "part.height: expected a number greater than 0, given -1"),
        ({"part": {**WALL, "height": float("inf")}}, "part.height: expected a finite number, given Infinity"),
        ({"part": WALL, "windows": 1.5}, "windows: expected a whole number, given 1.5"),
        ({"part": WALL, "rooms": 1}, "rooms: expected a list, given 1"),
        ({"part": WALL, "street": "main"}, "street: expected a group of keys, given 'main'"),
        ({"part": {**DOOR, "is_open": 1}}, "part.is_open: expected true or false, given 1"),
        ({"part": {**DOOR, "handle": 3}}, "part.handle: expected text, given 3"),
        (
            {"part": {**WALL, "paint": {"color": "gren"}}},
            "part.paint.color: expected 'red' or 'green', given 'gren'; did you mean green?",
        ),
        (
            {"part": {**WALL, "paint": {"layers": "autp"}}},
            "part.paint.layers: expected a whole number or 'auto', given 'autp'; did you mean auto?",
        ),
        ({"part": {"kind": "dor"}}, "part.kind: expected 'wall', 'door', given 'dor'; did you mean door?"),
        ({"part": {"height": 2}}, "part.kind: missing; set it with part.kind=..."),
        ({"part": {"kind": "wall"}}, "part.height: missing; set it with part.height=..."),
        ({"rooms": []}, "part: missing; set it with part=..."),
        ({"part": {**DOOR, "is_open": True}}, "part: part.is_open=true needs part.handle=..."),
    ],
)
def test_a_mistake_is_one_line(tree: dict[str, Any], line: str) -> None:
    assert mistake(tree) == line


def test_every_mistake_has_its_line_and_what_follows_from_one_has_none() -> None:
    lines = mistake({"part": {**WALL, "height": "x"}, "windows": "y", "rooms": [{"kind": "wall"}]}).splitlines()
    assert lines == [
        "part.height: expected a number, given 'x'",
        "rooms.0.height: missing; set it with rooms.0.height=...",
        "windows: expected a whole number, given 'y'",
    ]


def test_a_long_value_is_cut() -> None:
    assert mistake({"part": WALL, "windows": "x" * 500}) == f"windows: expected a whole number, given '{'x' * 56}..."


def test_declared_keys_reach_through_unions_and_lists() -> None:
    paths = {declared.path: declared.owner for declared in declared_keys(House)}
    assert paths["part.height"] is Wall
    assert paths["rooms.handle"] is Door
    assert paths["part.paint.layers"] is Paint
    assert config_classes(Part) == [Wall, Door]


def test_decoding_loads_no_torch() -> None:
    """Help, mistakes and checks of credentials must not wait for it."""
    program = (
        "import sys\n"
        "import wrinklefree.cli, wrinklefree.cli_help\n"
        "from wrinklefree.composition import compose\n"
        "compose(['model=smollm2_135m', 'training=stage3_distill'])\n"
        "wrinklefree.cli_help.train_help()\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
