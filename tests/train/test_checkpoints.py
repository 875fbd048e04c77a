"""Checkpoints: trees there and back, damage and malice refused in one sentence, and runs that go on as if nothing was."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import tutorial_lib.train.checkpoints as module
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.checkpoints import CheckpointError, load_tree, read_header, save_tree
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.trainer import DivergedError, Trainer
from tutorial_lib.train.trees import flatten, unflatten


@pytest.fixture(autouse=True)
def a_quick_disk(monkeypatch):
    monkeypatch.setattr(module.os, "fsync", lambda handle: None)  # no power cut is played here


# --- trees --------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64]  # fmt: skip


@st.composite
def tensors(draw) -> Tensor:
    """Any type; no dimension, none of its elements, or not in order in memory."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 50
    tensor = values.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and tensor.ndim > 1:
        tensor = tensor.transpose(0, -1)
    if draw(st.booleans()) and tensor.ndim:
        tensor = tensor[::2]
    return tensor


keys = st.one_of(st.text(max_size=4), st.integers(-3, 3), st.sampled_from(["a.b", "a", "b", "__metadata__"]))
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))


@st.composite
def trees(draw) -> dict:
    some = draw(st.lists(tensors(), min_size=1, max_size=4))
    shared = st.sampled_from(
        some + [t.reshape(-1) for t in some]
    )  # the same one again, and views of its memory
    leaves = st.one_of(plain, shared, tensors())
    inner = st.recursive(
        leaves,
        lambda kids: st.one_of(
            st.dictionaries(keys, kids, max_size=4), st.lists(kids, max_size=4), st.tuples(kids, kids)
        ),
        max_leaves=12,
    )
    return draw(st.dictionaries(keys, inner, max_size=5))


