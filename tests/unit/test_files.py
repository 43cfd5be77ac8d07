import os
import stat

import pytest

from moescope import CommandError, files


def names(path):
    return sorted(item.name for item in path.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with files.replacing(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
        assert new.suffix == ".json"  # matplotlib chooses the format by it
    assert path.read_text() == "new"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_file_as_it_was(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail():
        with files.replacing(path) as new:
            new.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_modes_and_links_stay(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write(link, b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_device_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.check_writable(pipe)
        files.write(pipe, b"new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_can_be_written_is_not_touched(tmp_path):
    path = tmp_path / "result.json"
    files.check_writable(path)
    assert names(tmp_path) == []
    path.write_text("old")
    files.check_writable(path)
    assert path.read_text() == "old"


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "it is a directory"),
        (tmp_path / "none" / "x.json", "there is no directory"),
        (tmp_path / "file" / "x.json", "is not a directory"),
    ):
        with pytest.raises(CommandError, match=reason):
            files.check_writable(path)
    assert names(tmp_path) == ["file"]
