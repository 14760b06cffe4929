"""Folders of sockets: kept while their process lives, removed by the next one after it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bascule.kv.transfer.folder import SocketFolder

HOLD = """
import sys, time
from pathlib import Path
from bascule.kv.transfer.folder import SocketFolder
folder = SocketFolder(Path(sys.argv[1]))
(folder.path / "kv").touch()
print(folder.path, flush=True)
time.sleep(60)
"""


def age(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def test_a_folder_outlives_its_killed_process_only_until_the_next_one_comes(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        age(held)
        SocketFolder(tmp_path).remove()
        assert (held / "kv").exists(), "its process lives"
    finally:
        holder.kill()
        holder.wait()
    fresh = tmp_path / "bascule-kv-justmade"
    fresh.mkdir()
    (tmp_path / "bascule-other").mkdir()
    SocketFolder(tmp_path).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bascule-kv-justmade", "bascule-other"]
