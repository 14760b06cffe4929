"""Keys as the command line, the environment and files give them, and what is said of planes that have none."""

from __future__ import annotations

import os
import re
import shlex
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bascule.api.tls import tls_context
from bascule.config import HttpConfig, SecurityConfig
from bascule.errors import ConfigError
from bascule.keys import ClusterKey, is_loopback, read_cluster_key, read_private, write_cluster_key

CLUSTER_KEY_FILE, API_KEY, ADMIN_KEY = "BASCULE_CLUSTER_KEY_FILE", "BASCULE_API_KEY", "BASCULE_ADMIN_KEY"
_SANE_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{8,512}")


def cluster_key(file: Path, /) -> None:
    """Make a cluster key, which lets router and workers on several machines trust each other.

    Example: bascule cluster-key cluster.key

    Parameters
    ----------
    file
        File to make, readable by you alone. Copy it to every machine of the cluster (as by scp -p).
    """
    write_cluster_key(file)
    Console(stderr=True).print(
        f"made {file}; give it to router and workers: --cluster-key-file {file}", highlight=False
    )


def cluster_key_of(security: SecurityConfig) -> ClusterKey | None:
    """The cluster's key, if there is one; raises ConfigError for a file that is none or that others can read."""
    if security.cluster_key_file is not None:
        return read_cluster_key(security.cluster_key_file)
    from_environment = os.environ.get(CLUSTER_KEY_FILE)
    return read_cluster_key(Path(from_environment), CLUSTER_KEY_FILE) if from_environment else None


def api_keys(http: HttpConfig) -> tuple[str, ...]:
    """The keys that the API asks for; raises ConfigError for one that cannot be sent in a header."""
    return tuple(_keys("api-key", http.api_key, http.api_key_file, API_KEY))


def admin_keys(http: HttpConfig) -> tuple[str, ...]:
    """Likewise of the admin API."""
    return tuple(_keys("admin-key", http.admin_key, http.admin_key_file, ADMIN_KEY))


def key_in_shell(http: HttpConfig) -> str:
    """One of the API's keys, as a shell finds it where this server did; one given as a flag is not repeated."""
    if http.api_key is not None:
        return "KEY"
    return f"${API_KEY}" if http.api_key_file is None else f"$(head -n 1 {shlex.quote(str(http.api_key_file))})"


def _keys(name: str, given: str | None, file: Path | None, variable: str) -> Iterator[str]:
    """Flag and file add up; the environment counts where neither is given. No key is named in an error."""
    sources = []
    if given is not None:
        sources.append((f"--{name}", given.split(",")))
    if file is not None:
        lines = read_private(file, f"--{name}-file").splitlines()
        sources.append((f"--{name}-file {file}", [line for line in lines if line.strip()]))
    if not sources and (from_environment := os.environ.get(variable)):
        sources.append((variable, from_environment.split(",")))
    for source, keys in sources:
        if not keys:
            raise ConfigError(f"{source} holds no key; write one a line, or leave it out")
        for number, key in enumerate(keys, 1):
            if not _SANE_KEY.fullmatch(key.strip()):
                raise ConfigError(
                    f"{source}: key {number} must have 8 to 512 characters, letters, digits and signs but no comma; "
                    "make one with: openssl rand -hex 32"
                )
            yield key.strip()


def tls_of(http: HttpConfig) -> ssl.SSLContext | None:
    """What the API speaks TLS with, if it does; raises ConfigError for files that cannot be used, and for a key that
    everybody on this machine can read."""
    context = tls_context(http.ssl_certfile, http.ssl_keyfile)
    key = http.ssl_keyfile or http.ssl_certfile
    if key is not None and _mode(key) & stat.S_IRWXO:
        raise ConfigError(f"everybody on this machine can read the TLS key {key}; do: chmod 600 {key}")
    return context


def _mode(path: Path) -> int:
    """A file's permissions; none of a pipe, which nobody reads twice."""
    mode = path.stat().st_mode
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else 0


def doubts(http: HttpConfig, keys: tuple[str, ...], admin: tuple[str, ...]) -> Iterator[str]:
    """What a person should know about planes that others reach, with these keys of the API and of the admin API, and
    about the TLS key."""
    tls_key = http.ssl_keyfile or http.ssl_certfile
    if tls_key is not None and tls_key.exists() and _mode(tls_key) & stat.S_IRWXG:
        yield f"the group of the TLS key {tls_key} can read it; if that is not meant, do: chmod 600 {tls_key}"
    if keys and not admin:
        yield (
            "the API asks for a key and the admin API for none: every user of this machine may see and drain workers; "
            "see --admin-key-file"
        )
    if is_loopback(http.host):
        return
    if not keys:
        yield f"the API listens on {http.host} and asks for no key: whoever reaches it may use it; see --api-key-file"
    elif http.ssl_certfile is None:
        yield f"the API listens on {http.host} without TLS: keys and prompts can be read on the way; see --ssl-certfile"
