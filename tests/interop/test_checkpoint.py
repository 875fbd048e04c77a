"""Checkpoints: exact round trip; whatever is wrong with a file is said in one sentence; no code ever runs."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rope import RopeScaling
from tutorial_lib.interop.checkpoint import CheckpointError, load_model, model_header, save_model
from tutorial_lib.train.checkpoints import load_tree, save_tree

SMALL = {"vocab_size": 50, "max_seq_len": 16, "d_model": 32, "n_heads": 2, "n_layers": 2}


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip_is_exact(tmp_path, tie):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, tie_embeddings=tie)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    path = save_model(tmp_path / "a" / "m.safetensors", model, {"step": 7})
    again, about = load_model(path)
    ids = torch.randint(0, 50, (2, 16))
    assert about == {"step": 7} and again.config == model.config and not again.training
    assert torch.equal(again(ids), model(ids))
    assert (again.head.weight is again.tokens.weight) == tie


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_embeddings": False, "n_kv_heads": 1, "qk_norm": True},
        {"window": (4, None), "sinks": 2, "rope_scaling": RopeScaling("llama3", 8.0, 16)},
        {"rope": False, "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "logit_soft_cap": 15.0},
    ],
)
def test_the_modern_model_comes_back_as_it_was(tmp_path, more):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL, **more)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    again, _ = load_model(save_model(tmp_path / "m.safetensors", model))
    ids = torch.randint(0, 50, (2, 16))
    assert isinstance(again, Transformer) and again.config == model.config
    assert torch.equal(again(ids), model(ids))


def test_a_kind_that_nobody_knows(tmp_path):
    tree = {"model": {"a": torch.zeros(1)}}
    path = save_tree(tmp_path / "m.safetensors", tree, {"kind": "Mamba", "config": "{}"})
    assert "no usable model configuration" in sentence(path) and "Mamba" in sentence(path)


@pytest.fixture
def good(tmp_path):
    return save_model(tmp_path / "good.safetensors", GPT(GPTConfig(**SMALL)))


def sentence(path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    return str(error.value)


def test_a_missing_file_names_the_nearest(good):
    assert "beside it there is good.safetensors" in sentence(good.with_name("best.safetensors"))


@pytest.mark.parametrize("keep", [0, 5, 100, 5000])
def test_a_cut_file(good, keep):
    good.write_bytes(good.read_bytes()[:keep])
    assert "not a safetensors file, or was cut short" in sentence(good)


def test_a_pickle_is_never_opened(tmp_path):
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Hostile()))
    assert "is a pickle" in sentence(path)
    assert not ran.exists()


def test_wrong_tensors_are_named(good, tmp_path):
    tree, header = load_tree(good)
    header = {name: header[name] for name in ("kind", "config", "about")}
    path = tmp_path / "x.safetensors"

    def told(**changed) -> str:
        tensors = {n: changed.get(n, t) for n, t in tree["model"].items() if changed.get(n, t) is not None}
        return sentence(save_tree(path, {"model": tensors}, header))

    assert "'norm.weight' has shape (3,), the model needs (32,)" in told(**{"norm.weight": torch.ones(3)})
    assert "'norm.weight' is missing" in told(**{"norm.weight": None})
    assert "no usable model configuration" in sentence(save_tree(path, tree))
    assert "but no model" in sentence(save_tree(path, {"other": torch.ones(1)}, header))
    save_file({"a": torch.ones(1)}, path)
    assert "no checkpoint of this project" in sentence(path)


def test_an_average_of_the_weights_is_what_is_used(tmp_path):
    model = GPT(GPTConfig(**SMALL))
    average = torch.optim.swa_utils.AveragedModel(model)
    for parameter in average.parameters():
        torch.nn.init.constant_(parameter, 3.0)
    tree = {"model": model.state_dict(), "ema": average.state_dict()}
    path = save_tree(tmp_path / "m.ckpt", tree, model_header(model))
    assert (load_model(path)[0].norm.weight == 3.0).all()
    assert torch.equal(load_model(path, ema=False)[0].norm.weight, model.norm.weight)


def test_a_failed_save_leaves_the_old_file(good, monkeypatch):
    import tutorial_lib.train.checkpoints as module

    before = good.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(good, GPT(GPTConfig(**SMALL)))
    assert good.read_bytes() == before
    assert [p.name for p in good.parent.iterdir()] == ["good.safetensors"]


CLAIMS = {
    "layers": {"n_layers": 20_000},
    "some layers": {"n_layers": 4096},
    "a vocabulary": {"vocab_size": 10_000_000},
    "a large vocabulary": {"vocab_size": 1 << 22},
    "a width": {"d_model": 1 << 18},
    "a head": {"d_head": 1 << 40},
    "positions": {"max_seq_len": 1 << 27},
    "sines": {"max_seq_len": 1 << 27, "positions": "sinusoidal"},
    "an MLP": {"d_mlp": 1 << 50},
    "words": {"d_model": "many"},
    "a fraction": {"n_layers": 2.5},
    "less than nothing": {"n_heads": -2},
    "nothing": {"vocab_size": None},
    "a list": {"d_model": [32]},
    "a rope": {"rope_base": "x"},
    "a scaling": {"rope_scaling": {"kind": "llama3", "factor": "x"}},
    "another setting": {"n_experts": 9},
    "a switch in words": {"tie_embeddings": "x"},
    "an epsilon in words": {"norm_eps": "x"},
    "no epsilon": {"norm_eps": 0},
    "a dropout that is no number": {"dropout": float("nan")},
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("kind", [GPT, Transformer])
def test_what_a_header_claims_is_held_against_the_file_before_anything_is_built(
    tmp_path, monkeypatch, kind, claim
):
    config = GPTConfig(**SMALL) if kind is GPT else ModelConfig(**SMALL)
    model = kind(config)
    header = model_header(model)
    header["config"] = json.dumps({**json.loads(header["config"]), **CLAIMS[claim]})
    path = save_tree(tmp_path / "m.ckpt", {"model": model.state_dict()}, header)
    real = kind.__init__

    def planned(self, config):
        if not torch.empty(1).is_meta:  # outside of an outline
            pytest.fail("it was built")
        real(self, config)

    monkeypatch.setattr(kind, "__init__", planned)
    if claim == "positions" and kind is Transformer:  # RoPE has no table of them
        monkeypatch.undo()
        assert load_model(path)[0].config.max_seq_len == 1 << 27
        return
    said = sentence(path)
    assert "\n" not in said and str(path) in said and len(said) < len(str(path)) + 300


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        "x",
        {"model": []},
        {"model": {"a": 1}},
        {"model": {1: torch.ones(1)}},
        {"model": {}},
        {"model": None},
    ],
)
def test_a_tree_without_weights_is_refused(good, tmp_path, tree):
    _, header = load_tree(good)
    tree = tree if isinstance(tree, dict) else {"model": tree}
    assert sentence(save_tree(tmp_path / "x.ckpt", tree, {k: header[k] for k in ("kind", "config", "about")}))


@pytest.mark.parametrize(
    "about",
    [
        '{"run": {"data": "x"}}',
        '{"run": {"data": {}}}',
        '{"run": {"train": {"seq_len": "x"}}}',
        "[]",
        "5",
        '{"tokenizer": 3}',
        '{"run": []}',
        '{"tokenizer": {"a": 1}}',
        "{",
    ],
)
def test_notes_of_another_sort_are_refused(good, tmp_path, about):
    tree, header = load_tree(good)
    path = save_tree(
        tmp_path / "x.ckpt", tree, {"kind": header["kind"], "config": header["config"], "about": about}
    )
    assert sentence(path)
