"""Does an address that a process offers answer or refuse: a TCP connection to it, made and closed, within a bound."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable

CONNECT_S = 2.0
"""How long an address may take to answer; a packet that is lost once is sent again after a second."""
_PARTS = 4
"""Of that time, one after the other: a process that stands still loses one of them, and then sees what has come."""


async def first_unreachable(addresses: Iterable[str], within_s: float = CONNECT_S) -> str | None:
    """The first of the addresses (`tcp://host:port` or `host:port`) that does not answer, and why; None if all do."""
    for address in addresses:
        if (why := await _why_not(address, within_s)) is not None:
            return f"{address} ({why})"
    return None


async def refuses(address: str, within_s: float = CONNECT_S) -> bool:
    """Whether the address's machine says that nothing listens there; silence or another failure says nothing."""
    try:
        await _connect(address, within_s)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


async def _why_not(address: str, within_s: float) -> str | None:
    try:
        await _connect(address, within_s)
    except TimeoutError:
        return f"no answer within {within_s:g} s"
    except socket.gaierror as error:
        return str(error.strerror).lower()
    except OSError as error:  # without a number: each of a name's addresses fails in its own way
        return os.strerror(error.errno).lower() if error.errno else "none of its addresses answers"
    except (ValueError, OverflowError, UnicodeError):
        return "that is no address"
    return None


async def _connect(address: str, within_s: float) -> None:
    """Raises TimeoutError, OSError, or for what is no address ValueError (UnicodeError) or OverflowError."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    opening = asyncio.ensure_future(asyncio.open_connection(host.strip("[]"), int(port)))
    try:
        for _ in range(_PARTS):
            if (await asyncio.wait((opening,), timeout=within_s / _PARTS))[0]:
                break
        else:
            raise TimeoutError
        _, writer = opening.result()
    finally:
        opening.cancel()
    writer.close()
