"""TLS from a certificate and its key, checked before anything listens."""

from __future__ import annotations

import ssl
from pathlib import Path

from bascule.errors import ConfigError


class _Encrypted(Exception):
    """The key asks for a password."""


def tls_context(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    """What a server needs for TLS 1.2 and later; None without files. Raises ConfigError where they do not go together.

    The key may lie in the certificate's file. A key that needs a password is refused: nobody is there to type it.
    """
    if certfile is None:
        if keyfile is not None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile, the certificate that belongs to the key")
        return None
    for flag, path in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except _Encrypted:
        raise ConfigError(
            f"--ssl-keyfile: the key in {keyfile or certfile} needs a password; take it off, as by `openssl pkey`, and "
            "keep the file to yourself (chmod 600)"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(_why(error, certfile, keyfile)) from error
    return context


def _no_password() -> str:
    raise _Encrypted


def _why(error: ssl.SSLError, certfile: Path, keyfile: Path | None) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"--ssl-keyfile {keyfile or certfile} is the key of another certificate than --ssl-certfile {certfile}"
    try:
        ssl.create_default_context().load_verify_locations(certfile)
    except ssl.SSLError:
        return f"--ssl-certfile {certfile} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)"
    if keyfile is None:
        return f"--ssl-certfile {certfile} holds no key; give the key's file with --ssl-keyfile"
    return f"--ssl-keyfile {keyfile} holds no key in PEM form (-----BEGIN PRIVATE KEY-----)"
