"""What a task is: labelled examples as a prompt and a response, in splits, and how answers are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wrinklefree.data.splits import Split

Metric = Literal["accuracy", "rouge_l"]


@dataclass(frozen=True)
class Example:
    """One prompt and what should follow it."""

    before: str
    """Instruction ahead of the passage; kept whole."""
    passage: str
    """The part that a row too short for the prompt cuts, from its end."""
    after: str
    """Question or cue behind the passage; kept whole."""
    response: str
    """Target text, with its leading space."""
    label: int | None = None
    """Index into `choices`; None for free text."""
    choices: tuple[str, ...] = ()
    """Label words, each a possible `response`."""

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.before + self.passage + self.after


@dataclass(frozen=True)
class Task:
    """A named set of examples and how answers are judged."""

    name: str
    kind: Literal["classification", "generation"]
    metric: Metric
    label_words: tuple[str, ...]
    """All label words, without the leading space; an example's own `choices` may be fewer. Empty for generation."""
    load: Callable[[Split], list[Example]]
    """Examples of a split, in a fixed order."""
    identity: Callable[[], str]
    """Identity of the examples, cheap to compute."""