def same(a, b) -> bool:
    """Equal in kind, in order, and to the last bit; a NaN equals a NaN."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return pickle.dumps(a.tolist()) == pickle.dumps(b.tolist())  # NaNs too
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) for x, y in zip(a, b, strict=True)) and all(
            same(a[k], b[k]) for k in a
        )  # fmt: skip
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(trees())
def test_any_tree_comes_back_through_json(tree):
    found, skeleton = flatten(tree)
    assert same(unflatten(found, json.loads(json.dumps(skeleton))), tree)


@given(trees())
@settings(max_examples=60)
def test_any_tree_comes_back_from_a_file(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("t") / "a.ckpt"
    save_tree(path, tree, {"note": "é\n"})
    got, header = load_tree(path)
    assert same(got, tree) and header["note"] == "é\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    for branch in tree:
        if isinstance(branch, str):
            assert same(load_tree(path, only=branch)[0], tree[branch])


def test_a_tied_tensor_is_stored_once_and_stays_tied(tmp_path):
    weight = torch.randn(50, 8)
    one = save_tree(tmp_path / "one.ckpt", {"model": {"tokens": weight, "head": weight}})
    two = save_tree(tmp_path / "two.ckpt", {"model": {"tokens": weight, "head": weight.clone()}})
    assert two.stat().st_size - one.stat().st_size > 0.9 * weight.nbytes
    tree = load_tree(one)[0]["model"]
    assert tree["tokens"].data_ptr() == tree["head"].data_ptr()


def test_what_is_loaded_does_not_depend_on_the_file_any_more(tmp_path):
    path = save_tree(tmp_path / "a.ckpt", {"w": torch.ones(2000)})
    tree = load_tree(path)[0]
    with open(path, "rb+") as file:
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    assert torch.equal(tree["w"], torch.ones(2000))


@pytest.mark.parametrize(
    "tree",
    [{"a": object()}, {"a": {1, 2}}, {"a": b"bytes"}, {"a": np.zeros(2)}, {1.5: 0}, {("a",): 0}, {None: 0}],
)
def test_what_no_checkpoint_holds_is_refused_before_anything_is_written(tmp_path, tree):
    with pytest.raises(TypeError):
        save_tree(tmp_path / "a.ckpt", tree)
    assert not list(tmp_path.iterdir())


# --- damage -------------------------------------------------------------------------------------------------


def example(path: Path) -> dict:
    tree = {
        "model": {"w": torch.randn(5, 3), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
        },
        "progress": {"step": 3},
    }
    save_tree(path, tree, {"config": '{"d_model": 8}'})
    return tree


def refused(path: Path, **options) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_tree(path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(path) in sentence and len(sentence) < 400 + len(str(path))
    return sentence


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, bytes, dict]:
    path = tmp_path_factory.mktemp("good") / "a.ckpt"
    tree = example(path)
    return path, path.read_bytes(), tree


@settings(max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(good, data):
    path, content, tree = good
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(
        st.one_of(
            st.integers(0, 7), st.integers(8, header_end - 1), st.integers(header_end, len(content) - 1)
        )
    )
    damaged = bytearray(content)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    bad = path.with_name("bad.ckpt")
    bad.write_bytes(damaged)
    try:
        assert same(load_tree(bad)[0], tree), f"byte {place}: another tree"
    except CheckpointError:
        refused(bad)


@pytest.mark.slow
def test_every_single_bit(good):
    path, content, tree = good
    bad, harmless = path.with_name("each.ckpt"), 0
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            bad.write_bytes(damaged)
            try:
                assert same(load_tree(bad)[0], tree), f"byte {place}, bit {bit}: another tree"
                harmless += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
    assert harmless == 0, f"{harmless} bits do not matter"


@settings(max_examples=100)
@given(data=st.data())
def test_a_file_that_was_cut_short_or_goes_on_is_refused(good, data):
    path, content, _ = good
    bad = path.with_name("cut.ckpt")
    length = data.draw(st.integers(0, len(content) - 1))
    bad.write_bytes(content[:length])
    refused(bad)
    bad.write_bytes(content + bytes(data.draw(st.integers(1, 20))))
    refused(bad)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory, content):
    bad = tmp_path_factory.mktemp("any") / "bad.ckpt"
    bad.write_bytes(content)
    refused(bad)
    bad.write_bytes(struct.pack("<Q", len(content)) + content)
    refused(bad)


def test_a_missing_file_names_its_neighbor(tmp_path):
    assert "makes one" in refused(tmp_path / "a.ckpt")
    example(tmp_path / "other.ckpt")
    assert "beside it there is other.ckpt" in refused(tmp_path / "a.ckpt")
    assert "there is no checkpoint" in refused(tmp_path)
    assert "holds model, optimizer, progress, but no ema" in refused(tmp_path / "other.ckpt", only="ema")


# --- malice -------------------------------------------------------------------------------------------------


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def signed(path: Path, tensors: dict[str, Tensor], tree: str) -> Path:
    """A file whose digest is right: only somebody who means it makes such a one."""
    about = {"tree": tree}
    about["sha256"] = module._digest(about, tensors.__getitem__, list(tensors))
    save_file(tensors, path, metadata=about)
    return path


def tensor_entry(*offsets: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "absurd length": (b"{}", b"", 2**60),
    "negative length": (b"{}", b"", 2**64 - 1),
    "longer than the file": (b"{}", b"", 90_000_000),
    "overlapping": (
        json.dumps({"a": tensor_entry(0, 8), "b": tensor_entry(4, 12)}).encode(),
        bytes(12),
        None,
    ),
    "negative offsets": (json.dumps({"a": tensor_entry(-8, 0)}).encode(), bytes(8), None),
    "past the end": (json.dumps({"a": tensor_entry(0, 8000, shape=(2000,))}).encode(), bytes(8), None),
    "a hole": (json.dumps({"a": tensor_entry(4, 12)}).encode(), bytes(12), None),
    "absurd shape": (json.dumps({"a": tensor_entry(0, 8, shape=(2**62, 8))}).encode(), bytes(8), None),
    "unknown type": (json.dumps({"a": tensor_entry(0, 8, dtype="PY")}).encode(), bytes(8), None),
    "same name twice": (
        b'{"a":%s,"a":%s}' % ((json.dumps(tensor_entry(0, 8)).encode(),) * 2),
        bytes(8),
        None,
    ),
    "nested deeply": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"", None),
    "not a dict": (b"[1, 2]", b"", None),
    "metadata that is no text": (b'{"__metadata__":{"tree":[1]}}', b"", None),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_is_refused(tmp_path, what):
    header, data, length = HEADERS[what]
    refused(raw(tmp_path / "bad.ckpt", header, data, length))


TREES = {
    "no JSON": "{",
    "a number": "5",
    "a list": "[]",
    "text": '"tree"',
    "a plain list as root": '{"list": [1, 2]}',
    "no dict in dict": '{"dict": 3}',
    "a dict of text": '{"dict": "abcd"}',
    "no pairs": '{"dict": [1, 2]}',
    "keys that are no keys": '{"dict": [[[1], 2]]}',
    "two kinds": '{"dict": [["a", {"list": [], "tuple": []}]]}',
    "an empty node": '{"dict": [["a", {}]]}',
    "unknown kind": '{"dict": [["a", {"object": ["os", "system"]}]]}',
    "a bare list": '{"dict": [["a", [1]]]}',
    "a tensor that is not there": '{"dict": [["a", {"tensor": "gone"}]]}',
    "a tensor with a list for a name": '{"dict": [["a", {"tensor": ["w"]}]]}',
    "nested deeply": '{"dict": [["a", ' + '{"list": [' * 20_000 + "]}" * 20_000 + "]]}",
    "a number of 5000 digits": '{"dict": [["a", ' + "9" * 5000 + "]]}",
}


@pytest.mark.parametrize("what", TREES)
def test_a_hostile_tree_with_the_right_digest_is_refused(tmp_path, what):
    path = signed(tmp_path / "bad.ckpt", {"w": torch.ones(2)}, TREES[what])
    if what == "a number of 5000 digits" and not hasattr(sys, "get_int_max_str_digits"):
        return
    refused(path)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "torch", "old torch"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, protocol):
    mark, path = tmp_path / "mark", tmp_path / "step_00000009.ckpt"
    bomb = {"model": Bomb(mark)}
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=protocol == "torch")
    sentence = refused(path)
    assert protocol == 0 or "is a pickle" in sentence  # protocol 0 is plain text and looks like nothing
    with pytest.raises(CheckpointError):
        read_header(path)
    assert not mark.exists()
    folder = CheckpointFolder(tmp_path)
    folder.save(8, {"a": 1})
    tree, _, taken = folder.newest(warn=lambda sentence: None)
    assert tree == {"a": 1} and taken.name == "step_00000008.ckpt" and not mark.exists()
    pickle.loads(pickle.dumps(bomb))
    assert mark.is_dir()  # it would have run


def test_a_header_whose_length_looks_like_a_pickle_is_not_called_one(tmp_path):
    header = json.dumps({"__metadata__": {"note": "x" * 9000}}).encode()
    header += b" " * (0x280 + 0x8000 - len(header))
    assert struct.pack("<Q", len(header))[:2] == b"\x80\x82"
    assert "no checkpoint of this project" in refused(raw(tmp_path / "a.ckpt", header))
    header = header[:60].ljust(0x480)  # 80 04, as pickle's protocol 4
    assert "pickle" not in refused(raw(tmp_path / "a.ckpt", header))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
def test_absurd_claims_take_no_memory(tmp_path):
    paths = [str(raw(tmp_path / f"{i}.ckpt", *spec)) for i, spec in enumerate(HEADERS.values())]
    code = """
