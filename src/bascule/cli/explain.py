"""`bascule explain`: why a request went where it did, and whether that came true."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bascule.cli import servers
from bascule.cli.keys import ADMIN_KEY
from bascule.cli.report import write_json
from bascule.errors import BasculeError, ConfigError

_TIMEOUT_S = 10.0
_TERMS = ("ttft", "tpot", "gap", "queue", "load", "prefill", "transfer", "harm")
_MEASURED = ("ttft", "tpot", "gap")


class NotExplained(BasculeError):
    """The server does not answer, or does not know the request."""


def explain(
    request_id: str,
    /,
    *,
    admin: Annotated[str | None, Parameter(env_var="BASCULE_ADMIN")] = None,
    admin_key: Annotated[str | None, Parameter(env_var=ADMIN_KEY)] = None,
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
) -> None:
    """Say why a request went where it did: every candidate, the choice, and the prediction against what happened.

    Example: bascule explain 6f0c3ab1e5d94f7a8b2c1d3e4f506172

    Parameters
    ----------
    request_id
        The `X-Request-Id` of the response.
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    admin_key
        Key of the admin API, where it asks for one (default: what a server of yours on this machine has left).
    json
        File to write the decision record to, `-` for standard output.
    """
    url, left = _admin_url(admin)
    found = _get(f"{url}/admin/decisions/{quote(request_id, safe='')}", admin_key or left)
    if json != "-":
        console = Console()
        for output in found["outputs"]:
            _show(console, output)
    write_json(found, json)


def _admin_url(given: str | None) -> tuple[str, str | None]:
    """Where to ask, and the key that a server there has left for us."""
    if given is not None:
        if not given.startswith(("http://", "https://")):
            raise ConfigError(f"--admin {given!r} is no address; write for example http://127.0.0.1:8001")
        url = given.rstrip("/")
        return url, next((server.admin_key for server in servers.running() if server.admin_url == url), None)
    found = servers.running()
    if not found:
        raise NotExplained(
            "no server of yours runs on this machine; give the address of one with --admin (serve prints it as admin "
            "API) or BASCULE_ADMIN"
        )
    if len(found) > 1:
        listed = "".join(f"\n  --admin {server.admin_url}  ({server.model} at {server.url})" for server in found)
        raise ConfigError(f"{len(found)} servers run on this machine; say which one:{listed}")
    return found[0].admin_url, found[0].admin_key


def _get(url: str, key: str | None) -> dict[str, Any]:
    """What the admin API says; raises NotExplained. Proxies are left out, as the address is near."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        asked = urllib.request.Request(url)
        if key is not None:
            asked.add_unredirected_header("Authorization", f"Bearer {key}")
        with opener.open(asked, timeout=_TIMEOUT_S) as answer:
            found: dict[str, Any] = msgspec.json.decode(answer.read(), type=dict)
            found["outputs"][0]["candidates"]
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            raise NotExplained(f"the admin API asks for its key; give it as {ADMIN_KEY} in the environment") from error
        raise NotExplained(_message(error)) from error
    except (msgspec.DecodeError, LookupError, TypeError, UnicodeDecodeError) as error:
        raise NotExplained(f"what answers at {url} is no admin API of Bascule; check --admin") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NotExplained(f"cannot reach {url}: {reason}; is the server running, and is --admin right?") from error
    return found


def _message(error: urllib.error.HTTPError) -> str:
    """The admin API's own words, or the bare status of something else."""
    try:
        return str(msgspec.json.decode(error.read())["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return f"{error.url} answered {error.code} {error.reason}; check --admin"


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
    loaded = ", ".join(f"{count} from {tier}" for tier, count in actual["loaded_tokens"].items())
    return (
        f"{actual['output_tokens']} tokens in {_ms(actual['e2e_s'])} ms, finish {actual['finish'] or 'none'}, "
        f"{actual['cached_tokens']} prompt tokens cached"
        + (f", of which loaded {loaded}, waited for {_ms(actual['load_s'])} ms" if loaded else "")
    )


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"
