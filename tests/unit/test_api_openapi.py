"""The OpenAPI documents say what is there: every route, every parameter that is read, every error's shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_rig import ApiRig
from starlette.routing import Route, Router

from bascule.api import openapi
from bascule.api.identity import IdentityMiddleware
from bascule.types import WorkerLoad


@pytest.fixture(scope="module")
def rig() -> Iterator[ApiRig]:
    with ApiRig() as made:
        yield made


def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


def routes(app: Any) -> set[tuple[str, str]]:
    """Of an application without keys."""
    assert isinstance(app, IdentityMiddleware) and isinstance(app._app, Router)
    found = [route for route in app._app.routes if isinstance(route, Route)]
    assert len(found) == len(app._app.routes), "each is one that the document can have"
    return {
        (method, re.sub(r":path\}", "}", route.path)) for route in found for method in (route.methods or ()) - {"HEAD"}
    }


def document(rig: ApiRig, server: int) -> dict[str, Any]:
    """Of the API (0) or the admin API (1)."""
    made: dict[str, Any] = rig.http.get(f"{(rig.server, rig.admin)[server].url}/openapi.json").json()
    return made


@pytest.mark.parametrize("server", [0, 1])
def test_the_document_and_the_routes_agree(rig: ApiRig, server: int) -> None:
    assert operations(document(rig, server)) == routes(rig.apps[server])


BODIES = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


def body_of(rig: ApiRig, path: str) -> dict[str, Any]:
    """The schema of a body."""
    body: dict[str, Any] = document(rig, 0)["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return dict(body["schema"])


@pytest.mark.parametrize("path", BODIES)
def test_every_bound_of_the_document_is_the_server_s(rig: ApiRig, path: str) -> None:
    body, bounded = body_of(rig, path), 0
    assert body["properties"]["model"]["enum"] == ["tiny"] and set(body["required"]) == {"model", *BODIES[path]}
    for name, schema in body["properties"].items():
        for key, beyond in (("minimum", -1), ("maximum", 1)):
            if key in schema:
                bounded += 1
                answer = rig.post(path, {"model": "tiny", **BODIES[path], name: schema[key] + beyond})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert bounded > 15


@pytest.mark.parametrize("path", BODIES)
def test_every_type_of_the_document_is_the_server_s(rig: ApiRig, path: str) -> None:
    properties = body_of(rig, path)["properties"]
    typed = {name: schema["type"] for name, schema in properties.items() if isinstance(schema.get("type"), list)}
    assert len(typed) > 15
    for name, types in typed.items():
        value = 7 if "object" in types else {"no": "such"}
        answer = rig.post(path, {"model": "tiny", **BODIES[path], name: value})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_type"), name


def test_there_is_a_document_before_a_worker_has_registered() -> None:
    content = openapi.api_document(None)["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    assert "enum" not in content["application/json"]["schema"]["properties"]["model"]


def test_figures_of_workers_are_those_that_they_report(rig: ApiRig) -> None:
    schemas = document(rig, 1)["components"]["schemas"]
    assert set(schemas["WorkerLoad"]["properties"]) == set(WorkerLoad.__struct_fields__)
