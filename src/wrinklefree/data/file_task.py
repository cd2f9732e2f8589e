r"""A task of one's own: `data.task=file:PATH`, a `.jsonl` file with an example a line.

    {"prompt": "Review: A quiet delight.\nSentiment:", "response": "positive", "choices": ["negative", "positive"]}
    {"prompt": "Q: Who wrote it?\nA:", "response": "Nobody knows."}

With `choices` in every line it is a classification, judged by accuracy; without, text is generated and judged by ROUGE-L. A
line may name its `split` (train, validation, test); else a hash of its prompt decides: a tenth each for validation and test.
Training sees what stands between prompt and response as written here: a response begins with a space unless the
prompt ends with white space.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from wrinklefree.data.splits import Split, split_by_hash
from wrinklefree.data.task import Example, Task
from wrinklefree.utils.errors import ConfigError, DataError

PREFIX = "file:"
HELD_OUT_SHARE = 0.1
"""Of the lines that name no split, for validation and for test each."""
_KEYS = {"prompt", "response", "choices", "split"}


def file_task(name: str) -> Task:
    """The task of a file; `name` begins with `file:`.

    Raises:
        ConfigError: there is no such file.
        DataError: a line is no example, naming the line; or the file mixes the two kinds.
    """
    path = Path(name.removeprefix(PREFIX))
    if not path.is_file():
        raise ConfigError(
            f"data.task={name}: {path} does not exist; give a .jsonl file with a prompt and a response a line"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    examples = _read(path, digest)
    words = tuple(dict.fromkeys(choice.removeprefix(" ") for _, e in examples for choice in e.choices))
    kind: Literal["classification", "generation"] = "classification" if words else "generation"
    return Task(
        name=name,
        kind=kind,
        metric="accuracy" if words else "rouge_l",
        label_words=words,
        load=lambda split: [example for where, example in examples if where == split],
        identity=lambda: f"file {digest} v1",
    )


@lru_cache(maxsize=4)
def _read(path: Path, digest: str) -> tuple[tuple[Split, Example], ...]:
    """Examples with their splits; the digest makes a changed file another one."""
    found: list[tuple[Split, Example]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_example(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: {error}; a line is an object with prompt and response") from error
    if not found:
        raise DataError(f"{path} has no examples; give a line with a prompt and a response for each")
    with_choices = sum(bool(example.choices) for _, example in found)
    if 0 < with_choices < len(found):
        raise DataError(f"{path}: {with_choices} of {len(found)} lines have choices; give them to all lines or to none")
    return tuple(found)


def _example(row: Any) -> tuple[Split, Example]:
    if not isinstance(row, Mapping):
        raise TypeError(f"found {type(row).__name__}")
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}, known are {', '.join(sorted(_KEYS))}")
    for key in ("prompt", "response"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key} is missing or empty")
    prompt: str = row["prompt"]
    gap = "" if prompt[-1].isspace() else " "
    split = row.get("split")
    if split is None:
        split = split_by_hash(prompt, validation=HELD_OUT_SHARE, test=HELD_OUT_SHARE)
    elif split not in get_args(Split):
        raise ValueError(f"split is {split!r}, and splits are {', '.join(get_args(Split))}")
    choices = row.get("choices")
    response = gap + row["response"].strip()
    if choices is None:
        return split, Example("", prompt, "", response)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices are not a list of two or more texts")
    if row["response"] not in choices:
        raise ValueError(f"the response {row['response']!r} is none of the choices {choices}")
    spelled = tuple(gap + choice for choice in choices)
    return split, Example(
        "", prompt, "", spelled[choices.index(row["response"])], choices.index(row["response"]), spelled
    )
