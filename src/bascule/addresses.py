"""Where a router's workers join it, as `--bind` and `--join` give it."""

from __future__ import annotations

import ipaddress
import re

from bascule.errors import ConfigError

_TCP = re.compile(r"tcp://(?P<host>\[[^\s\[\]]+\]|[^\s:;/\[\]]+):(?P<port>\*|[0-9]{1,5})")
_IPC = re.compile(r"ipc://\S+")
_MOST = 65535


def check_address(flag: str, given: str, *, listens: bool = False) -> None:
    """Raises ConfigError, which names `flag` and an example, for what is neither `tcp://HOST:PORT` nor `ipc://PATH`.

    A TCP port is 1 to 65535. For an address that `listens`, `*` is any host too, and `*` or 0 any free port. An IPv6
    address is refused, too.
    """
    if not (_IPC.fullmatch(given) or _is_tcp(given, listens)):
        raise ConfigError(
            f"{flag} {given!r} is no address; write for example tcp://127.0.0.1:8100 (ports are 1 to {_MOST})"
        )
    if parts := _TCP.fullmatch(given):
        check_ipv4(f"{flag} {given}", parts["host"])


def check_ipv4(what: str, host: str) -> None:
    """Raises ConfigError, which names `what`, where `host` is an IPv6 address, in brackets or not."""
    try:
        version = ipaddress.ip_address(host.strip("[]")).version
    except ValueError:
        return
    if version == 6:
        raise ConfigError(
            f"{what}: router and workers talk over IPv4 only; give an IPv4 address or a name that has one"
        )


def _is_tcp(given: str, listens: bool) -> bool:
    parts = _TCP.fullmatch(given)
    if parts is None:
        return False
    host, port = parts["host"], parts["port"]
    if not listens and "*" in (host, port):
        return False
    return port == "*" or (0 if listens else 1) <= int(port) <= _MOST
