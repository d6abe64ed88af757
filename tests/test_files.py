"""Files are whole or absent, and every failure is one line for the user."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe.files import exchange, exists, make_folder, remove_parts, write_whole
from spectralmoe.json_files import read_json, to_json, write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(value=VALUES)
def test_json_comes_back(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_numbers_that_json_has_not_become_null(tmp_path):
    write_json(tmp_path / "a", {"x": [math.inf, -math.inf, math.nan, 1.5], "t": (1, 2)})
    assert json.loads((tmp_path / "a").read_text(), parse_constant=pytest.fail) == {
        "x": [None, None, None, 1.5],
        "t": [1, 2],
    }


def circular():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [{1, 2}, {"x": object()}, {(1, 2): 3}, circular()])
def test_what_json_cannot_hold(value, tmp_path, user_error):
    (tmp_path / "a").write_text("old")
    for action in (lambda: to_json(value), lambda: write_json(tmp_path / "a", value)):
        with user_error("not a value for JSON"):
            action()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 10**6, b"9" * 5000, b'{"a": 1} x'], ids=lambda content: str(content[:5])
)
def test_what_is_not_json(tmp_path, user_error, content):
    (tmp_path / "a.json").write_bytes(content)
    with user_error("a.json", "not a readable JSON file"):
        read_json(tmp_path / "a.json")


def test_things_that_are_no_file(tmp_path, user_error):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with user_error("nothing", "no such file"):
        read_json(tmp_path / "nothing")
    for name in ("", "loop"):
        with user_error(str(tmp_path), "not a readable JSON file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("mine"), KeyboardInterrupt()])
def test_a_failed_write_changes_nothing(tmp_path, user_error, error):
    path = tmp_path / "a"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    if isinstance(error, OSError):
        with user_error(f"cannot write {path}: No space left on device"):
            write_whole(path, write)
    else:
        with pytest.raises(type(error)):
            write_whole(path, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_the_file_stands_at_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        assert temporary.parent.parent == tmp_path
        assert path.read_text() == "old"

    write_whole(path, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def test_what_a_killed_write_left_can_be_swept_up(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".hidden").write_text("mine")

    child = os.fork()
    if not child:
        write_whole(tmp_path / "below" / "a", lambda _: os._exit(7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(list((tmp_path / "below").iterdir())) == 2
    remove_parts(tmp_path)
    assert {path.name for path in (tmp_path / "below").iterdir()} == {".hidden"}


def test_the_next_write_removes_what_killed_ones_left_and_nothing_of_running_ones(tmp_path):
    child = os.fork()
    if not child:
        write_whole(tmp_path / "a", lambda part: part.write_text("half") and os._exit(7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(list(tmp_path.iterdir())) == 1

    def write(part):
        part.write_text("slow")
        write_json(tmp_path / "b", 1)  # another writer, while this one is at work
        assert part.read_text() == "slow"
        remove_parts(tmp_path)
        assert part.read_text() == "slow"

    write_whole(tmp_path / "a", write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "slow", "b": "1\n"}


def test_a_part_that_is_taken_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def make_and_lose(**options):
        made.append(make(**options))
        if len(made) < 3:
            remove_parts(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    write_json(tmp_path / "a", 1)
    assert len(made) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("name", "reason"), [("a\0b", "null character"), ("x" * 300, "File name too long")])
def test_names_that_no_file_system_has(name, reason, tmp_path, user_error):
    for action in (read_json, make_folder, lambda path: write_json(path, 1), lambda path: write_json(path / "a", 1)):
        with user_error(reason):
            action(tmp_path / name)
    with user_error("File name too long", "..."):
        exists(tmp_path / ("x/" * 3000))
    assert not list(tmp_path.iterdir())


def test_a_name_of_full_length(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    write_json(path, [1])
    assert read_json(path) == [1]


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"x": 1}')
    assert read_json(tmp_path / "a") == {"x": 1}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a", 1)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_place_that_cannot_be_written(tmp_path, user_error):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    for name in ("none/a", "file/a", "loop/a", "folder"):
        with user_error("cannot write", name):
            write_json(tmp_path / name, 1)
    for name in ("file", "file/a", "loop", "loop/a"):
        with user_error("cannot write to", name):
            make_folder(tmp_path / name)
    assert not any((tmp_path / "folder").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop", "folder"}


def test_what_is_no_regular_file_is_not_replaced(tmp_path, user_error):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with user_error(f"cannot write {path}: it is no regular file"):
            write_whole(path, lambda _: pytest.fail("nothing is written"))
        assert path.is_fifo()
    assert link.is_symlink()
    (tmp_path / "file").write_text("old")
    (tmp_path / "other").symlink_to(tmp_path / "file")
    for name in ("file", "other", "new"):
        write_json(tmp_path / name, 1)
        assert read_json(tmp_path / name) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "file", "other", "new"}


def test_make_folder_makes_parents_and_leaves_nothing_in_it(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere folders are renamed one after the other")
def test_folders_change_places_in_one_step(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    if not exchange(one, other):
        pytest.skip("the file system cannot")
    assert [(one / "other").exists(), (other / "one").exists()] == [True, True]
    with pytest.raises(FileNotFoundError):
        exchange(one, tmp_path / "absent")
