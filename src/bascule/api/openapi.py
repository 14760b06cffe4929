"""What the APIs are, for programs: OpenAPI documents of all paths.

A body's parameters, with their types and bounds, are those that its reader asks for, taken down while it reads an
example; errors are the classes that are raised; the admin API's figures are the structs that it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec
from msgspec import Struct

from bascule import __version__
from bascule.api import context
from bascule.api.chat import ROLES, read_chat
from bascule.api.completions import read_completion
from bascule.api.endpoint import Read
from bascule.api.fields import Default, Fields
from bascule.api.parameters import MAX_LOGIT_BIAS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_STOPS
from bascule.api.prompts import Served
from bascule.api.tokens import Message, Tokenizer
from bascule.config import LEAST_SLO_S, MOST_SLO_S
from bascule.errors import RequestError
from bascule.link_wire import LINK_TRANSPORTS, MOST_LINK_BYTES, MOST_RUNS
from bascule.observe.decisions import KEPT
from bascule.router.backend import LinkReport, ReloadStatus
from bascule.types import KVLayout, ModelCard, Role, WorkerLoad, WorkerStatus

Schema = dict[str, Any]

PATH = "/openapi.json"
_UNKNOWN = ModelCard(
    name="", fingerprint="", context=2**31 - 1, vocab=2**31 - 1, layout=KVLayout("uint8", 1, 1, 1, 1, 1, 1)
)
"""Stands for the model before the first worker has registered."""


class Operation(Struct, frozen=True, kw_only=True):
    """What can be asked of a path."""

    summary: str
    answer: Schema
    parameters: tuple[Schema, ...] = ()
    body: Schema | None = None
    media: tuple[str, ...] = ("application/json",)


def api_document(card: ModelCard | None) -> Schema:
    """Of the public API that serves this model, if one is known yet."""
    served = card or _UNKNOWN
    return _document("Bascule", _api(served, [card.name] if card is not None else []), {})


def admin_document() -> Schema:
    """Of the operator's API."""
    written = [WorkerStatus, WorkerLoad, LinkReport, ReloadStatus]
    _, components = msgspec.json.schema_components(written, ref_template=_REFERENCE)
    return _document("Bascule admin", _admin(components["WorkerStatus"]), components)


def _document(title: str, operations: dict[tuple[str, str], Operation], components: Schema) -> Schema:
    paths: dict[str, Schema] = {}
    for (method, path), operation in operations.items():
        paths.setdefault(path, {})[method.lower()] = _operation(operation)
    errors = {"Error": _ERROR}
    security = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, **errors}, "securitySchemes": security},
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> Schema:
    content = {media: {"schema": operation.answer} for media in operation.media[:1]}
    content |= {media: {} for media in operation.media[1:]}
    good = {"description": "the answer", "headers": _ANSWER_HEADERS, "content": content}
    made: Schema = {
        "summary": operation.summary,
        "parameters": list(operation.parameters),
        "responses": {"200": good, **_errors()},
    }
    if operation.body is not None:
        made["requestBody"] = {
            "required": "required" in operation.body,
            "content": {"application/json": {"schema": operation.body}},
        }
    return made


# ---------------------------------------------------------------- bodies, as their readers see them


class Recorder(Fields):
    """Takes down what it is asked for."""

    def __init__(self, body: dict[str, object], prefix: str = "") -> None:
        super().__init__(body, prefix)
        self.schemas: dict[str, Schema] = {}

    def value(self, name: str, harmless: Sequence[object] | None = None) -> object | None:
        form: Schema = {} if harmless is None else {"enum": [*harmless, None]}
        self.schemas.setdefault(name, _FORMS.get(name, form))
        return super().value(name, harmless)

    def boolean(self, name: str) -> bool:
        self.schemas[name] = {"type": ["boolean", "null"]}
        return super().boolean(name)

    def integer(self, name: str, default: Default, low: int | None = None, high: int | None = None) -> int | Default:
        self.schemas[name] = {"type": ["integer", "null"], **_bounds(minimum=low, maximum=high)}
        return super().integer(name, default, low, high)

    def number(
        self, name: str, default: Default, low: float, high: float, *, above_low: bool = False
    ) -> float | Default:
        lowest = {"exclusiveMinimum" if above_low else "minimum": low}
        self.schemas[name] = {"type": ["number", "null"], **lowest, "maximum": high}
        return super().number(name, default, low, high, above_low=above_low)

    def text(self, name: str, default: Default) -> str | Default:
        self.schemas[name] = _FORMS.get(name, {"type": ["string", "null"]})
        return super().text(name, default)

    def items(self, name: str) -> list[object] | None:
        self.schemas[name] = _FORMS.get(name, {"type": ["array", "null"]})
        return super().items(name)

    def object(self, name: str) -> dict[str, object] | None:
        self.schemas[name] = _FORMS.get(name, {"type": ["object", "null"]})
        return super().object(name)

    def nested(self, name: str) -> Fields | None:
        given = self.object(name) or {}
        inner = Recorder(given, f"{self.param(name)}.")
        self.schemas[name] = {"type": ["object", "null"], "properties": inner.schemas}
        return inner


