import errno
import gzip
import json
import os
import stat
from pathlib import Path

import pytest

from dlp_lora.files import link_or_copy, name_of, recover_folder, replace_file, replace_folder, write_lines, write_text


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder that holds something to lose."""
    path = tmp_path / "bundle"
    (path / "adapters").mkdir(parents=True)
    (path / "bundle.json").write_text("old")
    (path / "adapters" / "math").write_text("old adapter")
    return path


OLD = {"bundle.json": "old", "adapters/math": "old adapter"}


def test_a_new_folder_appears_with_its_parents_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "bundle"
    with replace_folder(path) as folder:
        assert folder.is_dir()
        assert folder.parent == path.parent  # the same file system, so that a rename is one step
        (folder / "bundle.json").write_text("new")
        assert not path.exists()
    assert contents(path) == {"bundle.json": "new"}
    assert names(path.parent) == ["bundle"]


def test_a_folder_is_replaced_as_a_whole(bundle: Path) -> None:
    with replace_folder(bundle) as folder:
        assert names(folder) == []
        (folder / "bundle.json").write_text("new")
        assert contents(bundle) == OLD
    assert contents(bundle) == {"bundle.json": "new"}
    assert names(bundle.parent) == ["bundle"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_what_interrupts_the_writing_leaves_the_previous_folder(error: BaseException, bundle: Path) -> None:
    def write() -> None:
        with replace_folder(bundle) as folder:
            (folder / "bundle.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(bundle) == OLD
    assert names(bundle.parent) == ["bundle"]


def test_what_interrupts_the_first_writing_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with replace_folder(tmp_path / "bundle") as folder:
            (folder / "bundle.json").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write()
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_previous_folder(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    def write() -> None:
        with replace_folder(bundle) as folder, monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            (folder / "bundle.json").write_text("new")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert contents(bundle) == OLD
    assert names(bundle.parent) == ["bundle"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_previous_folder(
    failing: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = Path.rename, []

    def flaky(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    def write() -> None:
        with replace_folder(bundle) as folder:
            (folder / "bundle.json").write_text("new")
            monkeypatch.setattr(Path, "rename", flaky)

    with pytest.raises(OSError, match="Input/output error"):
        write()
    monkeypatch.undo()
    assert contents(bundle) == OLD
    assert names(bundle.parent) == ["bundle"]


def test_a_kill_between_the_two_renames_is_recovered(bundle: Path) -> None:
    bundle.rename(bundle.with_name(".bundle.previous"))
    recover_folder(bundle)
    assert contents(bundle) == OLD
    assert names(bundle.parent) == ["bundle"]


def test_a_replacement_after_a_kill_recovers_before_it_writes(bundle: Path) -> None:
    bundle.rename(bundle.with_name(".bundle.previous"))

    def write() -> None:
        with replace_folder(bundle):
            assert contents(bundle) == OLD
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write()
    assert contents(bundle) == OLD


def test_recovery_leaves_a_whole_folder_alone(bundle: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".bundle.previous"
    stale.mkdir()
    (stale / "bundle.json").write_text("older still")
    recover_folder(bundle)
    assert contents(bundle) == OLD
    recover_folder(tmp_path / "never-was")
    assert not (tmp_path / "never-was").exists()
    with replace_folder(bundle) as folder:
        (folder / "bundle.json").write_text("new")
    assert contents(bundle) == {"bundle.json": "new"}
    assert names(tmp_path) == ["bundle"]


def test_what_a_kill_leaves_of_the_old_folder_never_comes_back_in_part(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        (path / "bundle.json").unlink(missing_ok=True)

    with replace_folder(bundle) as folder:
        (folder / "bundle.json").write_text("new")
        monkeypatch.setattr("shutil.rmtree", killed)  # deleting what was there before stops half-way
    monkeypatch.undo()
    assert contents(bundle) == {"bundle.json": "new"}
    (bundle / "bundle.json").unlink()
    bundle.rmdir()
    recover_folder(bundle)
    assert not bundle.exists()


def test_a_link_to_a_folder_stays_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "latest"
    link.parent.mkdir()
    link.symlink_to(bundle)
    for text in ("new", "newer"):
        with replace_folder(link) as folder:
            (folder / "bundle.json").write_text(text)
        assert link.is_symlink()
        assert contents(bundle) == {"bundle.json": text}
    assert names(link.parent) == ["latest"]
    assert names(tmp_path) == ["bundle", "elsewhere"]


def test_a_folder_is_named_relative_to_where_the_writing_began(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    with replace_folder("bundle") as folder:
        (folder / "bundle.json").write_text("new")
        monkeypatch.chdir(tmp_path / "sub")
    assert contents(bundle) == {"bundle.json": "new"}
    assert names(tmp_path / "sub") == []


def test_a_written_folder_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with replace_folder(tmp_path / "bundle"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "bundle")]
    assert modes[0] == modes[1]


def test_a_text_file_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_text(file, "é\n")
    write_text(file, "ö\n")
    assert file.read_bytes() == "ö\n".encode()
    assert names(tmp_path) == ["state.json"]


def test_a_text_file_on_a_full_disk_keeps_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_text(file, "whole")

    def full(self: Path, text: str, **_: object) -> int:
        with self.open("w") as partial:
            partial.write(text[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_text(file, "something longer")
    assert file.read_text() == "whole"
    write_text(file, "new")
    assert file.read_text() == "new"


def test_a_folder_that_was_not_written_here_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with (
        pytest.raises(ValueError, match=r"work exists and has no bundle\.json, so it is something else"),
        replace_folder(tmp_path / "work", own=("bundle.json",)),
    ):
        pass
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("links", [True, False])
def test_what_others_put_into_a_folder_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "this disk has no links")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    folder, own = tmp_path / "bundle", ("bundle.json", "adapters")
    (folder / ".git" / "refs").mkdir(parents=True)
    (folder / ".git" / "refs" / "main").write_text("commit")
    (folder / "README.md").write_text("mine")
    (folder / "latest").symlink_to("README.md")
    (folder / "adapters").mkdir()
    (folder / "adapters" / "old").write_text("old")
    (folder / "bundle.json").write_text("old")
    with replace_folder(folder, own=own) as aside:
        (aside / "bundle.json").write_text("new")
    assert (folder / "bundle.json").read_text() == "new"
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / ".git" / "refs" / "main").read_text() == "commit"
    assert (folder / "latest").is_symlink()
    assert not (folder / "adapters").exists()
    with pytest.raises(RuntimeError), replace_folder(folder, own=own) as aside:
        raise RuntimeError
    assert (folder / "README.md").read_text() == "mine"


def test_a_folder_is_named_after_itself_and_a_link_not_after_what_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run42").mkdir()
    (tmp_path / "sums").symlink_to("run42")
    assert [name_of(tmp_path / name) for name in ("run42", "sums", "run42/../sums")] == ["run42", "sums", "sums"]
    monkeypatch.chdir(tmp_path / "run42")
    assert name_of(".") == "run42"


def test_all_that_is_written_may_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with replace_folder(tmp_path / "router", own=("weights", "parts")) as folder:
            (folder / "parts").mkdir(mode=0o700)
            for file in (folder / "weights", folder / "parts" / "more"):
                file.touch(mode=0o600)
        (tmp_path / "router" / "run.sh").touch(mode=0o700)
        with replace_folder(tmp_path / "router", own=("weights", "parts")) as folder:
            (folder / "weights").touch(mode=0o600)
            (folder / "parts").mkdir(mode=0o700)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "router").iterdir()}
    finally:
        os.umask(mask)
    assert modes == {"weights": 0o644, "parts": 0o755, "run.sh": 0o700}  # what others put there stays as it is


def test_the_umask_of_the_process_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("another thread could make files without it meanwhile"))
    with replace_folder(tmp_path / "router") as folder:
        (folder / "weights").touch(mode=0o600)
    (tmp_path / "ordinary").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("ordinary", "router/weights")]
    assert modes[0] == modes[1]
    assert [file.name for file in (tmp_path / "router").iterdir()] == ["weights"]


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def flushed(descriptor: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        events.append(f"name {target.name}")
        return rename(source, target)

    def replaced(source: Path, target: Path) -> None:
        events.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    with replace_folder(tmp_path / "folder") as folder:
        (folder / "weights").write_text("new")
    assert events.index("flush weights") < events.index("name folder") < events.index(f"flush {tmp_path.name}")
    events.clear()
    write_text(tmp_path / "record.json", "{}")
    assert events == ["flush .record.json.partial", "name record.json", f"flush {tmp_path.name}"]


def test_a_file_that_is_not_written_to_its_end_leaves_the_one_before(tmp_path: Path) -> None:
    write_text(tmp_path / "record.json", "old")

    def write() -> None:
        with replace_file(tmp_path / "record.json") as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, "the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert contents(tmp_path) == {"record.json": "old"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_are_written_whole_or_not_at_all_and_compressed_by_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    write_lines(file, [{"text": "é\u2028"}, {"text": "\n"}])

    def read() -> list[dict[str, str]]:
        data = gzip.decompress(file.read_bytes()) if name.endswith("gz") else file.read_bytes()
        return [json.loads(line) for line in data.decode().split("\n")[:-1]]

    assert read() == [{"text": "é\u2028"}, {"text": "\n"}]
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_lines(file, [{"text": "new"}, {"text": object()}])
    assert read()[0] == {"text": "é\u2028"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_another_folder_has_too_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = tmp_path / "old" / "weights"
    old.write_text("w")
    old.chmod(0o660)
    with replace_folder(tmp_path / "new") as folder:
        link_or_copy(str(old), str(folder / "weights"))
        (folder / "own").write_text("o")
        (folder / "own").chmod(0o600)
    assert old.stat().st_mode & 0o777 == 0o660
    assert (tmp_path / "new" / "own").stat().st_mode & 0o044 == 0o044
