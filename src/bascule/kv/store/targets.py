"""The servers of the remote tier, as asked for on the command line."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from bascule.errors import ConfigError

KEY = "--kv-remote"
_SCHEMES = ("redis", "rediss", "unix")
_PORT = 6379
_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_OPTIONS = {"redis": {"db"}, "rediss": {"db"} | _TLS_OPTIONS, "unix": {"db"}}
_BARE = re.compile(r"(?:[^\s/@:?#\[\]]+|\[[0-9a-fA-F:.]+\])(?::\d+)?")
_EXAMPLE = "redis://host1:6379/0,redis://host2"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NAME = re.compile(r"[\w.-]+")
_MOST_DATABASE = (1 << 31) - 1
"""No server counts further."""
_CERT_REQS = ("none", "optional", "required")
_SWITCHES = ("0", "f", "false", "n", "no", "1", "t", "true", "y", "yes")
"""How redis-py writes false and true; it takes anything else for true."""


class _Encrypted(Exception):
    """A key asks for a password."""


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

    A bare `host` or `host:port` is a server like the one before it: same scheme, password, database and options. Files
    of certificates and keys are read. Raises ConfigError that names `key`, the flag, and the server by its number.
    """
    if _CONTROL.search(text):
        raise ConfigError(f"{key} has a line break, or another control character; write one of a password as %0A")
    urls: list[str] = []
    servers: list[SplitResult] = []
    for number, item in enumerate((each.strip() for each in text.split(",")), 1):
        where = f"{key}: server {number}"
        if "://" not in item:
            if not servers or servers[-1].scheme == "unix" or not _BARE.fullmatch(item):
                raise _error(where, f"is not a URL; write for example {_EXAMPLE}")
            credentials, at, _ = servers[-1].netloc.rpartition("@")
            item = servers[-1]._replace(netloc=credentials + at + item).geturl()
        servers.append(_split(item, where))
        urls.append(item)
    for number, server in enumerate(servers, 1):  # now that all are URLs, no part of a password is taken for a host
        _check(server, f"{key}: server {number}")
    _check_apart(servers, key)
    return tuple(Target(url, _label(server), _is_local(server)) for url, server in zip(urls, servers, strict=True))


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
    options = parse_qsl(parts.query, keep_blank_values=True)
    names = [name for name, _ in options]
    if set(names) - _OPTIONS[parts.scheme]:
        known = ", ".join(sorted(_OPTIONS[parts.scheme]))
        raise _error(where, f"has an unknown option (after the ?); known ones are {known}")
    if len(set(names)) < len(names):
        raise _error(where, "has an option twice (after the ?); write it once")
    if not dict(options).get("db", "0").isdecimal():
        raise _error(where, "has an option db that is not a number")
    return parts


def _check(parts: SplitResult, where: str) -> None:
    """Raises ConfigError for what is well formed and still cannot be connected to, and names it."""
    if parts.scheme != "unix" and not _is_host(parts.hostname or ""):
        raise _error(where, f"has the host {parts.hostname!r}, which is no host's name or address; mend it")
    if _CONTROL.search(unquote(parts.path + parts.query)):
        raise _error(where, "has a control character (such as %00) in its path or options; mend it")
    database = _database(parts)
    if len(database) > len(str(_MOST_DATABASE)) or int(database) > _MOST_DATABASE:
        raise _error(where, f"has the database {database[:20]}, but no server has one above {_MOST_DATABASE}")
    options = _options(parts)
    if (asked := options.get("ssl_cert_reqs", "none")) not in _CERT_REQS:
        raise _error(where, f"has ssl_cert_reqs={asked}; write one of {', '.join(_CERT_REQS)}")
    if (asked := options.get("ssl_check_hostname", "true")).lower() not in _SWITCHES:
        raise _error(where, f"has ssl_check_hostname={asked}; write true or false")
    _check_files(options, where)


def _is_host(host: str) -> bool:
    """Whether it is an address, or may be a name."""
    try:
        ip_address(host)
    except ValueError:
        try:
            return bool(_NAME.fullmatch(host) and host.encode("idna"))
        except UnicodeError:  # labels that are empty or too long
            return False
    return True


def _check_files(options: dict[str, str], where: str) -> None:
    """Raises ConfigError where the files of TLS cannot be read, or do not go together."""
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        try:
            if (path := options.get(name)) is not None:
                open(path, "rb").close()
        except OSError as error:
            raise _error(where, f"has {name}={path}, which cannot be read ({error.strerror}); mend the path") from error
    authorities, certificate, its_key = (options.get(f"ssl_{part}") for part in ("ca_certs", "certfile", "keyfile"))
    if its_key is not None and certificate is None:
        raise _error(where, "has ssl_keyfile without ssl_certfile, the certificate that belongs to the key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if authorities is not None:
            context.load_verify_locations(authorities)
    except OSError as error:
        raise _error(where, f"has ssl_ca_certs={authorities}, which holds no certificate in PEM form") from error
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, its_key, password=_no_password)
    except _Encrypted:
        raise _error(where, f"has a key ({its_key or certificate}) that needs a password; take it off") from None
    except OSError as error:
        files = f"ssl_certfile={certificate}" + (f" and ssl_keyfile={its_key}" if its_key else "")
        raise _error(where, f"has {files}; that is not a certificate and its key, both in PEM form") from error


def _no_password() -> str:
    raise _Encrypted


def _check_apart(servers: list[SplitResult], key: str) -> None:
    """Raises ConfigError where a server is named twice: its share of the blocks would be too large, and count twice."""
    seen: dict[tuple[str, int, int], str] = {}
    for server in servers:
        label, host = _label(server), server.path
        if server.scheme != "unix":
            host = "loopback" if _is_local(server) else (server.hostname or "").rstrip(".")
        place = (host, server.port or _PORT, int(_database(server)))
        if (before := seen.get(place, "")) == label:
            raise ConfigError(f"{key}: {label} is named twice; name each server once")
        if before:
            raise ConfigError(
                f"{key}: {before} and {label} are one server; name each server once, and give two on one machine "
                "different ports"
            )
        seen[place] = label


def _options(parts: SplitResult) -> dict[str, str]:
    return dict(parse_qsl(parts.query, keep_blank_values=True))


def _database(parts: SplitResult) -> str:
    """Its number, in digits without zeros before it."""
    path = "" if parts.scheme == "unix" else parts.path.strip("/")
    return (_options(parts).get("db") or path).lstrip("0") or "0"


def _label(parts: SplitResult) -> str:
    if parts.scheme == "unix":
        return f"{parts.path}#{_options(parts).get('db', '0')}"
    return f"{parts.hostname}:{parts.port or _PORT}/{int(_database(parts))}"


def _is_local(parts: SplitResult) -> bool:
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:  # not an address
        return (parts.hostname or "localhost").rstrip(".") == "localhost"


def _error(where: str, fault: str) -> ConfigError:
    return ConfigError(f"{where} {fault}")
