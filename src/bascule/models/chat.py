"""Turning a list of chat messages into a prompt by the model's own template, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from bascule.errors import InvalidRequest, ModelError
from bascule.models.sandbox import Sandbox, clock

_MOST_INDENT = 64


class ChatTemplate:
    """A compiled chat template. Gives the same text as transformers' `apply_chat_template(tokenize=False)`."""

    def __init__(
        self, template: str, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        """`special_tokens` are the variables `bos_token`, `eos_token` and so on, as far as the model has them.

        `now` answers the templates that write today's date. Raises ModelError for a template that does not compile.
        """
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the model's chat template cannot be read: line {error.lineno}: {error.message}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, to be encoded without a further start token.

        `variables` are the template's own switches. Raises InvalidRequest with the template's words where it refuses.
        """
        given = {
            **self._special_tokens,
            "documents": None,
            **(variables or {}),
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with clock():
                return self._template.render(given)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses: {error.message}", param="messages") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the model's chat template cannot take these messages: {error}", param="messages"
            ) from error


def require_template(template: ChatTemplate | None, model: str) -> ChatTemplate:
    """`template`, or InvalidRequest for a model that has none."""
    if template is None:
        raise InvalidRequest(f"the model {model} has no chat template; use /v1/completions with a plain prompt")
    return template


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks training targets, renders as what it holds."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter of this name escapes HTML, which no model was trained on."""
    if isinstance(indent, int) and indent > _MOST_INDENT:
        raise jinja2.TemplateError(f"tojson with an indent of {indent}; at most {_MOST_INDENT} are taken")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
