"""A profile of traffic: figures that can be checked by hand, and traffic made in its likeness."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from bascule.cli.main import main
from bascule.errors import ConfigError
from bascule.traffic.arrivals import Arrivals
from bascule.traffic.profile import profile_of
from bascule.traffic.synthetic import read_traffic
from bascule.traffic.traces import TraceRequest


def conversations(count: int, seed: int) -> Iterator[TraceRequest]:
    """Prompts of 600 to 3,000 tokens; half of them go on from an earlier one, all behind one system prompt."""
    draw = Random(seed)
    earlier: list[tuple[int, ...]] = []
    fresh = 1
    for at in islice(Arrivals(2.0, 1.5).times(draw), count):
        prompt = draw.randint(600, 3000)
        blocks = -(-prompt // 512)
        start = draw.choice(earlier[-40:]) if earlier and draw.random() < 0.5 else (0,)
        names = (*start[: prompt // 512], *range(fresh, fresh + blocks - min(len(start), prompt // 512)))
        fresh += blocks
        earlier.append(names[: prompt // 512])
        yield TraceRequest(at, prompt, draw.randint(10, 200), names)


def test_lengths_arrivals_and_requests_at_once_are_those_of_the_trace() -> None:
    trace = [TraceRequest(float(at), 100 * (at + 1), 10 + at) for at in range(11)]
    profile = profile_of(trace, (0.5, 0.1))
    assert (profile.prompt_tokens.mean, profile.prompt_tokens.p50, profile.prompt_tokens.max) == (600, 600, 1100)
    assert profile.output_tokens.p90 == 19
    assert (profile.arrivals.duration_s, profile.arrivals.rate, profile.arrivals.gap_cv) == (10.0, 1.0, 0.0)
    assert profile.arrivals.dispersion == {"1": 0.0}
    # 0.5 s and 0.1 s for each token but the first: 1.9 s on average, of a second each.
    assert profile.service_s == pytest.approx(1.9)
    assert profile.concurrency is not None
    assert profile.concurrency.mean == pytest.approx(11 * 1.9 / 12.4)
    assert (profile.concurrency.p50, profile.concurrency.max) == (2, 3)
    assert (profile.reuse, profile.sessions, profile.cached_share) == (None, None, None)


def test_poisson_arrivals_have_a_variation_and_a_dispersion_of_one() -> None:
    times = list(islice(Arrivals(5.0).times(Random(1)), 20_000))
    found = profile_of([TraceRequest(at - times[0], 1, 1) for at in times]).arrivals
    assert found.gap_cv == pytest.approx(1.0, rel=0.05)
    assert found.rate == pytest.approx(5.0, rel=0.05)
    for window in ("1", "10", "60"):
        assert found.dispersion[window] == pytest.approx(1.0, rel=0.25)


def test_reuse_counts_leading_blocks_of_earlier_prompts_by_the_time_since_their_last_use() -> None:
    trace = [
        TraceRequest(0.0, 1100, 1, (1, 2, 3)),
        TraceRequest(5.0, 1100, 1, (1, 2, 4)),
        # What stands behind an unknown block is not found.
        TraceRequest(50.0, 1024, 1, (9, 2)),
        TraceRequest(65.0, 600, 1, (1, 2)),
    ]
    reuse = profile_of(trace).reuse
    assert reuse is not None
    assert reuse.tokens == 1024 + 600
    assert reuse.share == pytest.approx(1624 / 3824)
    # The last prompt's second block was used 15 s ago in the third prompt, its first one a minute ago.
    shares = {limit: share * 3824 for limit, share in reuse.by_distance.items()}
    assert shares == pytest.approx({"1": 0, "10": 1024, "60": 1624, "600": 1624, "3600": 1624})
    assert reuse.distinct_tokens == 3824 - 1624


def test_conversations_are_told_by_the_trace_or_guessed_from_its_blocks() -> None:
    told = [TraceRequest(float(at), 10, 1, session=name) for at, name in enumerate(("a", "b", "a", "", "a"))]
    found = profile_of(told).sessions
    assert found is not None
    assert (found.told, found.count, found.turns.max) == (True, 3, 3)
    assert found.pause_s is not None
    assert found.pause_s.mean == 2.0
    system = 0
    guessed = profile_of(
        [
            TraceRequest(0.0, 600, 1, (system, 1)),
            TraceRequest(1.0, 1100, 1, (system, 2, 3)),
            TraceRequest(4.0, 1700, 1, (system, 2, 4, 5)),
            TraceRequest(5.0, 700, 1, (system, 6)),
            TraceRequest(9.0, 2100, 1, (system, 2, 4, 7, 8)),
        ]
    ).sessions
    assert guessed is not None
    assert (guessed.told, guessed.count, guessed.turns.max) == (False, 3, 3)
    assert guessed.pause_s is not None
    assert (guessed.pause_s.mean, guessed.pause_s.max) == (4.0, 5.0)


def test_times_and_cached_tokens_of_the_server_are_used_where_a_trace_has_them() -> None:
    trace = [TraceRequest(float(at), 100, 5, e2e_s=2.0, cached_tokens=at) for at in range(10)]
    profile = profile_of(trace)
    assert profile.service_s == 2.0
    assert profile.cached_share == pytest.approx(45 / 1000)


def test_traffic_made_from_a_profile_has_its_lengths_arrivals_and_reuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = list(conversations(3000, 1))
    rows = [
        {
            "timestamp": 1000 * one.at,
            "input_length": one.prompt_tokens,
            "output_length": one.output_tokens,
            "hash_ids": one.hash_ids,
        }
        for one in trace
    ]
    path, written = tmp_path / "trace.jsonl", tmp_path / "traffic.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["bascule", "traffic", str(path), "--json", str(written)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "prefix reuse" in capsys.readouterr().out
    was, made = profile_of(trace), profile_of(read_traffic(written, 3000))
    for one, other in ((was.prompt_tokens, made.prompt_tokens), (was.output_tokens, made.output_tokens)):
        assert (other.mean, other.p50, other.p90) == pytest.approx((one.mean, one.p50, one.p90), rel=0.1)
    assert made.arrivals.rate == pytest.approx(was.arrivals.rate, rel=0.1)
    assert made.arrivals.gap_cv == pytest.approx(1.5, rel=0.15)
    assert was.reuse is not None
    assert made.reuse is not None
    assert made.reuse.share == pytest.approx(was.reuse.share, rel=0.1)
    assert read_traffic(written, 50, seed=3) == read_traffic(written, 50, seed=3)
    assert read_traffic(written, 50, seed=3) != read_traffic(written, 50, seed=4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"generator": 5}', "cannot be used"),
        ('{"generator": {"rate": 1, "burstiness": 1, "block_tokens": 512, "rows": []}}', "no requests to draw from"),
        ('{"generator": {"rate": 0, "burstiness": 1, "block_tokens": 512, "rows": [[5, 5, 0, 0]]}}', "a rate of 0"),
        ('{"other": 1}', "line 1: "),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_traffic(path, 5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("/nowhere",), "cannot read the trace /nowhere"),
        (("http://127.0.0.1:9",), "cannot reach http://127.0.0.1:9"),
        (("/dev/null",), "is empty"),
        (("/nowhere", "--ttft", "1"), "--ttft and --tpot go together"),
        (("/nowhere", "--ttft", "-1", "--tpot", "1"), "--ttft: -1"),
    ],
)
def test_a_source_that_cannot_be_profiled_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["bascule", "traffic", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_an_empty_trace_has_no_profile() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        profile_of([])
