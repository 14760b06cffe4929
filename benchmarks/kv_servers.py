"""What is still found in the KV store when one of several Redis servers is lost, and when it is back.

    python benchmarks/kv_servers.py --prompts 8 --tokens 2000

One worker on one core with device memory for one prompt, and three Redis servers on loopback below it. The same prompts
are sent round after round, each with other last tokens: before, with one server killed, and with it back but empty.
Prints a Markdown table: of the tokens that all prompts have had before, those that were not computed; and the rounds'
TTFT over that of the first, which finds nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from faults import Remote
from kv_store import ONE, TOKEN_BYTES, ask, prompts, settle
from layouts import System, running

QUESTION = 50
"""Tokens behind each prompt that no other has."""
_PROBED_S = 40.0
"""Within which a worker finds a server that is back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000, help="of each prompt that are sent again")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"))
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bascule-bench-", dir=arguments.disk)))
        servers = [Remote() for _ in range(arguments.servers)]
        for server in servers:
            stack.callback(server.kill)
        node = started(arguments, servers, folder, stack)
        known = prompts(1, arguments.prompts, arguments.tokens)
        print(
            f"{arguments.prompts} prompts of {arguments.tokens} known tokens and {QUESTION} new ones, "
            f"{arguments.servers} servers\n"
        )
        print("| round | known tokens not computed | TTFT over the first round's |\n|---|---|---|")
        cold = 0.0
        for number, (name, before) in enumerate(
            [
                ("nothing is known", None),
                ("all servers", None),
                ("one killed: first", servers[0].kill),
                ("second", None),
                ("third", None),
                ("it is back, empty: first", servers[0].start),
                ("second", None),
                ("third", None),
            ]
        ):
            if before is not None:
                before()
                wait(node, before == servers[0].start)
            news = prompts(100 + number, arguments.prompts, QUESTION)
            answers = []
            for prompt, new in zip(known, news, strict=True):
                answers.append(ask(node, prompt + new))
                settle(node)
            ttft_s = statistics.median(each.ttft_s for each in answers)
            cold = cold or ttft_s
            share = sum(min(each.cached, arguments.tokens) for each in answers) / (arguments.prompts * arguments.tokens)
            print(f"| {name} | {share:.3f} | {ttft_s / cold:.2f} |", flush=True)


def started(arguments: argparse.Namespace, servers: list[Remote], folder: Path, stack: ExitStack) -> System:
    ready = folder / "ready"
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    command = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", *ONE]
    command += ["--kv-remote", f"redis://{hosts}", "--ready-file", str(ready), "--log-level", "warning"]
    command += ["--kv-memory", str(TOKEN_BYTES * (arguments.tokens + 4 * QUESTION))]
    return stack.enter_context(running("servers", arguments.model, command, ready, folder / "log"))


def wait(node: System, back: bool) -> None:
    """Until the worker has noticed: by its next calls that a server is gone, by a probe that it is back."""
    deadline = time.monotonic() + (_PROBED_S if back else 3.0)
    while time.monotonic() < deadline:
        ask(node, prompts(int(time.monotonic() * 1000), 1, 100)[0])
        time.sleep(0.5)


if __name__ == "__main__":
    main()
