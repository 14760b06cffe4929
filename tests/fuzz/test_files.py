"""JSON files that people give or processes leave: whatever lies in them, the answer is a value or a sentence."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.cli import servers
from bascule.errors import BasculeError
from bascule.models.source import read_json
from bascule.types import CostModel
from bascule.worker import checks, profile
from fuzz.inputs import DEEP, Made, fuzzing

READERS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "a cost model": (checks.read_cost_model, CostModel),
    "a measured cost": (profile._read, CostModel),
    "a running server": (lambda path: servers.running(), servers.Server),
    "a model's settings": (read_json, dict[str, int]),
}


def contents(kind: Any) -> st.SearchStrategy[bytes]:
    made = Made([platform.node(), "a"], wild=True).of(kind).map(_json)
    bent = st.builds(
        lambda data, at, more: data[:at] + more + data[at:], made, st.integers(0, 200), st.binary(max_size=3)
    )
    deep = st.sampled_from([b'{"a":' * DEEP, b"[" * DEEP, b'{"\xff": 1}', b""])
    return st.one_of(made, bent, st.binary(max_size=100), deep)


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)


@pytest.mark.parametrize("what", READERS)
def test_any_file_is_read_or_refused_with_a_sentence(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, kind = READERS[what]
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(servers, "_folder", lambda: Path(folder))
        path = Path(folder, "file.json")

        @fuzzing(0.005)
        @given(contents(kind))
        def check(data: bytes) -> None:
            path.write_bytes(data)
            with suppress(BasculeError):
                read(path)

        check()


@pytest.mark.parametrize("pid", [0, -1, 2**31, -(2**63)])
def test_a_server_s_file_with_a_process_that_cannot_be_names_none(
    pid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_folder", lambda: tmp_path)
    fields = {"url": "", "admin_url": "", "model": "", "pid": pid, "started": 0.0, "machine": platform.node()}
    (tmp_path / "file.json").write_bytes(_json(fields))
    assert servers.running() == []
