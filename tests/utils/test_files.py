"""Tests of the files on disk after success, failure, a race and a full disk: each is complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import platformdirs
import pytest

from editlab.errors import EditLabError, UserError
from editlab.utils.files import atomic_file, atomic_folder, cache_dir, shown_path, sweep


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill(path: Path, text: str = "new") -> None:
    (path / "a.txt" if path.is_dir() else path).write_text(text)


@pytest.mark.parametrize("chosen", ["/somewhere/else", "~/cache"])
def test_cache_dir_follows_the_variable(monkeypatch, chosen):
    monkeypatch.setenv("EDITLAB_CACHE", chosen)
    assert cache_dir() == Path(chosen).expanduser()


@pytest.mark.parametrize("unset", [True, False])
def test_cache_dir_defaults_to_the_platforms_folder(monkeypatch, unset):
    monkeypatch.setenv("EDITLAB_CACHE", "")
    if unset:
        monkeypatch.delenv("EDITLAB_CACHE")
    assert cache_dir() == platformdirs.user_cache_path("editlab")
    assert "editlab" in cache_dir().parts


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_success_moves_it_to_its_path(tmp_path, atomic):
    target = tmp_path / "deep" / "down" / "thing"
    with atomic(target) as temporary:
        fill(temporary)
        assert temporary.parent == target.parent
        assert not target.exists()
    assert listing(tmp_path / "deep" / "down") == (["thing"] if atomic is atomic_file else ["thing", "thing/a.txt"])


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, UserError, FileNotFoundError])
def test_a_failure_leaves_no_file_and_is_raised(tmp_path, atomic, failure):
    def fail():
        with atomic(tmp_path / "thing") as temporary:
            fill(temporary)
            raise failure("mine")

    with pytest.raises(failure, match="mine"):
        fail()
    assert listing(tmp_path) == []


def test_a_file_is_replaced_only_on_success(tmp_path):
    target = tmp_path / "thing"
    target.write_text("old")

    def fail():
        with atomic_file(target) as temporary:
            fill(temporary)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert target.read_text() == "old"
    with atomic_file(target) as temporary:
        fill(temporary)
    assert target.read_text() == "new"
    assert listing(tmp_path) == ["thing"]


def test_of_two_racing_folders_the_first_stays(tmp_path):
    target = tmp_path / "thing"
    with atomic_folder(target) as late:
        fill(late, "late")
        with atomic_folder(target) as early:
            fill(early, "early")
    assert (target / "a.txt").read_text() == "early"
    assert listing(tmp_path) == ["thing", "thing/a.txt"]


def test_an_empty_folder_makes_room(tmp_path, monkeypatch):
    """As Windows has it, which renames to no folder that exists."""
    rename = Path.rename

    def strict(self, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", strict)
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_a_path_on_another_drive_is_shown_whole(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a" / "b") == os.path.join("a", "b")

    def other_drive(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")  # as ntpath says it

    monkeypatch.setattr("editlab.utils.files.os.path.relpath", other_drive)
    assert shown_path(tmp_path / "a") == str(tmp_path / "a")


def test_of_two_racing_files_the_last_stays(tmp_path):
    target = tmp_path / "thing"
    with atomic_file(target) as late:
        fill(late, "late")
        with atomic_file(target) as early:
            fill(early, "early")
    assert target.read_text() == "late"
    assert listing(tmp_path) == ["thing"]


@pytest.mark.parametrize(("atomic", "obstacle"), [(atomic_file, Path.mkdir), (atomic_folder, Path.touch)])
def test_a_file_in_the_path_of_a_folder_and_vice_versa(tmp_path, atomic, obstacle):
    obstacle(tmp_path / "thing")

    def work():
        with atomic(tmp_path / "thing") as temporary:
            fill(temporary)

    with pytest.raises(UserError, match=r"cannot write \S+/thing, because \S+/thing is in its way: choose"):
        work()
    assert listing(tmp_path) == ["thing"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "folder"), atomic_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space"), RuntimeError("I/O error: No space left on device (os error 28)")],
    ids=["plain", "as safetensors says it"],
)
def test_a_full_disk_raises_a_clear_error(tmp_path, monkeypatch, atomic, error):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path))

    def fail():
        with atomic(tmp_path / "thing"):
            raise error

    with pytest.raises(EditLabError, match=r"no space on the disk to write .*thing.*set EDITLAB_CACHE") as caught:
        fail()
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is error
    assert listing(tmp_path) == []


def test_a_full_disk_is_recognized_behind_a_vague_error(tmp_path, monkeypatch):
    """torch.save reports a failed write without its reason, which is found by the free space."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 512, 512))

    def fail():
        with atomic_file(tmp_path / "thing"):
            raise RuntimeError("file write failed")

    with pytest.raises(EditLabError, match=r"no space on the disk .* choose a folder on another disk"):
        fail()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_file_system_is_not_reported_as_full(tmp_path, monkeypatch, code):
    """A read-only file system, such as that of an image, has no free bytes either."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))

    def refuse(path, *args, **kwargs):
        raise OSError(code, "refused", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="no permission to write"), atomic_file(tmp_path / "thing"):
        pass


def test_files_of_a_killed_writer_are_removed(tmp_path):
    try:
        with atomic_file(tmp_path / "thing") as file, atomic_folder(tmp_path / "things") as folder:
            fill(folder)
            left = [shutil.copyfile(file, f"{file}.kept"), shutil.copytree(folder, f"{folder}.kept")]
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        for copy in left:  # copies of the unfinished files
            os.rename(copy, str(copy).removesuffix(".kept"))
    (tmp_path / ".notes.part").touch()
    assert len(listing(tmp_path)) == 4
    sweep(tmp_path)
    assert listing(tmp_path) == [".notes.part"]
    sweep(tmp_path / "nowhere")


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_missing_permission_raises_a_clear_error(tmp_path, monkeypatch, atomic):
    """The missing permission is simulated at the system call, because a superuser has every permission."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "touch", refuse)

    def work():
        with atomic(tmp_path / "thing"):
            pytest.fail("the body must not run")

    with pytest.raises(UserError, match=r"no permission to write .*thing: choose a folder"):
        work()


def test_a_file_in_the_way_raises_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))

    def work():
        with atomic_file(cache_dir() / "models" / "thing"):
            pytest.fail("the body must not run")

    with pytest.raises(UserError, match="is in its way: set EDITLAB_CACHE to another folder"):
        work()


def test_an_unreadable_source_is_not_blamed_on_the_target(tmp_path):
    def fail():
        with atomic_file(tmp_path / "thing"):
            raise PermissionError(errno.EACCES, "Permission denied", "/the/source")

    with pytest.raises(PermissionError):
        fail()
    assert listing(tmp_path) == []
