"""How commands find the admin API of a running server, and what they say when it does not answer."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from bascule.cli import servers
from bascule.cli.keys import ADMIN_KEY
from bascule.errors import UNREADABLE, BasculeError, ConfigError

_TIMEOUT_S = 10.0

Admin = Annotated[str | None, Parameter(env_var="BASCULE_ADMIN")]
"""A command's `--admin`."""


class NotAnswered(BasculeError):
    """The server does not answer, or not with what was asked for; `code` is its own word for why."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


def admin_url(given: str | None) -> str:
    """The address given, or that of the only server of this user here; raises ConfigError or NotAnswered."""
    if given is not None:
        if not given.startswith(("http://", "https://")):
            raise ConfigError(f"--admin {given!r} is no address; write for example http://127.0.0.1:8001")
        return given.rstrip("/")
    found = servers.running()
    if not found:
        raise NotAnswered(
            "no server of yours runs on this machine; give the address of one with --admin (serve prints it as admin "
            "API) or BASCULE_ADMIN"
        )
    if len(found) > 1:
        listed = "".join(f"\n  --admin {server.admin_url}  ({server.model} at {server.url})" for server in found)
        raise ConfigError(f"{len(found)} servers run on this machine; say which one:{listed}")
    return found[0].admin_url


def ask(
    url: str,
    is_right: Callable[[dict[str, Any]], bool],
    fields: dict[str, object] | None = None,
    *,
    given_as: str = "--admin",
) -> dict[str, Any]:
    """What the admin API says to a GET, or with `fields` to a POST of them; raises NotAnswered.

    `is_right` tells an answer of ours from one of something else, and may raise LookupError or TypeError for that.
    `given_as` is what a person is to look at if the address is wrong.
    Proxies are left out, as the address is near.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, None if fields is None else msgspec.json.encode(fields))
        if (key := _key_for(url)) is not None:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            found: dict[str, Any] = msgspec.json.decode(answer.read(), type=dict)
            if not is_right(found):
                raise LookupError
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            wrong = f"does not know the key in {ADMIN_KEY}" if os.environ.get(ADMIN_KEY) else "asks for its key"
            raise NotAnswered(f"the admin API {wrong}; give its own as {ADMIN_KEY} in the environment") from error
        message, code = _reason(error)
        raise NotAnswered(message, code=code) from error
    except (LookupError, TypeError, *UNREADABLE) as error:
        raise NotAnswered(f"what answers at {url} is no admin API of Bascule; check {given_as}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NotAnswered(f"cannot reach {url}: {reason}; is the server running, and is {given_as} right?") from error
    return found


def _key_for(url: str) -> str | None:
    """The key in the environment, or the one that the server of this user at that address has left for us."""
    given = os.environ.get(ADMIN_KEY)
    return given or next((each.admin_key for each in servers.running() if url.startswith(f"{each.admin_url}/")), None)


def _reason(error: urllib.error.HTTPError) -> tuple[str, str | None]:
    """The admin API's own words and code, or the bare status of something else."""
    try:
        told = msgspec.json.decode(error.read())["error"]
        return str(told["message"]), told.get("code")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, *UNREADABLE):
        return f"{error.url} answered {error.code} {error.reason}; check --admin", None
