"""Generated questions whose answer stands in the prompt: read a few statements, repeat the colour of one of them.

What it exercises (attention to the context) is what ternary weights damage, and no fact has to be remembered for it.
"""

import random
from dataclasses import dataclass
from types import MappingProxyType

from wrinklefree.data.splits import Split

GENERATOR_VERSION = 1
"""Part of data fingerprints: raise it whenever the examples change."""

COLOURS = ("red", "blue", "green", "black", "white", "brown", "yellow", "purple")
_THINGS = (
    "lamp", "chair", "door", "coat", "boat", "box", "cup", "book", "hat", "house", "car", "wall",
    "bag", "bed", "clock", "flag", "table", "shoe", "ball", "gate", "roof", "bell", "plate", "tent",
)  # fmt: skip
_EXAMPLES = MappingProxyType({"train": 3000, "validation": 300, "test": 600})
_FEWEST, _MOST = 3, 6


@dataclass(frozen=True)
class Lookup:
    """Statements, the beginning of a repeated one, and the index of its colour."""

    context: str
    cue: str
    answer: int


def lookups(split: Split) -> list[Lookup]:
    """Examples of a split; no context of one split occurs in another."""
    generator = random.Random(f"in-context lookup {GENERATOR_VERSION}")
    seen: set[str] = set()
    by_split: dict[str, list[Lookup]] = {}
    for name, count in _EXAMPLES.items():
        found: list[Lookup] = []
        while len(found) < count:
            drawn = _draw(generator)
            if drawn.context not in seen:
                seen.add(drawn.context)
                found.append(drawn)
        by_split[name] = found
    return by_split[split]


def _draw(generator: random.Random) -> Lookup:
    count = _FEWEST + int(generator.random() * (_MOST - _FEWEST + 1))
    things: list[str] = []
    while len(things) < count:
        thing = _THINGS[int(generator.random() * len(_THINGS))]
        if thing not in things:
            things.append(thing)
    colours = [int(generator.random() * len(COLOURS)) for _ in things]
    asked = int(generator.random() * count)
    context = " ".join(f"The {thing} is {COLOURS[colour]}." for thing, colour in zip(things, colours, strict=True))
    return Lookup(context, f" The {things[asked]} is", colours[asked])
