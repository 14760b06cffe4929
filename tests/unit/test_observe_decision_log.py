"""The decision log has what a replay needs and nothing of what was said, and no disk can hurt serving."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from pathlib import Path

import pytest
from test_observe_decisions import LOCAL, attempt, record
from test_router_service import Bench, item

from bascule.errors import ConfigError
from bascule.observe import decision_log
from bascule.observe.decision_log import DecisionLog
from bascule.observe.decisions import Actual, DecisionRecords, Outcome
from bascule.router.journal import Journal
from bascule.types import BlockHash, FinishReason, Request, RequestId, Role, SamplingParams, Slo

SECRET = 31_337


def ended(name: str = "r", session: str = "") -> object:
    records, one = DecisionRecords(), record(name)
    one.session = session
    records.decided(one, attempt(LOCAL))
    records.ended(one, Outcome.COMPLETED, Actual(ttft_s=0.5, output_tokens=3))
    return one


def serve_one(path: Path, prompt: tuple[int, ...]) -> dict[str, object]:
    """The line of a request that a service has answered."""

    async def work() -> None:
        bench = Bench({"a": Role.MIXED}, policy="replicated")
        bench.service.journal = Journal("replicated", DecisionLog(path), wall=lambda: 1234.5)
        request = Request(
            id=RequestId("r~1"),
            public_id="r",
            prompt=prompt,
            sampling=SamplingParams(max_tokens=8),
            timeout=60.0,
            slo=Slo(1.0, 0.05, 0.1),
            session="me@example.org",
            priority=-2,
        )
        starting = asyncio.create_task(bench.service.start(request))
        await asyncio.sleep(0)
        bench.clock.advance(0.25)
        bench.tokens("a", item(0, SECRET, name="r~1", finish=FinishReason.LENGTH))
        await starting
        bench.service.journal.close()

    asyncio.run(work())
    (line,) = path.read_text().splitlines()
    fields: dict[str, object] = json.loads(line)
    return fields


def test_a_line_has_what_a_replay_needs(tmp_path: Path) -> None:
    fields = serve_one(tmp_path / "log", tuple(range(40)))
    expected = {
        "id": "r",
        "arrived": 1234.5,
        "prompt_tokens": 40,
        "max_tokens": 8,
        "priority": -2,
        "outcome": "completed",
        "slo": {"ttft_s": 1.0, "tpot_s": 0.05, "gap_s": 0.1},
        "chosen": "local;decode=a",
    }
    assert expected.items() <= fields.items()
    assert fields["actual"]["ttft_s"] == 0.25 and fields["actual"]["output_tokens"] == 1  # type: ignore[index]
    assert len(fields["blocks"]) == 2  # type: ignore[arg-type]
    assert fields["attempts"][0]["candidates"][0]["predicted"]["ttft_s"] >= 0  # type: ignore[index]


def test_a_line_has_neither_token_ids_nor_names_nor_hashes_that_could_be_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "log"
    serve_one(path, (SECRET,) * 40)
    text = path.read_text()
    assert not re.search(rf"(?<![0-9.]){SECRET}(?![0-9])", text) and "example.org" not in text
    digest = json.loads(text)["blocks"][0]
    log = DecisionLog(path)
    assert log._name(b"0" * 16) != DecisionLog(tmp_path / "other")._name(b"0" * 16) and len(digest) == 16


def test_equal_beginnings_and_sessions_have_equal_names(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path)
    first, second = BlockHash(b"1" * 16), BlockHash(b"2" * 16)
    log.write(ended(session="s"), [first])  # type: ignore[arg-type]
    log.write(ended(session="s"), [first, second])  # type: ignore[arg-type]
    log.write(ended(session="t"), [second])  # type: ignore[arg-type]
    log.close()
    a, b, c = (json.loads(line) for line in path.read_text().splitlines())
    assert a["blocks"][0] == b["blocks"][0] != b["blocks"][1] == c["blocks"][0]
    assert a["session"] == b["session"] != c["session"]


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        log = DecisionLog(path)
        for _ in range(700):
            log.write(ended(), [])  # type: ignore[arg-type]
        log.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["r"] * 1400


@pytest.mark.parametrize("where", ["missing/log", "", "file/log"])
def test_a_file_that_cannot_be_written_is_refused_with_the_key_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="decision-log: cannot write to"):
        DecisionLog(tmp_path / where)


def test_a_full_disk_is_told_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    log = DecisionLog(Path("/dev/full"))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            log.write(ended(), [])  # type: ignore[arg-type]
        log.close()
    assert log.lost == 3
    assert [entry.message.count("No space left") for entry in caplog.records] == [1]


def test_what_cannot_be_written_down_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    log.write(object(), [])  # type: ignore[arg-type]
    deadline = time.monotonic() + 20
    while log.lost == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    log.write(ended(), [])  # type: ignore[arg-type]
    log.close()
    assert log.lost == 1
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a line, and has room again."""
    path = tmp_path / "log"
    log = DecisionLog(path)
    real, calls = decision_log.os.write, iter([100, None])

    def write(file: int, data: memoryview) -> int:
        size = next(calls, -1)
        if size is None:
            raise OSError(28, "No space left on device")
        return real(file, data if size < 0 else data[:size])

    monkeypatch.setattr(decision_log.os, "write", write)
    with pytest.raises(OSError, match="No space"):
        log._append(b"x" * 150 + b"\n")
    log._append(b"whole\n")
    assert path.read_bytes().split(b"\n") == [b"x" * 100, b"whole", b""]
    log.close()


def test_a_disk_that_hangs_costs_lines_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "WAITING", 2)
    monkeypatch.setattr(DecisionLog, "_write_all", lambda self: None)
    log = DecisionLog(tmp_path / "log")
    for _ in range(5):
        log.write(ended(), [])  # type: ignore[arg-type]
    assert log.lost == 3
