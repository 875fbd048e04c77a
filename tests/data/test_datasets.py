"""One long line of tokens to batches: round trips, coverage, the shift, and nothing half-written."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib import files
from tutorial_lib.data import datasets
from tutorial_lib.data.datasets import TokenWindows, open_tokens, random_batches, write_tokens


def counting(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint16)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")],
)
def test_round_trip_in_the_smallest_type(tmp_path, vocab_size, dtype):
    ids = [0, 1, vocab_size // 2, vocab_size - 1]
    path = write_tokens(tmp_path / "new" / "ids.npy", ids, vocab_size)
    tokens = open_tokens(path)
    assert tokens.tolist() == ids and tokens.dtype == dtype
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert path.stat().st_size == 128 + 4 * tokens.dtype.itemsize, "a header and the ids, no more"


@given(ids=st.lists(st.integers(0, 299), max_size=50), as_array=st.booleans())
def test_round_trip_of_anything(ids, as_array, tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    write_tokens(path, np.array(ids, np.int32) if as_array else ids, 300)
    assert open_tokens(path).tolist() == ids


def test_bytes_are_ids(tmp_path):
    assert open_tokens(write_tokens(tmp_path / "a.npy", "né".encode(), 256)).tolist() == [110, 195, 169]


def test_a_path_may_be_text(tmp_path):
    assert open_tokens(str(write_tokens(str(tmp_path / "a.npy"), [1], 2))).tolist() == [1]


@pytest.mark.parametrize(("ids", "bad"), [([0, 256], 256), ([-1, 3], -1), ([-1, 999], 999)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, ids, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 256"):
        write_tokens(tmp_path / "ids.npy", ids, 256)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ids", [[1.0, 2.5], [[1, 2], [3, 4]], ["a", "b"], [True, False], 7])
def test_only_a_line_of_integers_is_written(tmp_path, ids):
    with pytest.raises(ValueError, match="one line of integers"):
        write_tokens(tmp_path / "ids.npy", ids, 256)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["half-way", "renaming"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    path = write_tokens(tmp_path / "ids.npy", [1, 2, 3], 256)

    def disk_full(file, array, **_):
        file.write(b"half of it")
        raise OSError("no space left on device")

    def cannot(*_):
        raise PermissionError("may not rename")

    if moment == "half-way":
        monkeypatch.setattr(datasets.np, "save", disk_full)
    else:
        monkeypatch.setattr(files.os, "replace", cannot)
    with pytest.raises(OSError, match="ids.npy"):  # which file, numpy alone would not say
        write_tokens(path, [9] * 1000, 256)
    assert os.listdir(tmp_path) == ["ids.npy"] and open_tokens(path).tolist() == [1, 2, 3]


@pytest.mark.parametrize("array", [np.zeros(4), np.zeros((2, 2), np.uint8), np.zeros(4, bool)])
def test_open_refuses_what_is_no_line_of_ids(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match="not a line of token ids"):
        open_tokens(tmp_path / "x.npy")


def test_open_never_unpickles(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        open_tokens(tmp_path / "x.npy")


# --- windows ------------------------------------------------------------------------------------------------

sizes = st.integers(1, 20).flatmap(lambda T: st.tuples(st.just(T), st.integers(T + 1, 200)))


@given(sizes)
def test_every_token_is_a_label_once(size):
    T, n = size
    labels = [label for _, labels in TokenWindows(counting(n), T) for label in labels.tolist()]
    left_over = (n - 1) % T
    assert labels == list(range(1, n - left_over))


@given(sizes, st.integers(1, 30))
def test_windows_are_slices_and_all_that_fit(size, stride):
    T, n = size
    tokens = np.random.default_rng(n).integers(0, 60000, n).astype(np.uint16)
    windows = TokenWindows(tokens, T, stride)
    starts = [s for s in range(0, n, stride) if s + T + 1 <= n]
    assert len(windows) == len(starts)
    for i, start in enumerate(starts):
        inputs, labels = windows[i]
        assert inputs.dtype == labels.dtype == torch.int64
        assert inputs.tolist() == tokens[start : start + T].tolist()
        assert labels.tolist() == tokens[start + 1 : start + T + 1].tolist()
        for mine, other in zip(windows[i - len(windows)], (inputs, labels), strict=True):
            assert torch.equal(mine, other), "negative numbers count from the end"


def test_batch_stacks_windows():
    windows = TokenWindows(counting(50), 8, stride=3)
    for indices in ([4, 0, 4], torch.tensor([4, 0, 4]), np.array([4, 0, 4])):
        inputs, labels = windows.batch(indices)
        assert inputs.shape == labels.shape == (3, 8)
        assert torch.equal(labels, inputs + 1) and inputs[:, 0].tolist() == [12, 0, 12]


def test_a_label_written_over_does_not_reach_the_inputs():
    tokens = counting(9)
    inputs, labels = TokenWindows(tokens, 8)[0]
    labels.fill_(-100)
    inputs.fill_(7)
    assert labels.tolist() == [-100] * 8 and tokens.tolist() == list(range(9))


def test_there_is_no_window_past_the_end():
    windows = TokenWindows(counting(17), 8)
    assert len(list(windows)) == 2, "iterating stops"
    for i in (2, -3):
        with pytest.raises(IndexError, match=f"window {i} of 2"):
            windows[i]


@pytest.mark.parametrize(
    ("n", "T", "stride"), [(8, 8, None), (0, 1, None), (9, 0, None), (9, 8, 0), (9, 8, -1)]
)
def test_impossible_windows_are_refused(n, T, stride):
    with pytest.raises(ValueError):
        TokenWindows(counting(n), T, stride)


def test_only_the_window_is_read():
    class Watched(np.ndarray):
        def __getitem__(self, key):
            seen.append(key)
            return super().__getitem__(key)

        def astype(self, dtype, *args, **kwargs):
            assert len(self) == 9, "the whole text was converted"
            return super().astype(dtype, *args, **kwargs)

    seen: list[slice] = []
    TokenWindows(counting(1000).view(Watched), 8)[3]
    assert seen == [slice(24, 33)]


def test_a_data_loader_takes_them():
    loader = torch.utils.data.DataLoader(TokenWindows(counting(33), 8), batch_size=2)
    inputs, labels = next(iter(loader))
    assert inputs.shape == (2, 8) and torch.equal(labels, inputs + 1)


# --- random batches -----------------------------------------------------------------------------------------


def test_random_batches_are_windows_of_the_text():
    for inputs, labels in itertools.islice(random_batches(counting(100), 4, 8), 20):
        assert inputs.shape == labels.shape == (4, 8) and inputs.dtype == torch.int64
        assert torch.equal(labels, inputs + 1) and torch.equal(inputs, inputs[:, :1] + torch.arange(8))


def test_every_place_can_come_first_and_last():
    batches = random_batches(counting(12), 16, 8, torch.Generator().manual_seed(0))
    first = {s for inputs, _ in itertools.islice(batches, 10) for s in inputs[:, 0].tolist()}
    assert first == {0, 1, 2, 3}


def test_a_generator_repeats_and_leaves_the_global_one_alone():
    def take(generator):
        return [inputs for inputs, _ in itertools.islice(random_batches(counting(999), 4, 8, generator), 3)]

    state = torch.get_rng_state()
    first = take(torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert all(map(torch.equal, first, take(torch.Generator().manual_seed(1))))
    assert not all(map(torch.equal, first, take(torch.Generator().manual_seed(2))))
    torch.manual_seed(3)
    one = take(None)
    torch.manual_seed(3)
    assert all(map(torch.equal, one, take(None))), "without one, the global seed decides"


def test_too_short_a_text_is_said():
    with pytest.raises(ValueError, match="8 tokens are too few for one window: seq_len 8 needs 9"):
        next(random_batches(counting(8), 1, 8))


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        header(b"(" * 9000),
        header(b"{'descr': '|O', 'fortran_order': False, 'shape': (5,)}\n"),
        header(b"{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000,)}\n"),
        header(b"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999,)}\n"),
        header(b"{'descr': '<u2', 'fortran_order': False, 'shape': (-5,)}\n") + bytes(100),
    ],
)
def test_what_is_no_token_file_is_refused(content, tmp_path):
    path = tmp_path / "tokens.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokens.npy is no .npy file of token ids"):
        open_tokens(path)
