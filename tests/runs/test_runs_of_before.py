"""Runs and checkpoints of the commit before the house was rebuilt open, resume and end where they would have ended.

The fixture was written by commit 0e95721: two runs of 12 steps with the checkpoint of step 6 (`end.ckpt`: of step 12,
uninterrupted), and a model of each kind in a file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tutorial_lib.core.gpt import GPT
from tutorial_lib.core.model import Transformer
from tutorial_lib.interop.checkpoint import load_model
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.runs.config import load_config
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.train.checkpoints import load_tree

BEFORE = Path(__file__).resolve().parents[1] / "fixtures" / "runs_of_0e95721"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    shutil.copytree(BEFORE, tmp_path / "runs")
    shutil.move(tmp_path / "runs" / "plays.txt", tmp_path / "plays.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def leaves(tree, path=""):
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list)):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{name}")


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_run_goes_on_and_ends_where_it_would_have_ended(runs, name):
    outcome = pretrain(load_config(runs / name / "config.yaml"), resume=True)
    assert outcome.last is not None and outcome.last.step == 12
    wanted, header = load_tree(runs / name / "end.ckpt")
    tree, new_header = load_tree(runs / name / "step_00000012.ckpt")
    assert header["kind"] == new_header["kind"] and header["config"] == new_header["config"]
    expected, found = dict(leaves(wanted)), dict(leaves(tree))
    assert expected.keys() == found.keys()
    for path, tensor in expected.items():
        if not path.startswith("/rng"):
            assert torch.allclose(tensor.double(), found[path].double(), atol=1e-5), path
    assert tree["batches"] == wanted["batches"] and tree["progress"]["tokens"] == wanted["progress"]["tokens"]
    rows = (runs / name / "metrics.csv").read_text().splitlines()
    assert rows[0] == (BEFORE / name / "metrics.csv").read_text().splitlines()[0], "the columns changed"
    assert sum(row.startswith("6,") for row in rows) == 2, (
        "the log was not cut at the step that it goes on from"
    )


@pytest.mark.parametrize("name", ["muon/step_00000006.ckpt", "adamw/end.ckpt"])
def test_a_checkpoint_of_a_run_is_opened(runs, name):
    found = open_pretrained(runs / name)
    assert isinstance(found.model, Transformer) and found.tokenizer_name == "byte"
    assert found.about["run"]["train"]["steps"] == 12


def test_a_model_in_a_file_is_opened():
    model, about = load_model(BEFORE / "gpt.safetensors")
    assert type(model) is GPT and about == {"tokenizer": "byte", "step": 3}
    model, _ = load_model(BEFORE / "transformer.safetensors")
    assert type(model) is Transformer and model.config.rope_scaling.factor == 2.0
    assert model.config.window == (4, None) and model(torch.zeros(1, 8, dtype=torch.long)).isfinite().all()
