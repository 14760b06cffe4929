"""`bascule explain`: why a request went where it did, and whether that came true."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bascule.cli.admin_api import Admin, admin_url, ask
from bascule.cli.report import JsonTarget, write_json

_TERMS = ("ttft", "tpot", "gap", "queue", "load", "prefill", "transfer", "harm")
_MEASURED = ("ttft", "tpot", "gap")


def explain(
    request_id: str,
    /,
    *,
    admin: Admin = None,
    json: JsonTarget = None,
) -> None:
    """Say why a request went where it did: every candidate, the choice, and the prediction against what happened.

    Example: bascule explain 6f0c3ab1e5d94f7a8b2c1d3e4f506172

    Parameters
    ----------
    request_id
        The `X-Request-Id` of the response.
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    json
        File to write the decision record to, `-` for standard output.
    """
    found = ask(f"{admin_url(admin)}/admin/decisions/{quote(request_id, safe='')}", _is_decision)
    if json != "-":
        console = Console()
        for output in found["outputs"]:
            _show(console, output)
    write_json(found, json)


def _is_decision(found: dict[str, Any]) -> bool:
    return isinstance(found["outputs"][0]["candidates"], list)


def _show(console: Console, output: dict[str, Any]) -> None:
    """One output: where it went and why, what was compared, and what came of it."""
    number = f", output {output['output']}" if output["output"] else ""
    _say(
        console,
        f"{output['id']}{number}",
        f"{output['outcome']}, policy {output['policy']}, {output['prompt_tokens']} prompt tokens, "
        f"at most {output['max_tokens']} to come",
    )
    for earlier in output["attempts"][:-1]:
        _say(console, "failed", str(earlier["chosen"]))
    _say(console, "chosen", output["chosen"] or "no placement")
    chosen = next((each for each in output["candidates"] if each["placement"] == output["chosen"]), None)
    if handoff := _handoff(chosen, output["actual"]["handoff"]):
        _say(console, "handoff", handoff)
    if chosen is not None and chosen["fetch_from"]:
        _say(console, "fetch", f"{chosen['loaded_tokens']} tokens from {chosen['fetch_from']}")
    if output["reason"]:
        _say(console, "why", output["reason"])
    if output["actual"]["error"] not in ("", output["reason"]):
        _say(console, "error", output["actual"]["error"])
    if output["candidates"]:
        console.print(_candidates(output))
        for candidate in output["candidates"]:
            if candidate["why_not"]:
                _say(console, "against", f"{_ends(candidate)}: {candidate['why_not']}")
    if output["predicted"] is not None and output["actual"]["ttft_s"] is not None:
        console.print(_comparison(output["attempts"], output["actual"]))
        _say(console, "output", _summary(output["actual"]))
    console.print()


def _handoff(chosen: dict[str, Any] | None, moved: dict[str, Any] | None) -> str:
    """How KV was handed over, and what that moved by way of the store; empty where it was not."""
    way = chosen["handed_by"] if chosen is not None else None
    told = f"by way of the {way} tier of the store" if way else "by way of the store" if moved else ""
    if moved is None:
        split = chosen is not None and chosen["prefill"] != chosen["decode"]
        return told or ("pushed" if split else "")
    return (
        f"{told}: prefill saved {_megabytes(moved['saved_bytes'])}, decode loaded {_loaded(moved)}"
        f", waited for {_ms(moved['load_s'])} ms and computed {moved['computed_tokens']} prompt tokens again"
    )


def _loaded(figures: dict[str, Any]) -> str:
    """Tokens by where they came from, and all bytes that were moved for them."""
    tokens = ", ".join(f"{count} from {tier}" for tier, count in figures["loaded_tokens"].items())
    return f"{tokens or 'nothing'} ({_megabytes(figures['loaded_bytes'])})"


def _megabytes(sizes: dict[str, int]) -> str:
    return f"{sum(sizes.values()) / 1e6:.1f} MB"


def _say(console: Console, word: str, text: str) -> None:
    console.print(f"[bold]{escape(word)}[/bold]  {escape(text)}", highlight=False, soft_wrap=True)


def _candidates(output: dict[str, Any]) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    table = Table(title="\ncandidates, the best first (ms)", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for name in (*_TERMS, "price"):
        table.add_column(name.upper() if name in ("ttft", "tpot") else name, justify="right", no_wrap=True)
    for candidate in output["candidates"]:
        chosen = candidate["placement"] == output["chosen"]
        mark = "*" if chosen else " " if candidate["feasible"] else "x"
        table.add_row(
            f"{mark} {_ends(candidate)}",
            *(_ms(candidate["predicted"][f"{term}_s"]) for term in _TERMS),
            _ms(candidate["cost_s"]),
            style="bold" if chosen else None,
        )
    return table


def _ends(candidate: dict[str, Any]) -> str:
    prefill, decode = candidate["prefill"], candidate["decode"]
    return str(decode) if prefill == decode else f"{prefill} > {decode}"


def _comparison(attempts: list[dict[str, Any]], actual: dict[str, Any]) -> Table:
    """The first decision's prediction, which is the one that was made for the whole request."""
    first = attempts[0]
    predicted = next(each["predicted"] for each in first["candidates"] if each["placement"] == first["chosen"])
    table = Table(title="\npredicted against actual (ms)", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("", "predicted", "actual", "off by"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for term in _MEASURED:
        guess, was = predicted[f"{term}_s"], actual[f"{term}_s"]
        off = f"{100 * (guess - was) / was:+.0f} %" if was and guess is not None else ""
        table.add_row(term.upper() if term != "gap" else "longest gap", _ms(guess), _ms(was), off)
    return table


def _summary(actual: dict[str, Any]) -> str:
    loaded = _loaded(actual) if actual["loaded_tokens"] else ""
    return (
        f"{actual['output_tokens']} tokens in {_ms(actual['e2e_s'])} ms, finish {actual['finish'] or 'none'}, "
        f"{actual['cached_tokens']} prompt tokens cached"
        + (f", of which loaded {loaded}, waited for {_ms(actual['load_s'])} ms" if loaded else "")
        + (f", computing spared {_ms(actual['spared_s'])} ms" if loaded else "")
        + (f"; waited {_ms(actual['load_s'])} ms for KV that did not come" if actual["load_s"] and not loaded else "")
    )


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"