import resource, sys
from tutorial_lib.train.checkpoints import CheckpointError, load_tree
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_tree(path)
        sys.exit(1)
    except CheckpointError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 200_000  # KiB


# --- the folder ---------------------------------------------------------------------------------------------


def names(folder: CheckpointFolder) -> list[int]:
    return sorted(int(p.stem[5:]) for p in folder.files())


def step_of(path: Path) -> int:
    return int(read_header(path)["step"])


@given(
    losses=st.lists(
        st.one_of(st.none(), st.floats(), st.sampled_from([1.0, 2.0, 0.0])), min_size=1, max_size=9
    ),
    keep_last=st.integers(1, 3),
    keep_best=st.integers(0, 3),
)
@settings(max_examples=40)
def test_what_is_kept(tmp_path_factory, losses, keep_last, keep_best):
    folder = CheckpointFolder(tmp_path_factory.mktemp("f"), keep_last, keep_best)
    for step, loss in enumerate(losses, 1):
        folder.save(step, {"step": step}, loss=loss)
    # All steps at once: what is among the best of all was among the best of those before it.
    known = [(loss, -s) for s, loss in enumerate(losses, 1) if loss is not None and math.isfinite(loss)]
    best = [-s for _, s in sorted(known)[:keep_best]]
    last = range(max(1, len(losses) - keep_last + 1), len(losses) + 1)
    assert names(folder) == sorted({*best, *last})
    assert step_of(folder.folder / "latest.ckpt") == len(losses)
    if best:
        assert step_of(folder.folder / "best.ckpt") == best[0]
    else:
        assert not (folder.folder / "best.ckpt").exists()
    tree, header, path = folder.newest()
    assert tree == {"step": len(losses)} and header["step"] == str(len(losses)) and path in folder.files()
    assert not [p for p in folder.folder.iterdir() if p.name.startswith(".")]


