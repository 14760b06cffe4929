"""The servers of the remote tier, as asked for on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qsl, urlsplit

from bascule.errors import ConfigError

KEY = "--kv-remote"
_SCHEMES = ("redis", "rediss", "unix")
_PORT = 6379
_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_OPTIONS = {"redis": {"db"}, "rediss": {"db"} | _TLS_OPTIONS, "unix": {"db"}}
_BARE = re.compile(r"(?:[^\s/@:?#\[\]]+|\[[0-9a-fA-F:.]+\])(?::\d+)?")
_EXAMPLE = "redis://host1:6379/0,redis://host2"


@dataclass(frozen=True)
class Target:
    """A server: `url` may hold a password and is never printed; `label` is what it is called, and its place's name."""

    url: str = field(repr=False)
    label: str
    local: bool = False
    """It is reached by a name that each machine has for itself: a socket's path, or a loopback address."""

    @property
    def clear_host(self) -> str | None:
        """The host that is talked to over TCP without TLS, if so."""
        parts = urlsplit(self.url)
        return parts.hostname if parts.scheme == "redis" else None


def parse_remote(text: str, key: str = KEY) -> tuple[Target, ...]:
    """Servers from `redis://:password@host1:6379/0,host2`: URLs joined by commas, of redis://, rediss:// or unix://.

    A bare `host` or `host:port` is a server like the one before it: same scheme, password, database and options. Raises
    ConfigError that names `key`, the flag, and the server by its number.
    """
    targets: list[Target] = []
    previous: SplitResult | None = None
    for number, item in enumerate((each.strip() for each in text.split(",")), 1):
        where = f"{key}: server {number}"
        if "://" not in item:
            if previous is None or previous.scheme == "unix" or not _BARE.fullmatch(item):
                raise _error(where, f"is not a URL; write for example {_EXAMPLE}")
            credentials, at, _ = previous.netloc.rpartition("@")
            item = previous._replace(netloc=credentials + at + item).geturl()
        previous = _split(item, where)
        targets.append(Target(item, _label(previous), _is_local(previous)))
    labels = [target.label for target in targets]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{key}: {label} is named twice; name each server once")
    return tuple(targets)


def _split(url: str, where: str) -> SplitResult:
    """The parts of a URL; raises ConfigError without repeating it, for the password's sake."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _error(where, "has a malformed host or port") from None
    if parts.scheme not in _SCHEMES:
        raise _error(where, "must begin with redis://, rediss:// or unix://")
    if parts.scheme == "unix":
        if parts.hostname or not parts.path.strip("/"):
            raise _error(where, "must be the path of a socket, such as unix:///run/redis.sock")
    elif not parts.hostname or port == 0:
        raise _error(where, f"has no host, or port 0; write for example {_EXAMPLE}")
    elif not re.fullmatch(r"/?|/\d+", parts.path):
        raise _error(where, "has a path that is not the number of a database, such as /0")
    if parts.fragment:
        raise _error(where, "has a fragment (#...); write a # in a password as %23")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if options.keys() - _OPTIONS[parts.scheme]:
        known = ", ".join(sorted(_OPTIONS[parts.scheme]))
        raise _error(where, f"has an unknown option (after the ?); known ones are {known}")
    if not options.get("db", "0").isdecimal():
        raise _error(where, "has an option db that is not a number")
    return parts


def _label(parts: SplitResult) -> str:
    options = dict(parse_qsl(parts.query))
    database = options.get("db") or parts.path.strip("/") or "0"
    if parts.scheme == "unix":
        return f"{parts.path}#{options.get('db', '0')}"
    return f"{parts.hostname}:{parts.port or _PORT}/{int(database)}"


def _is_local(parts: SplitResult) -> bool:
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:  # not an address
        return parts.hostname in (None, "localhost")


def _error(where: str, fault: str) -> ConfigError:
    return ConfigError(f"{where} {fault}")
