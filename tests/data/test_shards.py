"""Shards: the line of tokens that went in comes out, whatever the cuts; what is broken is named; memory stays small."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shards import ShardedTokens, ShardWriter


def write(folder, ids, vocab_size=300, shard_tokens=7, step=5, tokenizer="byte"):
    with ShardWriter(folder, vocab_size, tokenizer, shard_tokens) as writer:
        for start in range(0, len(ids), step):
            writer.add(ids[start : start + step])
    return ShardedTokens(folder)


# --- round trips --------------------------------------------------------------------------------------------


@given(
    pieces=st.lists(st.lists(st.integers(0, 299), max_size=30), min_size=1, max_size=12),
    size=st.integers(1, 40),
    cuts=st.lists(st.integers(-200, 200), min_size=2, max_size=10),
)
def test_any_pieces_in_any_shards(pieces, size, cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    line = [i for piece in pieces for i in piece]
    if not line:
        return
    with ShardWriter(folder, 300, shard_tokens=size) as writer:
        for k, piece in enumerate(pieces):
            writer.add(piece if k % 2 else np.array(piece, np.int32))
    tokens = ShardedTokens(folder)
    assert len(tokens) == writer.total == len(line)
    assert tokens[:].tolist() == line and tokens.dtype == tokens[:].dtype == np.uint16
    assert len(list(folder.glob("*.npy"))) == -(-len(line) // size)
    for a, b in zip(cuts, cuts[1:], strict=False):
        assert tokens[a:b].tolist() == line[a:b], "slices mean what they mean for a list"
        lo, hi = sorted((min(abs(a), len(line)), min(abs(b), len(line))))
        piece = tokens.part(lo, hi)
        assert len(piece) == hi - lo and piece[:].tolist() == line[lo:hi]
        assert piece[1:-1].tolist() == line[lo:hi][1:-1]
    assert [int(tokens[i]) for i in range(-len(line), len(line))] == line + line


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_smallest_type_that_holds_the_vocabulary_is_used(tmp_path, vocab_size, dtype):
    tokens = write(tmp_path / "a", [0, vocab_size - 1] * 9, vocab_size)
    assert tokens.dtype == tokens[3:9].dtype == tokens[7:7].dtype == dtype
    assert tokens[:].tolist() == [0, vocab_size - 1] * 9
    assert (tokens.vocab_size, tokens.tokenizer) == (vocab_size, "byte")


def test_bytes_and_tensors_and_nothing(tmp_path):
    with ShardWriter(tmp_path, 256, shard_tokens=4) as writer:
        for ids in (b"To be", [], np.zeros(0, np.int64), torch.tensor([1, 2]), bytearray(b"x")):
            writer.add(ids)
    assert ShardedTokens(str(tmp_path))[:].tolist() == [*b"To be", 1, 2, *b"x"]


def test_windows_over_shards_are_windows_over_the_line(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 203).astype(np.uint16)
    ours, reference = TokenWindows(write(tmp_path, ids), 16), TokenWindows(ids, 16)
    assert len(ours) == len(reference)
    for mine, theirs in zip(ours.batch(range(len(ours))), reference.batch(range(len(ours))), strict=True):
        assert mine.dtype == torch.int64 and torch.equal(mine, theirs)
    part = TokenWindows(ShardedTokens(tmp_path).part(50, 150), 16)
    assert torch.equal(part[2][1], TokenWindows(ids[50:150], 16)[2][1])


def test_a_loader_with_workers_takes_them(tmp_path):
    windows = TokenWindows(write(tmp_path, bytes(range(200)), 256), 8)
    windows[3]
    loader = torch.utils.data.DataLoader(windows, batch_size=4, num_workers=1)
    rows = torch.cat([inputs for inputs, _ in loader])
    assert torch.equal(rows, torch.stack([inputs for inputs, _ in windows]))


def test_a_pickle_holds_no_tokens(tmp_path):
    tokens = write(tmp_path, bytes(200) * 100, 256, shard_tokens=20_000, step=20_000)
    tokens[5:9]
    copy = pickle.loads(pickled := pickle.dumps(tokens))
    assert len(pickled) < 2000 and copy[19_990:].tolist() == [0] * 10


def test_few_maps_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardedTokens, "MAX_OPEN", 3)
    tokens = write(tmp_path, list(range(100)))
    assert not tokens._open, "nothing is opened before it is read"
    assert [int(tokens[i]) for i in range(100)] == list(range(100)) and len(tokens._open) == 3


@pytest.mark.parametrize("where", [slice(0, 9, 2), slice(9, 0, -1)])
def test_steps_are_refused(tmp_path, where):
    with pytest.raises(ValueError, match="step 1"):
        write(tmp_path, list(range(20)))[where]


def test_places_outside_the_line_are_refused(tmp_path):
    tokens = write(tmp_path, list(range(20)))
    for i in (20, -21):
        with pytest.raises(IndexError, match=f"token {i} of 20"):
            tokens[i]
    for a, b in ((-1, 5), (6, 5), (0, 21)):
        with pytest.raises(ValueError, match="does not lie within"):
            tokens.part(a, b)


# --- the writer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [65536, -1, 70_000])
def test_an_id_that_would_wrap_around_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 65536"):
        with ShardWriter(tmp_path, 65536) as writer:
            writer.add([1, 2])
            writer.add([3, bad])
    assert writer.total == 2 and not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("ids", [[1.0], [[1, 2]], ["a"], 7, [True]])
def test_only_a_line_of_integers(tmp_path, ids):
    with pytest.raises(ValueError, match="one line of integers"), ShardWriter(tmp_path, 256) as writer:
        writer.add(ids)


def test_a_finished_folder_is_refused_and_left_alone(tmp_path):
    before = write(tmp_path, [1, 2, 3])[:].tolist()
    with pytest.raises(FileExistsError, match="already holds finished shards"):
        ShardWriter(tmp_path, 256)
    assert ShardedTokens(tmp_path)[:].tolist() == before


def test_an_unfinished_folder_says_so_and_can_be_begun_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 256, shard_tokens=10) as writer:
        writer.add(bytes(35))
        raise KeyboardInterrupt
    with pytest.raises(
        FileNotFoundError, match="token shards but no index, so writing them was never finished"
    ):
        ShardedTokens(tmp_path)
    np.save(tmp_path / "tokens_mine.npy", np.arange(3))
    with ShardWriter(tmp_path, 256, shard_tokens=100) as writer:
        writer.add([5, 6])
    assert sorted(os.listdir(tmp_path)) == ["index.json", "tokens_00000.npy", "tokens_mine.npy"]
    (tmp_path / "tokens_mine.npy").unlink()
    assert ShardedTokens(tmp_path)[:].tolist() == [5, 6]


def test_nothing_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="no tokens were added"), ShardWriter(tmp_path, 256):
        pass


def test_closed_is_closed(tmp_path):
    with ShardWriter(tmp_path, 256) as writer:
        writer.add([1])
        writer.close()
    with pytest.raises(ValueError, match="is finished"):
        writer.add([2])


@pytest.mark.parametrize("sizes", [{"vocab_size": 0}, {"vocab_size": 9, "shard_tokens": 0}])
def test_impossible_sizes_are_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match="at least 1"):
        ShardWriter(tmp_path / "new", **sizes)
    assert not (tmp_path / "new").exists()


def test_the_index_is_written_last(tmp_path, monkeypatch):
    from tutorial_lib.data import shards

    seen = []
    monkeypatch.setattr(shards, "write_text", lambda path, text: seen.append(sorted(os.listdir(tmp_path))))
    with ShardWriter(tmp_path, 256, shard_tokens=2) as writer:
        writer.add([1, 2, 3])
    assert seen == [["tokens_00000.npy", "tokens_00001.npy"]]


# --- broken folders -----------------------------------------------------------------------------------------


def _remove(folder):
    (folder / "tokens_00001.npy").unlink()


def _truncate(folder):
    os.truncate(folder / "tokens_00001.npy", 130)


def _foreign(folder):
    np.save(folder / "mine.npy", np.arange(3))


def _no_json(folder):
    (folder / "index.json").write_text('{"format": 1, ')


def _no_list(folder):
    (folder / "index.json").write_text("[1]")


def _key(folder):
    _edit(folder, lambda index: index.pop("tokenizer"))


def _total(folder):
    _edit(folder, lambda index: index.update(total=4))


def _outside(folder):
    _edit(folder, lambda index: index["shards"][0].update(file="../x.npy"))


def _edit(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_remove, r"tokens_00001\.npy is missing"),
        (_truncate, r"tokens_00001\.npy has 130 bytes instead of 142"),
        (_foreign, r"holds mine\.npy, which the index does not list"),
        (_no_json, r"index\.json is no index of token shards"),
        (_no_list, r"index\.json is no index of token shards"),
        (_key, r"index\.json is no index of token shards"),
        (_total, r"index\.json is no index of token shards"),
        (_outside, r"index\.json is no index of token shards"),
    ],
)
def test_what_is_broken_is_named_in_one_sentence(tmp_path, harm, said):
    write(tmp_path, list(range(20)))
    harm(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        ShardedTokens(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_file_of_the_same_size_is_noticed_when_it_is_read(tmp_path):
    tokens = write(tmp_path, list(range(20)))
    np.save(tmp_path / "tokens_00001.npy", np.zeros(14, np.uint8))  # 14 bytes, too
    tokens[:7]
    with pytest.raises(ValueError, match=r"tokens_00001\.npy is not the shard"):
        ShardedTokens(tmp_path)[7:9]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_shards_at_all(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="holds no token shards"):
        ShardedTokens(tmp_path / name)


# --- memory -------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import numpy as np, torch
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shards import ShardedTokens

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

tokens = ShardedTokens(sys.argv[1])
windows = TokenWindows(tokens, 256)
windows.batch([0, 1])
before = anonymous()
for i in np.random.default_rng(0).integers(0, len(windows), 4000):
    windows[int(i)]
windows.batch(range(0, len(windows), len(windows) // 200))
print(len(tokens), anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_corpus_takes_little_memory(tmp_path):
    """240 MB of shards, sparse on disk; 4000 windows of it. Pages of the map are the system's to take back, so
    what counts is the process's own memory."""
    shard_tokens, n = 20_000_000, 6
    with ShardWriter(tmp_path, 50_000, shard_tokens=10) as writer:
        writer.add([0] * 10)
    listed = []
    for k in range(n):
        file = np.lib.format.open_memmap(
            tmp_path / f"tokens_{k:05d}.npy", mode="w+", dtype=np.uint16, shape=(shard_tokens,)
        )
        del file
        name = f"tokens_{k:05d}.npy"
        size = (tmp_path / name).stat().st_size
        listed.append({"file": name, "tokens": shard_tokens, "bytes": size})
    _edit(tmp_path, lambda index: index.update(shards=listed, total=n * shard_tokens))
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, grown = done.stdout.split()
    assert int(total) == 120_000_000
    assert float(grown) < 40, f"reading windows of 240 MB grew the process by {grown} MB"
