"""A folder that is being written: there when it is whole, of one process at a time, and nobody else's is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tutorial_lib.data.new_folder import new_folder


def fill(place, text="whole"):
    (place / "train").mkdir()
    (place / "train" / "index.json").write_text(text)


def test_it_is_there_when_it_is_whole(tmp_path):
    out = tmp_path / "data" / "mine"
    with new_folder(out) as place:
        fill(place)
        assert not out.exists()
    assert (out / "train/index.json").read_text() == "whole" and os.listdir(out.parent) == ["mine"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("was_there", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, error, was_there):
    out = tmp_path / "mine"
    if was_there:
        out.mkdir()
    with pytest.raises(error), new_folder(out) as place:
        fill(place)
        raise error
    assert os.listdir(tmp_path) == (["mine"] if was_there else [])


def test_an_empty_folder_or_a_link_to_one_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with new_folder(tmp_path / "link") as place:
        fill(place)
    assert (tmp_path / "disk/train/index.json").exists() and (tmp_path / "link").is_symlink()


def test_what_others_have_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name, said in (("mine", "is not empty"), ("file", "is a file")):
        with pytest.raises(FileExistsError, match=said), new_folder(tmp_path / name):
            raise AssertionError("never inside")
    with pytest.raises(FileExistsError, match="is not empty"), new_folder(tmp_path / "late") as place:
        fill(place)
        (tmp_path / "late").mkdir()
        (tmp_path / "late/letter.txt").write_text("dear")  # came in the meantime
    assert os.listdir(tmp_path / "mine") == os.listdir(tmp_path / "late") == ["letter.txt"]
    (tmp_path / ".away.unfinished").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), new_folder(tmp_path / "away"):
        raise AssertionError("never inside")
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders there")
def test_one_at_a_time(tmp_path):
    out = tmp_path / "mine"
    with new_folder(out) as place:
        with pytest.raises(FileExistsError, match="another process is writing"), new_folder(out):
            raise AssertionError("never inside")
        fill(place)
    assert (out / "train/index.json").read_text() == "whole"


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders there")
def test_after_a_kill_the_next_one_begins_anew(tmp_path):
    out = tmp_path / "mine"
    program = f"""
        import time
        from pathlib import Path
        from tutorial_lib.data.new_folder import new_folder
        with new_folder(Path({str(out)!r})) as place:
            (place / "half").write_text("half")
            print("now", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"now\n"
    with pytest.raises(FileExistsError, match="another process"), new_folder(out):
        raise AssertionError("never inside")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    with new_folder(out) as place:
        assert not any(place.iterdir())
        fill(place)
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(out) == ["train"]
