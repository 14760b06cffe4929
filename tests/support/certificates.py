"""Certificates for loopback, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certify(folder: Path, name: str, *how: str) -> None:
    """`name.pem` and `name.key`; `how` are openssl's flags for the key."""
    kind = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    who = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
    subprocess.run(["openssl", *kind, *who, *files, *how], check=True, capture_output=True, timeout=30)
