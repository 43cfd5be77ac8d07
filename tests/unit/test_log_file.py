"""The route log's file, and what other processes and the disk do to it meanwhile."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from moescope_service.collector.log_file import KEPT_FILES, LogFile, check_log

META = b'{"type":"meta"}\n'


def line(number: int, size: int = 20) -> bytes:
    return b"%0*d\n" % (size - 1, number)


@contextlib.contextmanager
def no_more_than(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "routes.jsonl"


def opened(path: Path, max_bytes: int | None = None) -> LogFile:
    file = LogFile(path, max_bytes)
    file.begin(META)
    return file


def write(file: LogFile, *lines: bytes) -> None:
    file.put(b"".join(lines))
    file.flush()


def test_a_new_file_is_its_owner_s_alone(path):
    write(opened(path), line(1))
    assert path.read_bytes() == META + line(1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_mode_of_an_existing_file_stays(path):
    path.touch(0o640)
    path.chmod(0o640)
    write(opened(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_a_full_disk_cut_off_is_continued_at_its_byte(path):
    file = opened(path)
    file.put(b"".join(map(line, range(3))))
    for left in (5, len(META) + 7, len(META) + 33):
        with no_more_than(left), pytest.raises(OSError, match="too large"):
            file.flush()
        assert path.stat().st_size == left
    for _ in range(2):
        file.flush()
    assert path.read_bytes() == META + b"".join(map(line, range(3)))


@pytest.mark.parametrize("how", ["moved", "deleted", "emptied"])
def test_the_file_is_begun_anew_with_whole_lines(path, how):
    file = opened(path)
    write(file, line(1))
    with no_more_than(len(META) + 50), pytest.raises(OSError, match="too large"):
        write(file, line(2), line(3))  # half of the third is written
    if how == "moved":
        path.rename(path.with_suffix(".old"))
    elif how == "deleted":
        path.unlink()
    else:
        os.truncate(path, 0)
    file.flush()
    write(file, line(4))
    assert path.read_bytes() == META + line(3) + line(4)
    if how == "moved":
        old = path.with_suffix(".old").read_bytes()
        assert old == META + line(1) + line(2) + line(3)[:10]


def test_an_empty_file_in_its_place_is_taken(path):
    """As logrotate makes it, with its own mode."""
    file = opened(path)
    write(file, line(1))
    path.rename(path.with_suffix(".old"))
    path.touch(0o640)
    write(file, line(2))
    assert path.read_bytes() == META + line(2)


def test_a_directory_that_comes_back(path):
    file = opened(path)
    write(file, line(1))
    path.parent.rename(path.parent.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        write(file, line(2))
    path.parent.mkdir()
    file.flush()
    assert path.read_bytes() == META + line(2)


@pytest.mark.parametrize("torn", [b"", b'{"type":"rou'])
def test_an_existing_file_is_continued_on_a_line_of_its_own(path, torn):
    path.write_bytes(META + torn)
    write(opened(path), line(1))
    assert path.read_bytes() == META + torn + b"\n" * bool(torn) + META + line(1)


def numbered(path: Path) -> list[Path]:
    """All files, the oldest first."""
    kept = [Path(f"{path}.{number}") for number in range(KEPT_FILES + 5, 0, -1)]
    return [one for one in (*kept, path) if one.exists()]


def test_full_files_are_numbered_and_the_oldest_go(path):
    limit = len(META) + 5 * 20 + 7
    file = opened(path, limit)
    for first in range(0, 120, 12):
        write(file, *map(line, range(first, first + 12)))
    files = numbered(path)
    assert len(files) == 1 + KEPT_FILES
    assert all(one.read_bytes().startswith(META) for one in files)
    assert all(one.stat().st_size <= limit for one in files)
    assert all(stat.S_IMODE(one.stat().st_mode) == 0o600 for one in files)
    lines = b"".join(one.read_bytes().removeprefix(META) for one in files)
    assert lines == b"".join(map(line, range(70, 120)))


def test_a_line_too_long_for_any_file_has_one_of_its_own(path):
    file = opened(path, 60)
    write(file, line(1), line(2, 500), line(3))
    assert [one.read_bytes() for one in numbered(path)] == [
        META + one for one in (line(1), line(2, 500), line(3))
    ]


def test_a_full_disk_within_a_line_does_not_begin_another_file(path):
    file = opened(path, 60)
    with no_more_than(100), pytest.raises(OSError, match="too large"):
        write(file, line(1, 500), line(2))
    file.flush()
    assert [one.read_bytes() for one in numbered(path)] == [META + line(1, 500), META + line(2)]


def test_an_existing_file_that_is_full_is_numbered_first(path):
    path.write_bytes(b"x" * 99 + b"\n")
    write(opened(path, 110), line(1))
    assert [one.read_bytes() for one in numbered(path)] == [b"x" * 99 + b"\n", META + line(1)]


def make(kind: str, path: Path) -> Path:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        case device:
            return Path(device)
    return path


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "/dev/full", "/dev/null"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    """Opening a pipe waits for who reads it."""
    path = make(kind, tmp_path / "x")
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        check_log(path)


def test_a_pipe_in_its_place_is_not_written(path):
    file = opened(path)
    write(file, line(1))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        write(file, line(2))
    path.unlink()
    file.flush()
    assert path.read_bytes() == META + line(2)


def test_a_log_that_cannot_be_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        check_log(tmp_path / "missing" / "log")
