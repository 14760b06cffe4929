"""Whatever comes by HTTP, the API and the admin API answer as their OpenAPI documents say, and never with a 500."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import CheckFunction, GenerationMode
from schemathesis.specs.openapi import checks

from fuzz.inputs import fuzzing
from fuzz.live import WAIT_S, WORKER, Live

pytestmark = pytest.mark.timeout(3600)

CHECKS: list[CheckFunction] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
MOST_OUTPUTS = 2
"""What a request may ask for here: 256 outputs are served too, but take their time."""
ENDS_WORKERS = "POST /admin/reload"
"""Nobody would start the only worker anew."""
MANY = ("POST /v1/completions", "POST /v1/chat/completions")


def operations(target: Live) -> list[Any]:
    urls = (target.cluster.url, target.cluster.ready["admin_url"])
    schemas = [schemathesis.openapi.from_url(f"{url}/openapi.json") for url in urls]
    found = [operation.ok() for schema in schemas for operation in schema.get_all_operations()]
    return [operation for operation in found if operation.label != ENDS_WORKERS]


def test_every_answer_is_as_the_documents_say(target: Live) -> None:
    for operation in operations(target):
        fuzz(target, operation)
    target.cluster.http.post(f"{target.cluster.ready['admin_url']}/admin/workers/{WORKER}/resume")
    target.check_unharmed()


def fuzz(target: Live, operation: Any) -> None:
    modes = [GenerationMode.POSITIVE]
    if operation.body or operation.path_parameters or operation.query or operation.headers:
        modes.append(GenerationMode.NEGATIVE)

    many = operation.label in MANY

    @fuzzing(0.01 if many else 0.001, least=8 if many else 2, shrink=False)
    @given(case=st.one_of(*(operation.as_strategy(mode) for mode in modes)))
    def check(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and type(body.get("n")) is int and body["n"] <= 128:
            body["n"] = min(body["n"], MOST_OUTPUTS)
        target.note("HTTP", repr((case.method, case.formatted_path, case.headers, case.query, body)).encode())
        response = case.call(timeout=WAIT_S)
        assert response.status_code != 500, response.text
        case.validate_response(response, checks=CHECKS)

    check()
