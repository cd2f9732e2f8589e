"""Write the reference part of docs/configuration_guide.md from the typed configs and the files in configs/.

`python scripts/make_configuration_guide.py` rewrites everything between the two markers; the prose above them is kept.
A test compares the file with `render`, so a new key without a regenerated guide is noticed.
"""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wrinklefree.training.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "configuration_guide.md"
BEGIN = "<!-- generated: begin (scripts/make_configuration_guide.py) -->"
END = "<!-- generated: end -->"


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, without `Annotated` around them; a single type is its own only member."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in members(argument)]
    return [annotation]


def config_classes(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a value of this type may be, also as the items of a tuple."""
    found: list[type[BaseModel]] = []
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            found.append(member)
        elif get_origin(member) is tuple:
            found += [cls for argument in get_args(member) if argument is not ... for cls in config_classes(argument)]
    return found


def type_name(annotation: Any) -> str:
    """How a reader would say the type: choices in full, `null` for None."""
    names: list[str] = []
    for member in members(annotation):
        origin = get_origin(member)
        if member is NoneType:
            names.append("null")
        elif origin is Literal:
            names += [str(choice) for choice in get_args(member)]
        elif origin is tuple:
            items = " or ".join(dict.fromkeys(type_name(a) for a in get_args(member) if a is not ...))
            names.append(f"list of {items}")
        elif origin is dict:
            names.append("mapping")
        elif isinstance(member, type):
            names.append({"str": "text", "bool": "true or false"}.get(member.__name__, member.__name__))
    return ", ".join(dict.fromkeys(names))


def bounds(field: FieldInfo) -> str:
    """The limits that pydantic enforces, such as `> 0`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found: list[str] = []
    for limit in field.metadata:
        for name, sign in signs.items():
            if hasattr(limit, name):
                found.append(f"{sign} {getattr(limit, name)}")
    return " and ".join(found)


def default_of(field: FieldInfo) -> str:
    """The default as YAML writes it, or `required`."""
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        return "below"
    return f"`{value}`"


def one_cell(text: str) -> str:
    """Text on one line, safe inside a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(cls: type[BaseModel], prefix: str) -> Iterator[str]:
    """One row a key; keys that hold a config of their own are linked by their dotted name."""
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        nested = config_classes(annotation)
        if nested and default_of(field) != "`null`":
            plural = any(get_origin(member) is tuple for member in members(annotation))
            values = "list of sections" if plural else "section"
        else:
            values = "section, null" if nested else type_name(annotation)
            limits = bounds(field)
            values += f" ({limits})" if limits else ""
        cells = (f"`{prefix}{name}`", values, default_of(field), field.description or "")
        yield "| " + " | ".join(one_cell(cell) for cell in cells) + " |"


def sections(cls: type[BaseModel], prefix: str, title: str, seen: set[type[BaseModel]]) -> Iterator[str]:
    """The table of one config class, then those of the configs inside it, depth first; each class once."""
    if cls in seen:
        return
    seen.add(cls)
    yield f"### {title}"
    yield ""
    yield " ".join((cls.__doc__ or "").split())
    yield ""
    yield from table(cls, prefix)
    yield ""
    for name, field in cls.model_fields.items():
        nested = config_classes(field.annotation)
        for inner in nested:
            yield from sections(inner, f"{prefix}{name}.", heading(f"{prefix}{name}", inner, nested), seen)


def heading(key: str, cls: type[BaseModel], alternatives: list[type[BaseModel]]) -> str:
    """`training.schedule`, or with the value that selects this class: `training` where `stage: stage2`."""
    if len(alternatives) == 1:
        return f"`{key}`"
    for selector in ("stage", "kind"):
        if selector in cls.model_fields:
            choices = type_name(cls.model_fields[selector].annotation)
            return f"`{key}` with `{selector}` = {choices}"
    return f"`{key}`: {cls.__name__}"


def groups(configs: Path) -> Iterator[str]:
    """The option files of every Hydra group; recipes stand in a folder a model and are chosen by model and stage."""
    yield "| group | options |"
    yield "|---|---|"
    for folder in sorted(path for path in configs.iterdir() if path.is_dir()):
        names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        options = ", ".join(f"`{name}`" for name in names)
        yield f"| `{folder.name}=` | {options} |"


def render() -> str:
    """The whole text between the markers."""
    lines = ["## Groups and their options", "", *groups(ROOT / "configs"), "", "## Every key", ""]
    lines += sections(RunConfig, "", "The root", set())
    return "\n".join(lines).rstrip()


def with_reference(guide: str, reference: str) -> str:
    """The guide with the part between its markers replaced."""
    before, rest = guide.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{reference}\n\n{END}{after}"


if __name__ == "__main__":
    GUIDE.write_text(with_reference(GUIDE.read_text(encoding="utf-8"), render()), encoding="utf-8")