def test_a_folder_that_is_not_there_has_nothing(tmp_path):
    folder = CheckpointFolder(tmp_path / "run")
    assert folder.newest() is None and folder.files() == [] and not folder.folder.exists()
    for wrong in ({"keep_last": 0}, {"keep_best": -1}):
        with pytest.raises(ValueError, match="newest checkpoint has to stay"):
            CheckpointFolder(tmp_path, **wrong)


def test_steps_beyond_eight_digits_and_strangers(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=3, keep_best=0)
    (tmp_path / "step_best.ckpt").write_text("a stranger")
    (tmp_path / "step_1.ckpt.damaged").write_text("damaged")
    for step in (99_999_999, 100_000_000, 100_000_001):
        folder.save(step, {"step": step}, loss=torch.tensor(1.5))
    assert [p.name for p in folder.files()] == [
        f"step_{s}.ckpt" for s in (100_000_001, 100_000_000, 99_999_999)
    ]
    assert folder.newest()[0] == {"step": 100_000_001}
    assert (tmp_path / "step_best.ckpt").exists()


def test_a_damaged_one_is_put_aside_and_the_one_before_is_taken(tmp_path):
    folder, heard = CheckpointFolder(tmp_path, keep_last=3), []
    for step in (1, 2, 3):
        folder.save(step, {"step": step})
    os.truncate(tmp_path / "step_00000003.ckpt", 100)
    (tmp_path / "step_00000002.ckpt").write_bytes(b"\x80\x04pickle")
    tree, _, path = folder.newest(warn=heard.append)
    assert tree == {"step": 1} and path.name == "step_00000001.ckpt"
    assert len(heard) == 2 and all(s.endswith("; trying the one before it") and "\n" not in s for s in heard)
    assert load_tree(tmp_path / "latest.ckpt")[0] == {"step": 1}
    assert names(folder) == [1] and len(list(tmp_path.glob("*.damaged"))) == 2
    assert folder.newest(warn=pytest.fail)[0] == {"step": 1}


def test_all_damaged_is_an_error_every_time(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        os.truncate(folder.save(step, {"step": step}), 50)
    for _ in range(2):  # a second try must not start from nothing, silently
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
            folder.newest(warn=lambda sentence: None)


def test_disks_without_links_get_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(module.os, "link", refuse)
    folder = CheckpointFolder(tmp_path, keep_last=1, keep_best=1)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        folder.save(step, {"step": step}, loss=loss)
    assert step_of(tmp_path / "latest.ckpt") == 3 and step_of(tmp_path / "best.ckpt") == 1
    assert (tmp_path / "latest.ckpt").stat().st_nlink == 1
    assert len(list(tmp_path.iterdir())) == 4


def test_links_take_no_space(tmp_path):
    CheckpointFolder(tmp_path).save(1, {"w": torch.ones(5)}, loss=1.0)
    assert (tmp_path / "best.ckpt").stat().st_nlink == 3
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "latest.ckpt")


def test_what_the_dead_left_is_swept_and_what_the_living_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = CheckpointFolder(tmp_path)
    (tmp_path / f".step_00000001.ckpt.abc.{dead.pid}").mkdir()
    (tmp_path / f".step_00000001.ckpt.abc.{dead.pid}" / "half").write_text("half")
    (tmp_path / f".latest.ckpt.{dead.pid}").write_text("half")
    (tmp_path / f".latest.ckpt.{os.getpid()}").write_text("half")
    living = tmp_path / f".step_00000001.ckpt.abc.{os.getppid()}"
    living.mkdir()
    folder.save(2, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [living.name, "latest.ckpt", "step_00000002.ckpt"]


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"a": 1})

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.save(2, {"a": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.ckpt", "step_00000001.ckpt"]
    assert folder.newest()[0] == {"a": 1}


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"a": 1}, loss=2.0)
    folder.save(1, {"a": 2}, loss=3.0)
    assert names(folder) == [1] and load_tree(tmp_path / "best.ckpt")[0] == {"a": 2}


# --- the trainer --------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, 31, 300).astype(np.uint8)


