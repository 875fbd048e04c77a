"""Tar shards: every document comes once an epoch, the line that was cut is the line that is read, a resume is exact."""

from __future__ import annotations

import functools
import http.server
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.data.tar_shards import find_shards, read_texts, write_tar_shards
from tutorial_lib.data.tar_stream import shuffle_buffer, stream_batches
from tutorial_lib.data.tokenize import ByteTokenizer

TOKENIZER = ByteTokenizer(["<|eos|>"])


@pytest.fixture
def tars(tmp_path):
    documents = [f"document {i} " + "x" * (i % 7) for i in range(40)]
    write_tar_shards(documents, tmp_path / "tars", docs_per_shard=6)
    return tmp_path / "tars", documents


def texts_of(stream):
    """The documents in a stream of batches of one window of one token: nothing is left out at the end."""
    line = [int(inputs) for inputs, _ in stream]
    return TOKENIZER.decode(line).split("<|eos|>")


def test_every_document_once_an_epoch_over_all_ranks(tars):
    folder, documents = tars
    epochs = []
    for epoch in range(2):
        found = []
        for rank in range(3):
            stream = stream_batches(folder / "*.tar", TOKENIZER, 1, 1, 5, rank, 3, buffer=4, epochs=2)
            stream.epoch = epoch
            stream.settings["epochs"] = epoch + 1
            found += texts_of(stream)
        assert sorted(text for text in found if text) == sorted(documents)
        epochs.append(found)
    assert epochs[0] != epochs[1], "another epoch, another order"


def test_buffer_one_and_no_seed_difference_keep_documents_whole(tars):
    folder, documents = tars
    line = texts_of(stream_batches(folder / "documents-00000.tar", TOKENIZER, 1, 1, buffer=1, epochs=1))
    assert line[:6] == documents[:6]


def test_batches_are_windows_of_the_packed_line(tars):
    folder, _ = tars
    one = [int(x) for x, _ in stream_batches(str(folder / "*.tar"), TOKENIZER, 1, 1, 7, epochs=2)]
    batches = list(stream_batches(str(folder / "*.tar"), TOKENIZER, 3, 8, 7, epochs=2))
    flat = torch.cat([inputs.flatten() for inputs, _ in batches])
    labels = torch.cat([labels.flatten() for _, labels in batches])
    assert flat.tolist() == one[: len(flat)] and labels.tolist() == one[1 : len(flat) + 1]
    assert len(one) - len(flat) <= 24 and batches[0][0].shape == (3, 8) and flat.dtype == torch.int64


