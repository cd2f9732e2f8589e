"""A conversation as the token ids of a prompt.

The template comes from the tokenizer and runs in Jinja's immutable sandbox with what templates of the Hugging Face hub
expect (`raise_exception`, `strftime_now`, `tojson`, `break`, `{% generation %}`). A model without one, as every base
model, gets a plain script of "User:" and "Assistant:" lines that ends where the next "User:" would begin.

Text that people write cannot become control tokens: where a message spells one (`<|im_end|>`), it is encoded in two parts
cut inside that spelling, so that the model reads the same letters as ordinary text.
"""

import datetime
import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from wrinklefree.serving.text_stream import TokenBytes
from wrinklefree.utils.errors import DataError
from wrinklefree.utils.tokenizer import TextTokenizer

Role = Literal["system", "user", "assistant"]
PLAIN_STOPS = ("\nUser:",)
"""Stop strings of a conversation without a template."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what to train on; for a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatPrompt:
    """Turns conversations into prompts, by one tokenizer's conventions. Safe to use from several threads."""

    def __init__(self, tokenizer: TextTokenizer, token_bytes: TokenBytes) -> None:
        """Compile the template; one that cannot be compiled is reported now and refuses conversations later."""
        self._tokenizer = tokenizer
        spellings = sorted((word for word in token_bytes.special.values() if len(word) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._broken: str | None = None
        self._template = None
        if tokenizer.chat_template is not None:
            try:
                self._template = _environment().from_string(tokenizer.chat_template)
            except TemplateSyntaxError as error:
                self._broken = f"{error.message} in line {error.lineno}"
                logger.warning("the model's chat template cannot be read (%s): only completions work", self._broken)

    @property
    def has_template(self) -> bool:
        """Whether the model brings a template; else the plain one is used."""
        return self._tokenizer.chat_template is not None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings that end an answer, besides the model's end tokens."""
        return () if self.has_template else PLAIN_STOPS

    def encode(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of the prompt that asks for the next answer.

        Args:
            messages: The conversation so far.
            options: Further variables of the template, such as `enable_thinking`.

        Raises:
            DataError: the template refuses the conversation, or cannot be read.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        marked = [Message(message.role, self._break_control(message.content, mark)) for message in messages]
        if self._broken is not None:
            raise DataError(f"the model's chat template cannot be read ({self._broken}); use completions instead")
        text = self._plain(marked) if self._template is None else self._render(marked, options or {})
        ids = [index for part in text.split(mark) for index in self._tokenizer.encode(part)]
        opening = self._tokenizer.bos_token_id
        if self._template is None and self._tokenizer.add_bos and opening is not None:
            return [opening, *ids]
        return ids

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        assert self._template is not None
        special = self._tokenizer.special
        variables = {
            "bos_token": special.bos or "",
            "eos_token": special.eos,
            "pad_token": special.pad or "",
            **options,
        }
        try:
            return self._template.render(
                **variables,
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses this conversation: {error.message}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, ZeroDivisionError) as error:
            raise DataError(f"the model's chat template fails on this conversation: {error}") from error

    def _plain(self, messages: Sequence[Message]) -> str:
        lines = [
            message.content if message.role == "system" else f"{message.role.capitalize()}: {message.content}"
            for message in messages
        ]
        return "\n".join([*lines, "Assistant:"])

    def _break_control(self, text: str, mark: str) -> str:
        """Put `mark` after the first character of everything that spells a control token, overlapping ones too."""
        if self._control is None:
            return text
        parts: list[str] = []
        place = 0
        while found := self._control.search(text, place):
            parts += [text[place : found.start() + 1], mark]
            place = found.start() + 1
        return "".join([*parts, text[place:]])


def encode_prompt(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Ids of a raw prompt: control tokens may be spelt out, and bos opens it where the model's convention says so."""
    ids = tokenizer.encode(text)
    opening = tokenizer.bos_token_id
    if tokenizer.add_bos and opening is not None and ids[:1] != [opening]:
        return [opening, *ids]
    return ids or [tokenizer.eos_token_id]  # an empty prompt is the start of a document, which follows another's end


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