def build(kind: str = "adamw", seed: int = 0, steps: int = 12, **options) -> Trainer:
    torch.manual_seed(seed)
    shape = {"vocab_size": 31, "max_seq_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 1, "dropout": 0.1}
    model = Transformer(ModelConfig(**shape))
    batches = ShuffledBatches(TokenWindows(TOKENS, 8), batch_size=4, seed=1)
    return Trainer(model, build_optimizer(model, kind, lr=5e-3), batches, steps, **options)


def content(trainer: Trainer) -> dict:
    """The state without the time, as a copy."""
    state = copy.deepcopy(trainer.state_dict())
    state["progress"].pop("seconds")
    return state


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumed_equals_uninterrupted(tmp_path, kind, dtype, ema):
    def fresh(seed: int = 0) -> Trainer:
        precision = Precision(dtype=dtype, init_scale=2.0**12, growth_interval=3)
        return build(kind, seed, precision=precision, ema=ema, micro_batch_size=3)

    whole, infos = fresh(), []
    whole.run([lambda info: torch.rand(1) and None, infos.append])

    first, again = fresh(), []
    first.run([lambda info: torch.rand(1) and None, again.append, lambda info: info.step == 5])
    save_tree(tmp_path / "a.ckpt", first.state_dict())
    second = fresh(seed=9)  # whatever it starts with is replaced
    second.load_state_dict(load_tree(tmp_path / "a.ckpt")[0])
    second.run([lambda info: torch.rand(1) and None, again.append])

    assert same(content(second), content(whole))
    told = [(i.step, i.loss, i.grad_norm, i.lr, i.tokens, i.progress) for i in infos]
    assert told == [(i.step, i.loss, i.grad_norm, i.lr, i.tokens, i.progress) for i in again]
    assert [i.step for i in again] == list(range(1, 13))
    assert all(a.seconds < b.seconds for a, b in zip(again, again[1:], strict=False))
    if dtype == torch.float16:
        assert whole.precision.state_dict()["scale"] != 2.0**12  # it moved, and is part of what came back


def test_each_part_of_the_state_is_needed():
    """Leave one out, and the end is another: no part of the comparison above is idle."""
    whole = build(ema=0.9)
    whole.run()
    first = build(ema=0.9)
    first.run([lambda info: info.step == 5])
    state = content(first) | {"progress": first.state_dict()["progress"]}
    weights = [p.detach().clone() for p in whole.model.parameters()]

    def ends_equal(without: str | None) -> bool:
        second = build(seed=9, ema=0.9)
        fresh = second.state_dict()
        second.load_state_dict(copy.deepcopy({**state, **({without: fresh[without]} if without else {})}))
        second.run()
        pairs = zip(second.model.parameters(), weights, strict=True)
        return all(torch.equal(p, q) for p, q in pairs) and same(
            second.state_dict()["ema"], whole.state_dict()["ema"]
        )

    assert ends_equal(None)
    assert [n for n in ("model", "optimizer", "batches", "rng", "progress", "ema") if ends_equal(n)] == []


def test_a_run_goes_on_where_a_callback_stopped_it_and_ends_once():
    trainer, told = build(), []
    assert trainer.run([told.append, lambda info: info.step in (3, 7)]).step == 3
    assert trainer.run([told.append, lambda info: info.step in (3, 7)]).step == 7
    last = trainer.run([told.append])
    assert last.step == 12 and last.progress == 1.0 and last.tokens == 12 * 4 * 8
    assert [info.step for info in told] == list(range(1, 13))
    assert trainer.run([pytest.fail]) is None


def test_time_ends_a_run_and_counts_across_lives():
    trainer = build(max_seconds=1e-9)
    assert trainer.run().step == 1
    again = build(max_seconds=1e-9)
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert again.run() is None
    longer = build(max_seconds=1e9)
    longer.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert longer.run().step == 12


def test_data_that_run_out_end_a_run():
    trainer = build()
    trainer.batches = [next(trainer.batches) for _ in range(3)]
    assert trainer.run().step == 3
    assert trainer.state_dict()["batches"] is None


def test_a_diverged_run_says_so():
    trainer = build()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"the loss is nan at step 1 .*lower train.lr") as caught:
        trainer.run([pytest.fail])
    assert "\n" not in str(caught.value)


def test_changed_data_are_refused_and_nothing_is_loaded():
    first = build()
    first.run([lambda info: info.step == 2])
    second = build(seed=4)
    before = content(second)
    second.batches = ShuffledBatches(TokenWindows(TOKENS[:200], 8), batch_size=4, seed=1)
    with pytest.raises(ValueError, match="windows was"):
        second.load_state_dict(first.state_dict())
    assert same({**content(second), "batches": 0}, {**before, "batches": 0})


def test_an_average_can_begin_later():
    first = build()
    first.run([lambda info: info.step == 4])
    second = build(seed=3, ema=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run([lambda info: info.step == 5])
    pairs = zip(second.ema.module.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)  # its first member is the first step that it saw
