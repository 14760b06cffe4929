"""`/v1/chat/completions`: messages through the model's chat template, and OpenAI's newer form of answers."""

from __future__ import annotations

from bascule.api.fields import Fields, check_text, type_name, wrong_type, wrong_value
from bascule.api.forms import json_logprob
from bascule.api.parameters import check_model, read_parameters
from bascule.api.prompts import (
    MAX_TOKENS,
    TEXT_ONLY,
    Call,
    Served,
    check_outputs,
    fitted,
    refuse_unsupported,
    tokenised,
)
from bascule.api.text import Piece, TokenReport
from bascule.api.tokens import Message, Tokenizer
from bascule.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20

ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles and what chat templates know; `developer` is its newer name for `system`."""

_NO_TOOLS = "is not supported: this server does not call tools."


async def read_chat(fields: Fields, served: Served, tokenizer: Tokenizer) -> Call:
    """Check the body of a chat completion; raises InvalidRequest or NotFound."""
    check_model(fields, served.card)
    _refuse_unsupported_fields(fields)
    parameters = read_parameters(fields, served.card, max_tokens=_max_tokens(fields), logprobs=_logprobs(fields))
    check_outputs(1, parameters.n)
    messages = _messages(fields)
    tokens = await tokenised(tokenizer.encode_chat, messages, sum(len(message.content) for message in messages))
    prompt = fitted("messages", tokens, parameters, None, served)
    return Call(prompts=(prompt,), parameters=parameters, form=ChatForm(tokenizer))


def _refuse_unsupported_fields(fields: Fields) -> None:
    for name in ("tools", "functions"):
        refuse_unsupported(fields, name, _NO_TOOLS, harmless=([],))
    for name in ("tool_choice", "function_call"):
        refuse_unsupported(fields, name, _NO_TOOLS, harmless=("none", "auto"))
    refuse_unsupported(fields, "audio", "is not supported: this server answers with text only.")
    refuse_unsupported(fields, "modalities", 'may only be ["text"]: this server answers with text.', (["text"],))
    refuse_unsupported(fields, "web_search_options", "is not supported: this server does not search the web.")
    refuse_unsupported(fields, "response_format", TEXT_ONLY, ({"type": "text"},))


def _max_tokens(fields: Fields) -> int | None:
    """`max_completion_tokens`, or else its older name."""
    older = fields.integer("max_tokens", None, 1, MAX_TOKENS)
    return fields.integer("max_completion_tokens", older, 1, MAX_TOKENS)


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise wrong_value("top_logprobs", "is allowed only with logprobs: true.")
    return (top or 0) if wanted else None


def _messages(fields: Fields) -> list[Message]:
    items = fields.items("messages")
    if items is None:
        raise InvalidRequest("messages is missing.", param="messages", code="missing_required_parameter")
    if not items:
        raise InvalidRequest("messages is empty; send at least one.", param="messages", code="empty_prompt")
    return [_message(f"messages[{index}]", item) for index, item in enumerate(items)]


def _message(param: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise wrong_type(param, "an object", item)
    fields = Fields(item, f"{param}.")
    role = fields.text("role", None)
    if role in ("tool", "function") or fields.value("tool_calls") or fields.value("function_call"):
        raise wrong_value(param, _NO_TOOLS)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise wrong_value(fields.param("role"), f"is {role!r}, but must be one of {known}.")
    fields.text("name", None)
    return Message(ROLES[role], _content(fields.param("content"), fields.value("content")))


def _content(param: str, content: object) -> str:
    """The text of a message: a string, or the concatenation of its text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(param, "a string or a list of text parts", content)
    return "".join(_part(f"{param}[{index}]", part) for index, part in enumerate(content))


def _part(param: str, part: object) -> str:
    if not isinstance(part, dict):
        raise wrong_type(param, "an object", part)
    kind = part.get("type")
    if kind != "text":
        shown = repr(kind) if isinstance(kind, str) else type_name(kind)
        raise wrong_value(f"{param}.type", f"is {shown}, but this model reads text only: send parts of type 'text'.")
    return check_text(f"{param}.text", part.get("text"))


class ChatForm:
    """A `chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self) -> dict[str, object]:
        """Who speaks; OpenAI's streams begin so."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, piece: Piece) -> dict[str, object]:
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs(piece) if piece.reports else None}

    def whole(self, piece: Piece) -> dict[str, object]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(piece) if piece.reports else None}

    def _logprobs(self, piece: Piece) -> dict[str, object]:
        return {"content": [self._token(report) for report in piece.reports], "refusal": None}

    def _token(self, report: TokenReport) -> dict[str, object]:
        top = [self._entry(token, logprob) for token, logprob in report.logprobs.top]
        return {**self._entry(report.token, report.logprobs.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": json_logprob(logprob), "bytes": list(raw)}
