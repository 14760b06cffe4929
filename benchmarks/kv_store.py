"""What the KV store saves: TTFT of a long prefix by where its KV is found, of several at once, and of conversations.

    python benchmarks/kv_store.py --rounds 5 --disk /var/tmp

One worker on one core with device memory for one prefix (for two of those at once, and for two conversations), once for
each tier, each with that tier alone, and once without a store; all are up at once and take turns with the same prompts
(one that waits is stopped). `remote` is a Redis server on loopback, started here if there is one. `peer` is two workers
on a core each that get requests in turn, so that one fetches from the other what that has computed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from layouts import System, running
from prometheus_client.parser import text_string_to_metric_families
from store import redis_server

VOCABULARY = range(100, 40_000)
TOKEN_BYTES = 23_040
"""Of the embedded model's KV in bfloat16."""


HTTP = httpx.Client(timeout=300, limits=httpx.Limits(keepalive_expiry=2))
"""One for all, as each takes 20 ms to make."""
_REST_S = 0.2
_SAVED_S = 0.8
"""Without a change, after which all is saved."""
_WAKER = 200
"""Tokens of the request that wakes a system up; no two have the same."""
_wakers = itertools.count()


@dataclass
class Answer:
    """What one request gave."""

    ttft_s: float
    total_s: float
    tokens: list[int]
    prompt: int
    cached: int
    loaded: dict[str, int]


