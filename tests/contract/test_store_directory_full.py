"""A `disk` tier whose file system has no room left, by its own doing or by others', before and after a start."""

from __future__ import annotations

import errno
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from store_rig import run_child

from bascule.errors import ConfigError
from bascule.kv.store.places import DiskPlace, disk_store

FULL_DISK = """
import subprocess, sys
from pathlib import Path
from time import monotonic, sleep
from bascule.kv.store.base import Fault, Use
from bascule.kv.store.directory import DirectoryStore

directory = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=True)
store = DirectoryStore(Path(directory), 1 << 30, timeout_s=20)
names = [number.to_bytes(16, "big") for number in range(200)]
deadline = monotonic() + 60
for number, name in enumerate(names):
    while not store.put({name: bytes([number]) * 40_000}):
        assert monotonic() < deadline, (number, store.stats())
        sleep(0.005)
stats = store.stats()
assert stats.errors.keys() == {Fault.FULL}, stats
assert stats.evictions > 0, stats
answers = store.get(names)
assert all(answer in (None, bytes([number]) * 40_000) for number, answer in enumerate(answers))
assert answers[-1] is not None
assert list(Path(directory, "v1", "tmp").iterdir()) == []
subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
kept = [name for name in names if Path(directory, "v1", name.hex()[:2], name.hex()).exists()]
assert kept and None not in store.get(kept)
uses = [Use(name, 0.0, again=True) for name in (kept[0], b"\\xfe" * 16)]
assert store.touch(uses) == [True, False]
assert store.put({b"\\xff" * 16: b"x"}) == 0
assert store.stats().errors[Fault.DENIED] == 1
store.close()
"""


OTHERS_FILL_IT = """
import subprocess, sys
from pathlib import Path
from time import monotonic, sleep
from bascule.kv.store.base import Fault
from bascule.kv.store.places import DiskPlace, disk_store

directory = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=True)
place, others = DiskPlace(directory / "ours", 400_000), directory / "others"

def fill():
    with others.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

before = disk_store(place)
block, other = b"a" * 16, b"b" * 16
assert before.put({block: bytes(1000)}) == 1
before.close()
fill()
after = disk_store(place)
assert after.place == before.place
assert after.get([block]) == [bytes(1000)]
assert after.put({other: bytes(100_000)}) == 0
assert after.stats().errors == {Fault.FULL: 1}
after.close()
(place.directory / "v1" / "id").unlink()
fill()
nameless = [disk_store(place) for _ in range(2)]
places = {before.place, *(store.place for store in nameless)}
assert len(places) == 3, "what nobody can tell to be the same place must not be taken for it"
others.unlink()
deadline = monotonic() + 20
while not nameless[0].put({other: bytes(100_000)}):
    assert monotonic() < deadline
    sleep(0.05)
assert nameless[1].get([other]) == [bytes(100_000)]
for store in nameless:
    store.close()
"""


@pytest.mark.parametrize("script", [FULL_DISK, OTHERS_FILL_IT], ids=["full", "filled by others"])
def test_a_full_disk_is_no_fault_and_a_read_only_one_is_read(tmp_path: Path, script: str) -> None:
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    with suppress(FileNotFoundError):
        if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode == 0:
            run_child(script, str(tmp_path), prefix=namespace)
            return
    pytest.skip("user namespaces, in which to mount a small file system, cannot be made here")


def test_a_disk_too_full_for_its_folders_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ConfigError, match=r"--kv-disk: .* cannot be used .*; make room there"):
        disk_store(DiskPlace(tmp_path / "kv", 1 << 20))
