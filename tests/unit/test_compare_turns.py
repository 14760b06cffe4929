"""Systems in turns with the very same requests, and what the report says of it; the servers here are made up."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_server import Body, FakeServer, Part
from openai_rig import answer, refusal, serving

from bascule.bench.compare.architectures import Side
from bascule.bench.compare.document import html, markdown
from bascule.bench.compare.figures import Compared
from bascule.bench.compare.report import About, blocks, report
from bascule.bench.compare.systems import Stage, System, SystemFailed
from bascule.bench.compare.turns import Cell, Comparison, Found, Hearer, NothingMeasured, Traffic
from bascule.bench.endpoint import Endpoint
from bascule.cli.bench_compare import Servers, compare
from bascule.errors import ConfigError
from bascule.traffic.traces import TraceRequest
from bascule.types import Slo

NAMES = ("replicated", "disaggregated")
SIDES = {"replicated": Side.WHOLE, "disaggregated": Side.SPLIT}
KEEPING = Slo(30.0, 10.0, 10.0)
VOCABULARY = range(3, 250)
ABOUT = About(
    workload="chat",
    model="theirs",
    hardware={"words": "2 <cores>"},
    commands=["bascule bench compare"],
    systems={"replicated": "here", "disaggregated": "there"},
    settings={},
    doubts=["all is made up"],
)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeServer]]:
    """The second one takes much longer for a token."""
    made = [FakeServer(), FakeServer()]
    monkeypatch.setattr("bascule.bench.load.RAMP_S", 0.1)
    for server, pause in zip(made, (0.01, 0.04), strict=True):
        server.answer = lambda body, pause=pause: slow(body, pause)
    with ExitStack() as stack:
        yield [stack.enter_context(serving(server)) for server in made]


def slow(body: Body, pause: float) -> list[Part]:
    return [pause if isinstance(part, float) else part for part in answer(body, a_chunk=32)]


def systems(servers: Sequence[FakeServer]) -> list[System]:
    return [
        System(name, 2, Endpoint(url=server.url, model="theirs")) for name, server in zip(NAMES, servers, strict=True)
    ]


def compared(servers: Sequence[FakeServer], slo: Slo = KEEPING, **settings: Any) -> Compared:
    async def run() -> Found:
        given = {"levels": [1, 2], "seeds": 3, "minutes": 1.0, "requests": 4, "stop": asyncio.Event()} | settings
        traffic = given.pop("traffic", Traffic("chat", vocabulary=VOCABULARY))
        stage = Stage(systems(servers), 0, True)
        return await asyncio.wait_for(Comparison(stage, traffic, slo=slo, hearer=Hearer(), **given).run(), 50)

    return Compared(asyncio.run(run()), slo, SIDES, dict.fromkeys(NAMES, 2))


def compared_until(
    servers: Sequence[FakeServer], expected: Callable[[Compared], bool], **settings: Any
) -> tuple[Compared, dict[str, Any]]:
    """A measurement and its report; up to three of them until it is as expected, for of few requests the machine may
    take more time than the slower server does."""
    for _ in range(3):
        for server in servers:
            server.bodies.clear()
        if expected(seen := compared(servers, **settings)):
            break
    return seen, report(seen, ABOUT)


def all_won(seen: Compared) -> bool:
    """Whether the faster one is ahead in all that is told of time."""
    told = [one for one in report(seen, ABOUT)["winners"] if one["metric"] in ("tpot_mean_s", "goodput_per_s")]
    return {(one["outcome"], one["best"]) for one in told} == {("wins", NAMES[0])}


def test_all_systems_get_the_very_same_requests_and_the_slower_one_is_found_behind(servers: list[FakeServer]) -> None:
    seen, made = compared_until(servers, all_won)
    assert seen.levels == [1, 2]
    assert all(len(seen.found.cells(level)) == 3 for level in seen.levels)
    ours, theirs = ([tuple(body["prompt"]) for body in server.bodies if body["max_tokens"] > 8] for server in servers)
    assert len(ours) == 4 + 2 + 3 * 2 * 4
    assert sorted(ours) == sorted(theirs)
    assert len(set(ours)) == len(ours), "a prompt twice would be in the cache"
    assert [(cell["architecture"], cell["concurrency"]) for cell in made["cells"]] == [
        (name, level) for level in (1, 2) for name in NAMES
    ]
    for cell in made["cells"]:
        assert cell["seeds"] == 3
        assert cell["requests"]["median"] == 4
        assert cell["errors"]["median"] == cell["rejected"]["median"] == 0
        for value in (cell["goodput_per_s"], cell["ttft_s"]["p99"], cell["itl_s"]["p99"], cell["tpot_s"]["mean"]):
            assert 0 < value["lo"] <= value["median"] <= value["hi"]
    winners = {(one["metric"], one["concurrency"]): one for one in made["winners"]}
    for level in (1, 2):
        assert (winners["tpot_mean_s", level]["outcome"], winners["tpot_mean_s", level]["best"]) == ("wins", NAMES[0])
        assert (winners["goodput_per_s", level]["outcome"], winners["goodput_per_s", level]["best"]) == (
            "wins",
            NAMES[0],
        )
    assert made["decision"]["split"] == "no"
    assert made["verdict"].startswith("Do not split here: over all levels disaggregated has 0.")
    assert made["crossover"] is None
    assert made["crossovers"][0]["value"] is None
    page, text = html("a title", list(blocks(seen, made))), markdown(list(blocks(seen, made)))
    assert page.count("<svg") == 7
    assert not re.search(r"<script|<link|src=|href=|@import|url\(", page)
    assert "2 &lt;cores&gt;" in page
    for words in (made["verdict"], "none in this range (1 to 2 clients", "all is made up", "**replicated"):
        assert words in text


def test_requests_that_fail_stand_in_the_table_and_are_no_pairs(servers: list[FakeServer]) -> None:
    def full(body: Body) -> list[Part]:
        busy = body["max_tokens"] > 8 and sum(body["prompt"]) % 2
        return refusal("429 Too Many Requests", "the <queue> is full") if busy else slow(body, 0.01)

    servers[1].answer = full
    seen = compared(servers, levels=[4], requests=8, seeds=2)
    cells = {cell["architecture"]: cell for cell in report(seen, ABOUT)["cells"]}
    assert cells["replicated"]["rejected"]["median"] == 0
    assert cells["disaggregated"]["rejected"]["median"] > 0
    assert cells["disaggregated"]["messages"][0]["message"] == "status 429: the <queue> is full"
    assert "the &lt;queue&gt; is full" in html("", list(blocks(seen, report(seen, ABOUT))))


def test_an_slo_that_nobody_keeps_is_told_with_the_best_that_was_reached(servers: list[FakeServer]) -> None:
    seen = compared(servers, Slo(0.0001, 0.0001, 0.0001), levels=[1, 2], seeds=2, requests=2)
    made = report(seen, ABOUT)
    assert made["verdict"] == "Nothing can be said of splitting: no request met the SLO."
    assert re.search(r"hardly reachable here: at best 0 % .* Best reached: TTFT [\d.e-]+ s \(p90", made["further"][-1])
    assert all(one["outcome"] == "none" for one in made["winners"] if one["metric"] == "goodput_per_s")
    assert "none in this range" in markdown(list(blocks(seen, made)))


def test_a_measurement_that_is_stopped_reports_what_it_has(servers: list[FakeServer]) -> None:
    stop = asyncio.Event()

    class Impatient(Hearer):
        def turn(self, words: str, requests: int) -> None:
            if words.startswith("seed 2"):
                stop.set()

    async def run() -> Found:
        stage = Stage(systems(servers), 0, True)
        traffic = Traffic("chat", vocabulary=VOCABULARY)
        comparison = Comparison(stage, traffic, [1, 2], None, 10.0, KEEPING, stop, Impatient(), 4)
        return await asyncio.wait_for(comparison.run(), 50)

    found = asyncio.run(run())
    assert found.stopped == "it was stopped"
    assert {cell.seed for _, cell in found.runs} == {1}
    assert len(found.runs) == 4
    seen = Compared(found, KEEPING, SIDES, dict.fromkeys(NAMES, 2))
    made = report(seen, ABOUT)
    assert {one["outcome"] for one in made["winners"]} == {"undecided"}, "one seed decides nothing"
    assert "ended early: it was stopped" in markdown(list(blocks(seen, made)))


def test_a_stop_in_the_first_seed_keeps_the_levels_before_it_and_says_nothing_of_higher_ones(
    servers: list[FakeServer],
) -> None:
    stop = asyncio.Event()

    class Impatient(Hearer):
        def turn(self, words: str, requests: int) -> None:
            if words.startswith("seed 1, 2 clients"):
                stop.set()

    async def run(slo: Slo) -> Found:
        stop.clear()
        traffic = Traffic("chat", vocabulary=VOCABULARY)
        comparison = Comparison(
            Stage(systems(servers), 0, True), traffic, [1, 2, 4], None, 10.0, slo, stop, Impatient(), 2
        )
        return await asyncio.wait_for(comparison.run(), 50)

    async def both() -> list[Found]:  # in one event loop, to which `stop` belongs
        return [await run(slo) for slo in (KEEPING, Slo(0.0001, 0.0001, 0.0001))]

    for found in asyncio.run(both()):
        assert found.stopped == "it was stopped" and found.levels == [1]
        assert not any("the sweep ends" in note for note in found.notes)


def test_one_seed_gives_a_ratio_and_no_certainty(servers: list[FakeServer]) -> None:
    seen, made = compared_until(
        servers, lambda seen: seen.mean_goodput(NAMES[1]) < seen.mean_goodput(NAMES[0]), seeds=1
    )
    split, whole = (seen.mean_goodput(name) for name in ("disaggregated", "replicated"))
    assert split < whole and made["decision"]["split"] == "undecided"
    assert made["decision"]["ratio"] == pytest.approx(split / whole, rel=0.2)
    assert "times (one seed, no interval)" in made["verdict"]
    assert {(one["lo"], one["hi"], one["share"]) for one in made["crossovers"]} == {(None, None, None)}
    assert "with the one seed there was, which decides nothing" in markdown(list(blocks(seen, made)))


def test_levels_of_one_seed_do_not_count_beside_others(servers: list[FakeServer]) -> None:
    told = ": over 1 client disaggregated has 0."

    def told_without_the_second(seen: Compared) -> bool:
        for name in NAMES:
            del seen.found.runs[name, Cell(2, 2)]
        return told in report(seen, ABOUT)["verdict"]

    seen, made = compared_until(servers, told_without_the_second, seeds=2)
    assert seen.counted == [1]
    assert told in made["verdict"]


def test_the_time_is_kept(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bascule.bench.compare.turns._END_S", 1.0)
    monkeypatch.setattr("bascule.bench.compare.plan._TURN_S", 0.0)  # nobody is woken up here
    begin = time.monotonic()
    found = compared(servers, seeds=None, minutes=0.15, requests=2, levels=[1]).found
    assert time.monotonic() - begin < 30
    assert found.runs
    with pytest.raises(NothingMeasured, match="the time was over; give more --minutes"):
        compared(servers, minutes=0.005)


def test_a_system_that_ends_in_between_ends_the_measurement_and_keeps_what_there_is(servers: list[FakeServer]) -> None:
    class Dying(System):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks > 8:
                raise SystemFailed(f"{self.name} ended with exit code 9")

    async def run(wanted: int) -> Found:
        made = systems(servers)
        made[1] = Dying(NAMES[1], 2, made[1].endpoint)
        made[1].checks = wanted
        stage = Stage(made, 0, True)
        traffic = Traffic("chat", vocabulary=VOCABULARY)
        comparison = Comparison(stage, traffic, [1], None, 1.0, KEEPING, asyncio.Event(), Hearer(), 2)
        return await asyncio.wait_for(comparison.run(), 50)

    found = asyncio.run(run(0))
    assert found.stopped == "disaggregated ended with exit code 9"
    assert isinstance(found.failure, SystemFailed)
    assert found.runs
    with pytest.raises(SystemFailed):
        asyncio.run(run(8))


def test_a_trace_keeps_its_lengths_and_shared_blocks_and_has_other_tokens_in_each_cell() -> None:
    trace = tuple(TraceRequest(float(n), 40, 4 + n, (0, n + 1), 16) for n in range(3))
    traffic = Traffic("a trace", trace, 1, VOCABULARY)
    one, other = traffic.talks(Cell(4, 1), 7), traffic.talks(Cell(4, 2), 7)
    assert sorted(talk.asks[0].output for talk in one[:3]) == [4, 5, 6]
    assert len(one) == 7
    assert len({talk.asks[0].prompt[:16] for talk in one[:3]}) == 1
    assert not {talk.asks[0].prompt[:16] for talk in one} & {talk.asks[0].prompt[:16] for talk in other}
    assert one == traffic.talks(Cell(4, 1), 7)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"workload": "poetry"}, "workload 'poetry' is not known; there are chat"),
        ({"levels": "1,x"}, "--levels '1,x' are not numbers of clients"),
        ({"levels": "0"}, "--levels '0' are not numbers of clients"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"requests": 0}, "--requests is 0"),
        ({"minutes": 0.01}, "--minutes 0.01 is too short"),
        ({"minutes": math.nan}, "--minutes nan is too short"),
        ({"architectures": "halved"}, "architecture 'halved' is not known"),
        ({"html": "/no/such/place.html"}, "cannot write the report to /no/such/place.html"),
        ({"workload": "chat", "trace": Path("x")}, "--trace stands in the place of --workload"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        compare(**flags)


def test_a_server_to_compare_with_that_does_not_answer_is_named(tmp_path: Path) -> None:
    other = Servers(engine="mock", cost_model=tmp_path / "cost.json", against=("x=http://127.0.0.1:9",))
    with pytest.raises(ConfigError, match=r"cannot reach http://127\.0\.0\.1:9"):
        compare(servers=other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"engine": "mock"}, "needs --cost-model"),
        ({"cost_model": Path("x")}, "goes with --engine mock only"),
        ({"against_cores": 2}, "goes with --against"),
    ],
)
def test_settings_of_servers_that_do_not_go_together_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Servers(**settings)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": 0}\n', "line 2"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused_with_the_line(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        compare(trace=path)