def ask(system: System, prompt: list[int], output: int = 4) -> Answer:
    """One streamed completion of token ids."""
    body = {"model": system.model, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    tokens: list[int] = []
    first, details = 0.0, {}
    begun = time.perf_counter()
    with HTTP.stream("POST", f"{system.url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = httpx.Response(200, content=line[6:]).json()
            for choice in chunk["choices"]:
                first = first or time.perf_counter() - begun
                tokens += choice.get("token_ids") or []
            details = (chunk.get("usage") or {}).get("prompt_tokens_details") or details
    total = time.perf_counter() - begun
    return Answer(first, total, tokens, len(prompt), details.get("cached_tokens", 0), details.get("loaded_tokens", {}))


def settle(system: System) -> None:
    """Until nothing more is saved to the tier."""
    before, since = -1.0, time.monotonic()
    while time.monotonic() - since < _SAVED_S:
        families = text_string_to_metric_families(HTTP.get(f"{system.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        saved = sum(each.value for each in samples if each.labels.get("way") == "saved")
        if saved != before:
            before, since = saved, time.monotonic()
        time.sleep(0.1)


@contextmanager
def turn(system: System) -> Iterator[None]:
    """Only this system works: a small request wakes it up, and it saves what it has to save before the next one's turn.

    Without the former all requests would take longer by the same time: processor and caches have been idle meanwhile.
    """
    ask(system, [next(_wakers) % 30_000 + 200] * _WAKER)
    yield
    if system.label == "none":
        time.sleep(_REST_S)
    else:
        settle(system)


ONE = ["--policy", "single", "--devices", "cpu:0"]
TWO = ["--policy", "round-robin", "--mixed", "2", "--devices", "cpu:0,cpu:1"]


def systems(
    arguments: argparse.Namespace,
    memory: int,
    folder: Path,
    stack: ExitStack,
    *,
    peers: bool = False,
    device: int | None = None,
) -> dict[str, System]:
    """One for each tier, and one without a store; with `peers` one of two workers, too; with `device` one
    that has so much memory instead of a store."""
    flags = {"none": [], "host": ["--kv-host", "2GiB"], "disk": ["--kv-disk", f"{folder / 'kv'}:8GiB"]}
    if binary := shutil.which("redis-server") or shutil.which("valkey-server"):
        flags["remote"] = ["--kv-remote", stack.enter_context(redis_server(binary))]
    flags = {name: [*ONE, *store] for name, store in flags.items()} | ({"peer": TWO} if peers else {})
    flags |= {"device": ONE} if device is not None else {}
    flags = {name: own for name, own in flags.items() if name in ("none", *arguments.tiers.split(","))}
    found = {}
    for name, own in flags.items():
        ready = folder / f"ready-{name}"
        command = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", *own]
        command += ["--ready-file", str(ready), "--log-level", "warning"]
        command += ["--kv-memory", str(device if name == "device" else memory)]
        found[name] = stack.enter_context(running(name, arguments.model, command, ready, folder / f"{name}.log"))
    return found


def prompts(seed: int, count: int, length: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.choice(VOCABULARY) for _ in range(length)] for _ in range(count)]


def prefixes(arguments: argparse.Namespace, folder: Path) -> None:
    """A long prefix and a short question: cold, found on the device, found in each tier."""
    length, question = arguments.prefix, 50
    rows: dict[str, list[float]] = {}
    same: list[bool] = []
    with ExitStack() as stack:
        memory = TOKEN_BYTES * (length + question + 200)
        nodes = systems(arguments, memory, folder, stack, peers=True)
        for number in range(arguments.rounds):
            prefix, other = prompts(2 * number, 2, length)
            asked = prompts(1000 + number, 3, question)
            for name, node in nodes.items():
                with turn(node):
                    cold = ask(node, prefix + asked[0])
                    if name != "peer":
                        device = ask(node, prefix + asked[1])
                        ask(node, other + asked[0])
                        settle(node)
                    again = ask(node, prefix + asked[2])
                if name == "none":
                    reference = again
                    rows.setdefault("evicted, no store", []).append(again.ttft_s / cold.ttft_s)
                else:
                    assert again.loaded.get(name, 0) >= length / 2, (name, again)
                    same.append(again.tokens == reference.tokens)
                    rows.setdefault(name, []).append(again.ttft_s / cold.ttft_s)
                rows.setdefault("cold, s", []).append(cold.ttft_s)
                if name != "peer":
                    rows.setdefault("device", []).append(device.ttft_s / cold.ttft_s)
    print(
        f"\n**TTFT of {length} known tokens and {question} new ones**, over a cold one of the same system and round\n"
    )
    print("| found | median | least | most |\n|---|---|---|---|")
    for label, values in sorted(rows.items()):
        print(f"| {label} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    print(f"\n{sum(same)} of {len(same)} answers had the tokens of the one without a store.")


def concurrent(arguments: argparse.Namespace, folder: Path) -> None:
    """Clients that ask for a known prefix each, all at once, with device memory for two of them."""
    clients, length, question = 6, arguments.prefix // 2, 50
    slowest: dict[str, list[float]] = {}
    rows: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    same: list[bool] = []
    with ExitStack() as stack:
        nodes = systems(arguments, TOKEN_BYTES * 2 * (length + question + 200), folder, stack)
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        for number in range(arguments.rounds):
            known = prompts(5000 + number, clients, length)
            asked = prompts(6000 + number, 2 * clients, question)
            for name, node in nodes.items():
                with turn(node):
                    for prefix, new in zip(known, asked[:clients], strict=True):
                        ask(node, prefix + new)
                    if name != "none":
                        settle(node)
                    texts = [prefix + new for prefix, new in zip(known, asked[clients:], strict=True)]
                    answers = list(pool.map(partial(ask, node), texts))
                times = sorted(each.ttft_s for each in answers)
                if name == "none":
                    base, reference = times, [each.tokens for each in answers]
                same += [each.tokens == tokens for each, tokens in zip(answers, reference, strict=True)]
                rows.setdefault(name, []).append(statistics.median(times) / statistics.median(base))
                slowest.setdefault(name, []).append(times[-1] / base[-1])
                found.setdefault(name, []).append(sum(each.cached for each in answers) / (clients * length))
    print(f"\n**{clients} clients at once, each with {length} known tokens and {question} new ones**, memory for two")
    print("\nTTFT over that without a store in the same round, medians of the rounds:\n")
    print("| tier | median of a round | slowest of a round | known tokens not computed |\n|---|---|---|---|")
    for name in nodes:
        figures = [statistics.median(values[name]) for values in (rows, slowest, found)]
        print(f"| {name} | {figures[0]:.2f} | {figures[1]:.2f} | {figures[2]:.2f} |")
    print(f"\n{sum(same)} of {len(same)} answers had the tokens of the one without a store.")


def conversations(arguments: argparse.Namespace, folder: Path) -> None:
    """Sessions in turns, with device memory for two of them; then the workers are killed, and each has a turn more."""
    sessions, turns, answer = 8, 6, 50
    said = 300 - answer
    rows: dict[str, list[float]] = {}
    killed: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    with ExitStack() as stack:
        memory = TOKEN_BYTES * 2 * 300 * turns
        nodes = systems(arguments, memory, folder, stack, device=TOKEN_BYTES * (sessions + 1) * 300 * (turns + 1))
        texts = {name: [list[int]() for _ in range(sessions)] for name in nodes}
        news = prompts(5, sessions * (turns + 1), said)

        def round_of(number: int, note: Callable[[str, float, float], None]) -> None:
            for session in range(sessions):
                for name, node in nodes.items():
                    text = texts[name][session]
                    known = len(text)
                    text += news[number * sessions + session]
                    with turn(node):
                        found = ask(node, text, answer)
                    text += found.tokens
                    note(name, found.ttft_s, found.cached / known if known else 1.0)

        def note_turn(name: str, ttft_s: float, share: float) -> None:
            rows.setdefault(name, []).append(ttft_s)
            shares.setdefault(name, []).append(share)

        round_of(0, lambda *_: None)
        for number in range(1, turns):
            round_of(number, note_turn)
        for node in nodes.values():
            with turn(node):
                kill_workers(node)
        round_of(turns, lambda name, ttft_s, _: killed.setdefault(name, []).append(ttft_s))
        same = all(texts[name] == texts["none"] for name in nodes)
    print(f"\n**{sessions} sessions of {turns} turns of 300 tokens**, device memory for two (`device`: for all)")
    print("\nTTFT p50 of later turns:\n")
    print("| tier | s | over none | known tokens not computed | after kill -9 of the worker, s | over none |")
    print("|---|---|---|---|---|---|")
    base, after = statistics.median(rows["none"]), statistics.median(killed["none"])
    for name in nodes:
        mid, end = statistics.median(rows[name]), statistics.median(killed[name])
        share = statistics.mean(shares[name])
        print(f"| {name} | {mid:.3f} | {mid / base:.2f} | {share:.3f} | {end:.3f} | {end / after:.2f} |")
    print(f"\nAll systems gave the same tokens: {'yes' if same else 'no'}.")


def kill_workers(system: System) -> None:
    """SIGKILL, and wait until the one that is started in its place answers."""
    for process in system.tree()[1:]:
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(1.0)
    deadline = time.monotonic() + 120
    while HTTP.get(f"{system.url}/ready").status_code != 200:
        if time.monotonic() > deadline:
            sys.exit(f"{system.label}: no worker came back")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefix", type=int, default=4000, help="tokens")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--tiers", default="host,disk,remote,peer,device", help="besides `none`")
    parser.add_argument("--parts", default="prefixes,concurrent,conversations")
    arguments = parser.parse_args()
    parts = {"prefixes": prefixes, "concurrent": concurrent, "conversations": conversations}
    for part in arguments.parts.split(","):
        with tempfile.TemporaryDirectory(prefix="bascule-bench-", dir=arguments.disk) as folder:
            parts[part](arguments, Path(folder))


if __name__ == "__main__":
    main()