class _NoText:
    """A tokenizer for an example that has none."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return [0]


def _body(read: Read, card: ModelCard, names: list[str], example: dict[str, object]) -> Schema:
    """The schema of a body that `read` reads; the fields of the example are required."""
    fields = Recorder({"model": card.name, **example, "stream": True})
    reading = read(fields, Served(card, card.context), cast(Tokenizer, _NoText()))
    try:
        reading.send(None)  # type: ignore[attr-defined]
    except StopIteration:
        pass
    else:
        raise RuntimeError("an example is read without waiting for anything")
    model: Schema = {"type": "string", **({"enum": names} if names else {})}
    return {
        "type": "object",
        "properties": {**fields.schemas, "model": model},
        "required": ["model", *example],
    }


def _bounds(**bounds: float | None) -> Schema:
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _object(**properties: Schema) -> Schema:
    """An object that always has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_REFERENCE = "#/components/schemas/{name}"
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_TOKENS = _list(_COUNT, minItems=1)
_SOME_TEXT: Schema = {"type": "string", "minLength": 1}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_FORMS: dict[str, Schema] = {
    "prompt": {"anyOf": [_SOME_TEXT, _TOKENS, _list(_SOME_TEXT, minItems=1), _list(_TOKENS, minItems=1)]},
    "messages": _list(
        {
            "type": "object",
            "properties": {
                "role": {"enum": list(ROLES)},
                "content": {"anyOf": [_TEXT, _list(_object(type={"const": "text"}, text=_TEXT))]},
                "name": _maybe(_TEXT),
            },
            "required": ["role", "content"],
        },
        minItems=1,
    ),
    "stop": {"anyOf": [_STOP, _list(_STOP, maxItems=MAX_STOPS), {"type": "null"}]},
    "stop_token_ids": _maybe(_list(_COUNT, maxItems=MAX_STOP_TOKENS)),
    "cache_salt": _maybe(_SOME_TEXT),
    "logit_bias": _maybe(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
}
"""Of the fields that have more than one type, or parts."""

# ---------------------------------------------------------------- headers and errors


def _header(name: str, schema: Schema, told: str) -> Schema:
    return {"name": name, "in": "header", "required": False, "description": told, "schema": schema}


_BOUND: Schema = {"type": "number", "minimum": LEAST_SLO_S, "maximum": MOST_SLO_S}
_NAME: Schema = {"type": "string", "pattern": "^[ -~]{1,128}$"}
_ASKED = (
    _header(context.REQUEST_ID, _TEXT, "your id for the request; one that cannot be used is replaced"),
    _header(context.SESSION, _NAME, "your name for a conversation"),
    _header(context.TIMEOUT, {"type": "number", "exclusiveMinimum": 0}, "seconds until the request ends with 504"),
    *(_header(name, _BOUND, "seconds") for name in (context.SLO_TTFT, context.SLO_TPOT, context.SLO_GAP)),
)
_ANSWER_HEADERS: Schema = {context.REQUEST_ID: {"schema": _TEXT}}
_ERROR = _object(
    error=_object(message=_SOME_TEXT, type=_SOME_TEXT, param=_maybe(_TEXT), code=_maybe(_TEXT)),
)


def _errors() -> Schema:
    """A response for each status that an error has, in the words of its class."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(name="Error")}}}
    told: dict[str, list[str]] = {}
    for error in _kinds(RequestError):
        told.setdefault(str(error.status), []).append((error.__doc__ or "").partition(": ")[2] or "it failed")
    return {
        status: {"description": " ".join(words), "headers": _ANSWER_HEADERS, "content": content}
        for status, words in sorted(told.items())
    }


def _kinds(error: type[RequestError]) -> Iterable[type[RequestError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _kinds(kind)


# ---------------------------------------------------------------- what there is


def _choices(**choice: Schema) -> Schema:
    details = {
        **_object(cached_tokens=_COUNT),
        "description": "and loaded_tokens, loaded_bytes, load_s, spared_s, handoff, where there are any",
    }
    usage = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT, prompt_tokens_details=details)
    one = _object(index=_COUNT, finish_reason={"enum": ["stop", "length"]}, **choice)
    return _object(
        id=_SOME_TEXT, created=_COUNT, model=_TEXT, object=_TEXT, choices=_list(one, minItems=1), usage=usage
    )


def _api(card: ModelCard, names: list[str]) -> dict[tuple[str, str], Operation]:
    streamed = ("application/json", "text/event-stream")
    model = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT)
    a_model: Schema = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    logprobs = _maybe({"type": "object"})
    said = _object(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"})
    return {
        ("POST", "/v1/completions"): Operation(
            summary="Go on from prompts",
            answer=_choices(text=_TEXT, logprobs=logprobs),
            parameters=_ASKED,
            body=_body(read_completion, card, names, {"prompt": [0]}),
            media=streamed,
        ),
        ("POST", "/v1/chat/completions"): Operation(
            summary="Answer a chat",
            answer=_choices(message=said, logprobs=logprobs),
            parameters=_ASKED,
            body=_body(read_chat, card, names, {"messages": [{"role": "user", "content": "Hello"}]}),
            media=streamed,
        ),
        ("GET", "/v1/models"): Operation(
            summary="The model that is served", answer=_object(object={"const": "list"}, data=_list(model))
        ),
        ("GET", "/v1/models/{model}"): Operation(summary="The same by its name", answer=model, parameters=(a_model,)),
        ("GET", "/health"): _HEALTH,
        ("GET", "/ready"): Operation(
            summary="Whether a request could be placed", answer=_object(status={"const": "ready"})
        ),
        ("GET", "/metrics"): Operation(summary="For Prometheus", answer=_TEXT, media=("text/plain",)),
        ("GET", PATH): _THIS,
    }


_LINK = {
    "type": "object",
    "properties": {
        "from": _TEXT,
        "to": _TEXT,
        "transport": {"enum": list(LINK_TRANSPORTS)},
        "bytes": {"type": "integer", "minimum": 1, "maximum": MOST_LINK_BYTES},
        "runs": {"type": "integer", "minimum": 1, "maximum": MOST_RUNS},
    },
    "required": ["from", "to", "transport"],
}
_HEALTH = Operation(summary="Whether the process lives", answer=_object(status={"const": "ok"}))
_THIS = Operation(summary="This document", answer=_object(openapi=_TEXT, paths={"type": "object"}))


def _admin(status: Schema) -> dict[tuple[str, str], Operation]:
    own = {name: schema for name, schema in status["properties"].items() if name != "load"}
    worker = {"allOf": [_object(**own), {"$ref": _REFERENCE.format(name="WorkerLoad")}]}
    worker_id: Schema = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    limit: Schema = {
        "name": "limit",
        "in": "query",
        "required": False,
        "schema": {"type": "integer", "minimum": 1, "maximum": KEPT},
    }

    timeout: Schema = {
        "type": "object",
        "properties": {"timeout": {"type": ["number", "null"], "minimum": 0, "maximum": 1e6}},
    }
    renewed = {"$ref": _REFERENCE.format(name="ReloadStatus")}

    def operate(summary: str, body: Schema) -> Operation:
        strict = {**body, "additionalProperties": False}
        return Operation(summary=summary, answer=worker, parameters=(worker_id,), body=strict)

    decision = {"id": _TEXT, "outcome": _TEXT, "reason": _TEXT}
    return {
        ("GET", "/admin/state"): Operation(
            summary="The cluster",
            answer=_object(queued=_COUNT, active=_COUNT, integrity_violations=_COUNT, workers=_list(worker)),
        ),
        ("GET", "/admin/reload"): Operation(summary="How far the latest reload is", answer=renewed),
        ("POST", "/admin/reload"): Operation(
            summary="Start all workers anew, one after another",
            answer=renewed,
            body={**timeout, "additionalProperties": False},
        ),
        ("POST", "/admin/workers/{id}/drain"): operate("Place nothing more on a worker", timeout),
        ("POST", "/admin/workers/{id}/resume"): operate("Place on it again", {"type": "object"}),
        ("POST", "/admin/workers/{id}/role"): operate(
            "Use it in another role", _object(role={"enum": [role.value for role in Role]})
        ),
        ("POST", "/admin/links"): Operation(
            summary="Measure what handing KV from one worker to another takes",
            answer={"$ref": _REFERENCE.format(name="LinkReport")},
            body={**_LINK, "additionalProperties": False},
        ),
        ("GET", "/admin/decisions"): Operation(
            summary="The latest requests", answer=_object(decisions=_list(_object(**decision))), parameters=(limit,)
        ),
        ("GET", "/admin/decisions/{id}"): Operation(
            summary="Why a request went where it did",
            answer=_object(**decision, candidates=_list({"type": "object"}), outputs=_list({"type": "object"})),
            parameters=(worker_id,),
        ),
        ("GET", "/health"): _HEALTH,
        ("GET", PATH): _THIS,
    }
