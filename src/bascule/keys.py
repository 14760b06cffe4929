"""Secrets from files that nobody else can read, the cluster's key and what is derived from it, and who needs one."""

from __future__ import annotations

import binascii
import ipaddress
import os
import re
import secrets
import socket
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from blake3 import blake3
from zmq.utils import z85

from bascule.errors import ConfigError

_PREFIX = "bascule-cluster-key-1 "
_KEY_BYTES = 32
_MOST_BYTES = 64 << 10
"""Of a file with keys."""

INSECURE = "--insecure"


@dataclass(frozen=True)
class ClusterKey:
    """What router and workers of one cluster know and nobody else: CURVE keys of those who listen and who connect, and
    what goes into the keys of every transfer.

    All processes derive the same from one secret. A client proves by its own key pair that it has the secret; the
    server by its.
    """

    server_public: bytes
    server_secret: bytes = field(repr=False)
    client_public: bytes
    client_secret: bytes = field(repr=False)
    transfers: bytes = field(repr=False)
    """32 bytes."""

    @classmethod
    def of(cls, secret: bytes) -> ClusterKey:
        """From the 32 bytes of a key file."""
        server, client, transfers = (
            blake3(secret, derive_key_context=f"bascule 2026-11 cluster key 1, {purpose}").digest(32)
            for purpose in ("curve server", "curve client", "transfers")
        )
        pairs = [(zmq.curve_public(z85.encode(each)), z85.encode(each)) for each in (server, client)]
        return cls(*pairs[0], *pairs[1], transfers)


def write_cluster_key(path: Path) -> None:
    """Make a key file that only its owner can read; raises ConfigError where there is a file, or none can be."""
    content = _PREFIX + secrets.token_bytes(_KEY_BYTES).hex() + "\n"
    try:
        write_private(path, content.encode(), replace=False)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already, and a cluster may use it; give the name of a new file") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give a file in a directory of yours") from error


def read_cluster_key(path: Path, flag: str = "--cluster-key-file") -> ClusterKey:
    """The key in a file of `write_cluster_key`; raises ConfigError for any other, and for one others can read."""
    text = read_private(path, flag)
    try:
        secret = binascii.unhexlify(text.strip().removeprefix(_PREFIX))
    except ValueError:
        secret = b""
    if not text.startswith(_PREFIX) or len(secret) != _KEY_BYTES:
        raise ConfigError(f"{flag} {path} holds no cluster key; make one with: bascule cluster-key NEW_FILE")
    return ClusterKey.of(secret)


def read_private(path: Path, flag: str) -> str:
    """The text of a file that only its owner can read; raises ConfigError, which names `flag` and what to do."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(
            f"{flag}: others than its owner can read {path} (mode {stat.S_IMODE(mode):04o}); do: chmod 600 {path}"
        )
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError
        return content.decode()
    except ValueError:
        raise ConfigError(f"{flag}: {path} is no text of up to {_MOST_BYTES} bytes; is it the right file?") from None


def write_private(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file of mode 0600, whole or not at all; raises OSError, FileExistsError if it must not `replace`."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is nothing but this machine's loopback; a name nobody knows is not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for *_, address in found)


def stays_here(address: str) -> bool:
    """Whether a zmq address (`tcp://host:port`, `ipc://path`) is reached from this machine alone."""
    match = re.fullmatch(r"tcp://(.+):[^:]*", address)
    return is_loopback(match[1]) if match else address.startswith(("ipc://", "inproc://"))


def check_open(key: ClusterKey | None, insecure: bool, what: str, stays: bool) -> str | None:
    """A warning where `what` can be reached from other machines without a key and that is allowed; None if all is well.

    Raises ConfigError where nobody has allowed it.
    """
    if stays or key is not None:
        return None
    if insecure:
        return f"{what} is neither authenticated nor encrypted: whoever can reach it can read prompts and write tokens"
    raise ConfigError(
        f"{what} can be reached from other machines and needs a cluster key: make one with `bascule cluster-key FILE`, "
        "copy FILE to all machines of the cluster and give --cluster-key-file FILE; in a network that you trust "
        f"without, give {INSECURE}"
    )


def check_clear(key: ClusterKey | None, insecure: bool, what: str, stays: bool, instead: str) -> str | None:
    """A warning where a cluster with a key sends prompts to `what` without encryption and that is allowed; else None.

    The key is no use there: `what` is a server of others. Raises ConfigError, which names what to give `instead`, where
    nobody has allowed it.
    """
    if stays or key is None:
        return None
    said = f"{what} is sent prompts, or KV that tells of them, in clear, which the cluster key does not change"
    if insecure:
        return f"{said}: whoever listens on the way can read them"
    raise ConfigError(f"{said}; give {instead}, or {INSECURE} in a network that you trust")
