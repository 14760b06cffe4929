"""`bascule admin`: workers of a running server listed, drained, resumed, used in another role, and all reloaded."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bascule.cli.admin_api import Admin, NotAnswered, admin_url, ask
from bascule.cli.report import JsonTarget, write_json
from bascule.cli.screen import print_whole
from bascule.errors import ConfigError
from bascule.types import Role

_POLL_S = 0.2

app = App(
    name="admin", help="List the workers of a running server; drain, resume or reload them, or use one in another role."
)


@app.command
def workers(*, admin: Admin = None, json: JsonTarget = None) -> None:
    """List the workers: role, state, what they do, what their KV memory holds.

    Example: bascule admin workers

    Parameters
    ----------
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    json
        File to write the admin state to, `-` for standard output.
    """
    state = _state(admin_url(admin))
    if json != "-":
        print_whole(_table(state["workers"]))
    write_json(state, json)


@app.command
def drain(
    worker: str,
    /,
    *,
    wait: Annotated[bool, Parameter(negative=())] = False,
    timeout: float | None = None,
    admin: Admin = None,
) -> None:
    """Place nothing more on a worker; what it has ends there. It stays so, also started anew, until it is resumed.

    Example: bascule admin drain decode-0 --wait --timeout 60

    Parameters
    ----------
    worker
        Its id, as `bascule admin workers` lists it.
    wait
        Return once nothing needs it any more.
    timeout
        Seconds after which what is left goes on elsewhere, behind the tokens already sent (default: it may stay).
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    """
    if timeout is not None and not timeout >= 0:
        raise ConfigError(f"--timeout {timeout:g} must be a number of seconds, 0 or more")
    url = admin_url(admin)
    found = _post(url, worker, "drain", {} if timeout is None else {"timeout": timeout})
    console = Console()
    _tell(console, found)
    if wait:
        _await_drained(console, url, found)


@app.command
def resume(worker: str, /, *, admin: Admin = None) -> None:
    """Place requests on a drained worker again.

    Example: bascule admin resume decode-0

    Parameters
    ----------
    worker
        Its id, as `bascule admin workers` lists it.
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    """
    _tell(Console(), _post(admin_url(admin), worker, "resume", {}))


@app.command
def role(worker: str, role: Role, /, *, admin: Admin = None) -> None:
    """Use a worker in another role from the next placement on; what runs there goes on as it is.

    Example: bascule admin role decode-0 mixed

    Parameters
    ----------
    worker
        Its id, as `bascule admin workers` lists it.
    role
        prefill, decode or mixed.
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    """
    _tell(Console(), _post(admin_url(admin), worker, "role", {"role": role.value}))


@app.command
def reload(
    *,
    wait: Annotated[bool, Parameter(negative="--no-wait")] = True,
    timeout: float | None = None,
    admin: Admin = None,
) -> None:
    """Start all workers anew, one after another, without a failed request: for other weights, say.

    Each drains, ends, and is started by what watches over it (`serve`, or your supervisor). With other weights they
    wait until the last one of before drains, and take over then.

    Example: bascule admin reload

    Parameters
    ----------
    wait
        Return once all have come back, and fail where one does not.
    timeout
        Seconds that each has to come back once it has ended (default: 600).
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    """
    if timeout is not None and not timeout >= 0:
        raise ConfigError(f"--timeout {timeout:g} must be a number of seconds, 0 or more")
    url, console = f"{admin_url(admin)}/admin/reload", Console()
    found = ask(url, _is_reload, {} if timeout is None else {"timeout": timeout})
    said = ""
    while True:
        if (now := _progress(found)) != said:
            _say(console, said := now)
        if not wait or found["state"] != "running":
            break
        time.sleep(_POLL_S)
        found = ask(url, _is_reload)
    if found["state"] == "failed":
        raise NotAnswered(found["failure"])


def _is_reload(found: dict[str, Any]) -> bool:
    keys = ("state", "workers", "done", "current", "ended", "failure")
    return all(isinstance(found[key], int | str) for key in keys)


def _progress(found: dict[str, Any]) -> str:
    if found["state"] != "running":
        return f"{found['done']} of {found['workers']} workers are reloaded"
    if not found["current"]:
        return "no worker is there; the first one that comes is taken, whatever its weights"
    start = ", which has ended; start it again where nothing does that for you" if found["ended"] else ""
    waiting = f"; with other weights, and waiting: {', '.join(found['waiting'])}" if found["waiting"] else ""
    return f"{found['done']} of {found['workers']} workers are reloaded; now {found['current']}{start}{waiting}"


def _await_drained(console: Console, url: str, latest: dict[str, Any]) -> None:
    """Return once the worker is drained, or gone; raises NotAnswered where somebody has resumed it meanwhile."""
    while latest["state"] != "drained":
        time.sleep(_POLL_S)
        found = next((each for each in _state(url)["workers"] if each["id"] == latest["id"]), None)
        if found is None:
            _say(console, f"{latest['id']} is gone, and nothing is left on it")
            return
        if found["state"] not in ("draining", "drained"):
            raise NotAnswered(f"{found['id']} is {found['state']}: it was resumed before it was drained")
        if (found["state"], found["requests"]) != (latest["state"], latest["requests"]):
            _tell(console, found)
        latest = found


def _post(url: str, worker: str, what: str, fields: dict[str, object]) -> dict[str, Any]:
    return ask(f"{url}/admin/workers/{quote(worker, safe='')}/{what}", _is_worker, fields)


def _state(url: str) -> dict[str, Any]:
    return ask(f"{url}/admin/state", lambda found: all(map(_is_worker, found["workers"])))


def _is_worker(found: dict[str, Any]) -> bool:
    return all(isinstance(found[key], str) for key in ("id", "role", "state"))


def _tell(console: Console, worker: dict[str, Any]) -> None:
    left = f", {worker['requests']} requests left" if worker["state"] == "draining" else ""
    _say(console, f"{worker['id']} ({worker['role']}) is {worker['state']}{left}")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("worker", "role", "state", "device"):
        table.add_column(name, no_wrap=True)
    for name in ("requests", "running", "waiting", "blocks", "leased", "cached"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in found:
        table.add_row(
            *(escape(str(worker[key])) for key in ("id", "role", "state", "device")),
            *(str(worker[key]) for key in ("requests", "running", "waiting")),
            *(str(worker[f"kv_blocks_{key}"]) for key in ("total", "leased", "cached")),
        )
    return table
