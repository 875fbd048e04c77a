"""Tar shards: every document comes once an epoch, the line that was cut is the line that is read, a resume is exact."""

from __future__ import annotations

import functools
import gzip
import http.server
import random
import tarfile
import threading
import tracemalloc
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


@pytest.fixture
def web(tars, monkeypatch):
    """The folder of tar files at an address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tars[0]))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_over_http_the_batches_are_those_from_disk(tars, web):
    over, local = (
        stream_batches(source, TOKENIZER, 2, 16, seed=2, epochs=1)
        for source in (f"{web}/documents-{{00000..00006}}.tar", tars[0] / "*.tar")
    )
    for (a, b), (c, d) in zip(over, local, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_an_address_that_fails_is_named(tars, web):
    whole = (tars[0] / "documents-00002.tar").read_bytes()
    (tars[0] / "cut.tar").write_bytes(whole[:1536])
    for name in (
        "nothing.tar",
        "cut.tar",
        "a b.tar",
        "%00.tar",
        "a'; touch PWNED; '.tar",
        "$(touch PWNED).tar",
    ):
        with pytest.raises(ValueError, match="cannot be read as a whole tar file") as error:
            next(stream_batches(f"{web}/{name}", TOKENIZER, 2, 16))
        assert name in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(ValueError, match="cannot be read as a whole tar file"):
        list(read_texts("http://127.0.0.1:1/nobody.tar"))


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


def member(name, data=b"", kind=tarfile.REGTYPE, size=None, **headers):
    """A member that may say it has another size than it has."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.pax_headers = kind, len(data) if size is None else size, headers
    return info.tobuf(tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(10240)
HOLES = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.txt"}
HUGE = 1 << 40


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (member("0.txt", b"1\n0\n0\n".ljust(512, b"\0"), **HOLES, **{"GNU.sparse.realsize": str(HUGE)}) + END, "has holes"),
        (member("0.txt", (b"%d\n" % (1 << 30)) + b"0\n" * (8 << 20), **HOLES, **{"GNU.sparse.realsize": "1"}) + END, "has holes"),
        (member("0.txt", b"to be", size=HUGE) + END, "unexpected end"),
        (member("0.txt", bytes(65 << 20)) + END, "more than 67,108,864 bytes"),
        (member("0.jpg", bytes(65 << 20)) + END, "more than 67,108,864 bytes"),
        (member("././@LongLink", b"x" * (65 << 20), tarfile.GNUTYPE_LONGNAME) + END, "more than 67,108,864"),
        (member("p", b"30 mtime=" + b"9" * 20 + b"\n", tarfile.XHDTYPE) * 3000 + member("0.txt", b"a") + END, "Error"),
        (member("0.txt", b"to be", size=-512) + END, "below 0"),
        (member("0.txt", b"\xff\xfe") + END, "UnicodeDecodeError"),
        (gzip.compress(member("0.txt", bytes(1 << 28)) + END) + END, "Error"),
        (gzip.compress(member("0.txt", b"to be") + END), "Error"),
        (member("0.txt", b"to be") + b"damage".ljust(512) + member("1.txt", b"x") + END, "no end mark"),
        (b"", "Error"), (b"no tar at all" * 1000, "Error"),
    ],
    ids=["holes", "a long map of holes", "a claim", "long", "long, of no text", "a long name", "many headers",
         "a negative size", "no text", "a bomb", "compressed", "damage", "empty", "noise"],
)  # fmt: skip
def test_a_member_takes_no_more_than_it_has(data, said, tmp_path):
    path = tmp_path / "evil.tar"
    path.write_bytes(data)
    del data
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said) as error:
            list(read_texts(str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert peak < 400 << 20, f"{peak:,} bytes"


def test_what_is_a_document(tmp_path):
    """As WebDataset has it: the ending begins at the first dot of a file's name; folders, links and pictures are none."""
    path = tmp_path / "a.tar"
    members = [
        ("0.txt", b"a"),
        ("dir.d/1.TXT", b"b"),
        ("2.json.txt", b"c"),
        ("3.json", b"d"),
        ("txt", b"e"),
        ("4.txt", b""),
    ]
    link = member("5.txt", kind=tarfile.SYMTYPE) + member("6.txt", kind=tarfile.DIRTYPE)
    path.write_bytes(b"".join(member(*each) for each in members) + link + END)
    assert list(read_texts(str(path))) == ["a", "b", ""]
