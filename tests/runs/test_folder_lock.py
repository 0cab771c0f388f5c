"""The lock of a run's folder: one process at a time, released by the system however the process ends."""

import subprocess
import sys

import pytest
from filelock import FileLock

from editlab.errors import UserError
from editlab.runs.folder_lock import NAME, lock_folder, unlock_folder


def test_another_holder_is_refused_until_it_lets_go(tmp_path):
    other = FileLock(tmp_path / NAME)  # an instance of its own locks like another process
    with other, pytest.raises(UserError, match="Another process is writing into the run's folder"):
        lock_folder(tmp_path)
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # the lock belongs to the process
    unlock_folder(tmp_path)
    with other.acquire(timeout=0):
        pass


def test_a_killed_process_does_not_block(tmp_path):
    code = (  # the name keeps the lock: one that is collected is released
        "import sys\nfrom filelock import FileLock\n"
        "lock = FileLock(sys.argv[1])\nlock.acquire()\nprint('held', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError):
            lock_folder(tmp_path)
        holder.kill()
        holder.wait()
        lock_folder(tmp_path)
    unlock_folder(tmp_path)


def test_a_removed_folder_is_locked_anew(tmp_path):
    folder = tmp_path / "version_0"
    lock_folder(folder)
    (folder / NAME).unlink()
    folder.rmdir()
    lock_folder(folder)
    with pytest.raises(UserError), _fresh():
        lock_folder(folder)
    unlock_folder(folder)


class _fresh:  # noqa: N801 - reads like a context manager
    """Forget this process's locks without releasing them, as another process that knows nothing of them."""

    def __enter__(self):
        from editlab.runs import folder_lock

        self.held, folder_lock._held = folder_lock._held, {}

    def __exit__(self, *_):
        from editlab.runs import folder_lock

        folder_lock._held = self.held
