"""Checkpoints with a valid digest whose tree somebody has altered: each is refused in a sentence, or harmless."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.runs.config import Config, ConfigError, load_config
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.tools.expect import Maybe, expect
from tutorial_lib.train.checkpoints import CheckpointError, load_tree, save_tree
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.trainer import DivergedError, Trainer

SETTINGS = [
    "model.d_model=8", "model.n_heads=2", "model.n_layers=1", "train.batch_size=2", "train.seq_len=8",
    "train.warmup_steps=0", "train.eval_windows=2", "train.eval_every=2", "train.device=cpu", "train.ema=0.5",
    "data.dataset=text.txt", "log.tensorboard=false",
]  # fmt: skip


def deep(levels: int) -> Any:
    """A list in a list in a list …"""
    node: Any = 0
    for _ in range(levels):
        node = [node]
    return node


PLAIN = [None, "x", True, -1, 10**30, math.nan, math.inf, 0.5, [], {}, [[]], deep(40), {"a": {"b": 1}}]
TENSORS = [
    torch.tensor(0.5),
    torch.zeros(0),
    torch.ones(3, 3),
    torch.tensor([-1]),
    torch.zeros(2, dtype=torch.cfloat),
]
GONE = object()


def paths(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """To every branch and every leaf."""
    if path:
        yield path
    if isinstance(node, (dict, list, tuple)):
        keys = node if isinstance(node, dict) else range(len(node))
        for key in itertools.islice(keys, 3 if len(path) > 1 and len(node) > 12 else None):
            yield from paths(node[key], (*path, key))


def altered(tree: dict, path: tuple, value: Any) -> dict:
    tree = copy.deepcopy(tree)
    *way, last = path
    node: Any = tree
    for key in way:
        if isinstance(node[key], tuple):
            node[key] = list(node[key])
        node = node[key]
    if value is GONE:
        del node[last]
    else:
        node[last] = copy.deepcopy(value)
    return tree


def configured(name: str, steps: int, optimizer: str, *more: str) -> Config:
    settings = [*SETTINGS, f"log.name={name}", f"train.steps={steps}", f"train.optimizer={optimizer}"]
    return load_config(None, [*settings, *more])


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 30, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(name: str, tree: dict, header: dict[str, str], optimizer: str = "adamw") -> str | None:
    """The sentence with which going on from this tree is refused; None if the run went on."""
    folder = Path("runs", name)
    for path in folder.glob("*"):
        path.unlink()
    save_tree(folder / "step_00000002.ckpt", tree, header)
    try:
        pretrain(configured(name, 3, optimizer), resume=True)
    except (ConfigError, CheckpointError, DivergedError) as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return str(error)
    return None


def tried(tree: dict, under: tuple = ()) -> Iterator[tuple[tuple, Any, dict]]:
    """Each place with a third of the values, and all of them met all together."""
    values = [*PLAIN, *TENSORS]
    for n, path in enumerate(path for path in paths(tree) if path[: len(under)] == under):
        for value in [GONE, *values[n % 3 :: 3]]:
            yield path, value, altered(tree, path, value)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_altered_state_of_a_trainer_is_refused_or_harmless(optimizer):
    def fresh() -> Trainer:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(vocab_size=31, max_seq_len=8, d_model=16, n_heads=2, n_layers=1))
        batches = ShuffledBatches(TokenWindows(np.arange(300) % 31, 8), batch_size=2, seed=1)
        return Trainer(model, build_optimizer(model, optimizer), batches, steps=3, ema=0.5)

    good = fresh()
    good.run([lambda info: info.step == 2])
    state = copy.deepcopy(good.state_dict())
    refused = total = 0
    trainer = fresh()
    for path, value, bad in tried(state):
        total += 1
        trainer.optimizer.state.clear()
        try:
            trainer.load_state_dict(bad)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300
            continue
        except Exception as error:
            raise AssertionError(f"{path} = {value!r:.60}: {type(error).__name__}: {error}") from error
        with suppress(DivergedError):
            trainer.run()
            trainer.state_dict()
    assert total > 300 and refused > 0.7 * total, f"{refused} of {total} refused"
    trainer.load_state_dict(state)
    assert trainer.run().step == 3


def test_every_altered_state_of_what_is_beside_a_trainer_is_refused_or_harmless(home, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    pretrain(configured("good", 2, "adamw"))
    tree, header = load_tree("runs/good/latest.ckpt")
    assert outcome("same", tree, header) is None
    refused = total = 0
    for path, value, bad in tried(tree, ("callbacks",)):
        total += 1
        try:
            refused += outcome("bad", bad, header) is not None
        except Exception as error:
            raise AssertionError(f"{path} = {value!r:.60}: {type(error).__name__}: {error}") from error
    assert total > 40 and refused > 0.5 * total, f"{refused} of {total} refused"


HEADERS = {
    "kind": ["Mamba", "", "[]", "GPT"],
    "config": [
        "",
        "[]",
        "{",
        "null",
        '"x"',
        '{"n_layers": 20000}',
        '{"vocab_size": 1e7}',
        "[" * 9999,
    ],
}


@pytest.mark.parametrize("key", HEADERS)
def test_every_altered_header_is_refused(home, key):
    pretrain(configured("good", 2, "adamw"))
    tree, header = load_tree("runs/good/latest.ckpt")
    for value in HEADERS[key]:
        assert outcome("bad", tree, {**header, key: value}), value
    del header[key]
    assert outcome("bad", tree, header)


def test_what_is_wrong_is_named(home):
    pretrain(configured("good", 2, "adamw"))
    tree, header = load_tree("runs/good/latest.ckpt")

    def said(path: str, value: Any) -> str | None:
        return outcome("bad", altered(tree, tuple(path.split("/")), value), header)

    assert "state.progress.step is -1, but must be a whole number from 0 on" in said("progress/step", -1)
    assert "state has no model" in said("model", GONE)
    assert "state.model.norm.weight is a tensor (2,) of float32, but must be a tensor (8,)" in said(
        "model/norm.weight", torch.ones(2)
    )
    assert "callbacks.evaluate.best is nan, but must be a number" in said("callbacks/evaluate/best", math.nan)
    words = tree["rng"][0]["numpy"].clone()
    words[-1] = 10**6  # numpy itself would read there
    assert "rng.numpy holds numbers that no generator has" in outcome(
        "bad", altered(tree, ("rng", 0, "numpy"), words), header
    )
    result = outcome("bad", tree, header, "muon")
    assert "has train.optimizer changed?" in result


def test_a_tree_is_looked_through():
    wanted = {"n": int, "x": float, "name": Maybe(str), "left": [int], "w": torch.zeros(2), "like": 3}
    good = {"n": 0, "x": 1, "name": None, "left": [1, 2], "w": torch.ones(2, dtype=torch.float64), "like": 4}
    expect(good, wanted, "it")
    expect({name: value for name, value in good.items() if name != "name"}, wanted, "it")
    for name, value, sentence in [
        ("n", True, "it.n is True, but must be a whole number from 0 on"),
        ("n", 2**63, "it.n is a number beyond 2\\^63"),
        ("x", math.nan, "it.x is nan, but must be a number"),
        ("x", "1", "it.x is '1', but must be a number"),
        ("name", 1, "it.name is 1, but must be a text"),
        ("left", (1,), r"it.left is \(1,\), but must be a list"),
        ("left", [1, -1], r"it.left\[1\] is -1"),
        (
            "w",
            torch.ones(2, dtype=torch.int64),
            r"it.w is a tensor \(2,\) of int64, but must be a tensor \(2,\) of float32",
        ),
        ("like", "4", "it.like is '4', but must be a whole number"),
        ("more", 1, "it has 'more', which is no part of it"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            expect({**good, name: value}, wanted, "it")
    with pytest.raises(ValueError, match="it is a list, but must be a table"):
        expect([], wanted, "it")