@pytest.mark.parametrize("stop", [0, 1, 7, 30, 61])
def test_resume_at_the_exact_sample(tars, stop):
    folder, _ = tars

    def make():
        return stream_batches(folder / "*.tar", TOKENIZER, 2, 8, seed=3, rank=1, world_size=2, buffer=5)

    whole = make()
    for _ in range(stop):
        next(whole)
    state = whole.state_dict()
    rest = [next(whole) for _ in range(40)]
    resumed = make()
    next(resumed)
    resumed.load_state_dict(state)
    for (a, b), (c, d) in zip(rest, (next(resumed) for _ in range(40)), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    other = stream_batches(folder / "*.tar", TOKENIZER, 2, 8, seed=4, rank=1, world_size=2, buffer=5)
    with pytest.raises(ValueError, match="seed 3, and this one has 4"):
        other.load_state_dict(state)


@given(st.lists(st.integers(), max_size=60), st.integers(1, 20), st.integers())
def test_a_buffer_loses_nothing_and_looks_ahead_by_its_size(items, size, seed):
    out = list(shuffle_buffer(enumerate(items), size, random.Random(seed)))
    assert sorted(out) == list(enumerate(items))
    assert all(i - place < size for place, (i, _) in enumerate(out))
    if size == 1:
        assert out == list(enumerate(items))


def test_same_documents_give_the_same_bytes(tmp_path):
    one = write_tar_shards(["a", "ü\n"], tmp_path / "a")
    two = write_tar_shards(["a", "ü\n"], tmp_path / "b")
    assert one[0].read_bytes() == two[0].read_bytes() and one[0].name == "documents-00000.tar"
    with pytest.raises(FileExistsError, match="already holds tar shards"):
        write_tar_shards(["a"], tmp_path / "a")
    for documents, size in (([], 5), (["a"], 0)):
        with pytest.raises(ValueError):
            write_tar_shards(documents, tmp_path / "c", size)


def test_a_tar_file_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        write_tar_shards(["a", "b", "c", None], tmp_path / "tars", docs_per_shard=2)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["documents-00000.tar"]


def test_paths_patterns_and_addresses_name_tar_files(tars):
    folder, _ = tars
    paths = [str(folder / f"documents-{i:05d}.tar") for i in range(7)]
    assert find_shards(folder / "*.tar") == find_shards(f"{folder}/documents-{{00000..00006}}.tar") == paths
    assert find_shards([paths[3], folder / "*0001.tar"]) == [paths[3], paths[1]]
    web = "https://example.org/a-{0..1}.tar"
    assert find_shards(web) == ["https://example.org/a-0.tar", "https://example.org/a-1.tar"]
    for missing in (folder / "*.zip", f"{folder}/documents-{{00006..00007}}.tar", []):
        with pytest.raises(FileNotFoundError, match="no tar file matches|empty list"):
            find_shards(missing)
    for other in ("pipe:cat x.tar", "s3://bucket/x.tar"):
        with pytest.raises(ValueError, match="neither a path nor an http address"):
            find_shards(other)


@pytest.mark.parametrize("size", [0, 700, 1024, 1500, 4096])
def test_a_truncated_tar_is_named(tars, size):
    folder, _ = tars
    whole = (folder / "documents-00002.tar").read_bytes()
    (folder / "documents-00002.tar").write_bytes(whole[:size])
    with pytest.raises(ValueError, match="documents-00002.tar cannot be read as a whole tar file"):
        list(stream_batches(folder / "*.tar", TOKENIZER, 1, 4, epochs=1))


def test_impossible_streams_are_refused(tars):
    pattern = tars[0] / "*.tar"
    cases = [
        ({"batch_size": 0}, "impossible: batch_size 0"),
        ({"rank": 2, "world_size": 2}, "impossible"),
        ({"world_size": 8}, "7 tar files are too few"),
        ({"tokenizer": ByteTokenizer()}, "no <|eos|>"),
    ]
    for change, said in cases:
        arguments = {"tokenizer": TOKENIZER, "batch_size": 1, "seq_len": 4, **change}
        with pytest.raises(ValueError, match=said.replace("|", r"\|")):
            stream_batches(pattern, **arguments)


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http addresses with curl")
def test_over_http_the_batches_are_those_from_disk(tars, monkeypatch):
    folder, _ = tars

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        web = f"http://127.0.0.1:{server.server_port}/documents-{{00000..00006}}.tar"
        over, local = (
            stream_batches(source, TOKENIZER, 2, 16, seed=2, epochs=1) for source in (web, folder / "*.tar")
        )
        for (a, b), (c, d) in zip(over, local, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
        missing = f"http://127.0.0.1:{server.server_port}/nothing.tar"
        with pytest.raises(ValueError, match="nothing.tar"):
            next(stream_batches(missing, TOKENIZER, 2, 16))
    finally:
        server.shutdown()
        server.server_close()


def test_no_name_of_a_file_is_run_as_a_command(tmp_path, monkeypatch):
    """A pattern that matches a stranger's file name: webdataset would open `pipe:…` by running it."""
    monkeypatch.chdir(tmp_path)
    [good] = write_tar_shards(["to be"] * 3, tmp_path)
    evil = "pipe:touch PWNED; cat x #.tar"
    (tmp_path / evil).write_bytes(Path(good).read_bytes())
    for pattern in (evil, "pipe*.tar", "*.tar"):
        texts = [text for shard in find_shards(pattern) for text in read_texts(shard)]
        assert texts and set(texts) == {"to be"}
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("character", list(" '\"`$;|<>"))
def test_an_address_has_nothing_in_it_that_a_shell_would_obey(character):
    with pytest.raises(ValueError, match=f"%{ord(character):02X}"):
        find_shards(f"https://example.org/a{character}b.tar")
