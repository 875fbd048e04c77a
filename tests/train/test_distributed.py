"""Two processes are one: DDP by hand, torch's DDP and FSDP2 train to the same weights as a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.train import distributed_worker as worker
from tutorial_lib.train.checkpoints import load_tree
from tutorial_lib.train.deepspeed_engine import deepspeed_config, deepspeed_trainer
from tutorial_lib.train.distributed import (
    agree,
    all_sum,
    any_of,
    barrier,
    gather_objects,
    gradient_sync,
    is_main,
    rank,
    shard_like,
    start,
    stop,
    unwrap,
    whole,
    world_size,
)
from tutorial_lib.train.parallel import parallelize

ROOT = Path(__file__).resolve().parents[2]
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)


def launch(script: str, *arguments: str) -> None:
    """Two processes on this machine; a free port is found by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def alone():
    """20 steps in one process."""
    torch.set_num_threads(1)
    curve, weights = worker.train(worker.make_trainer("none"))
    start = worker.make_model().state_dict()
    assert largest_difference(weights, start) > 0.01, "nothing was learned: the comparison would say nothing"
    return {"curve": curve, "weights": weights}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    launch(str(ROOT / "tests/train/distributed_worker.py"), str(folder))
    return {**load_tree(folder / "out.ckpt")[0], "folder": folder}


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("how", ["hand", "ddp", "fsdp"])
def test_two_processes_equal_one(how, alone, together):
    assert together["world"] == 2
    assert largest_difference(together[how]["weights"], alone["weights"]) < 1e-5
    curves = torch.tensor(together[how]["curve"]) - torch.tensor(alone["curve"])
    assert curves.shape == (worker.STEPS, 2) and curves.abs().max() < 1e-5


@needs_gloo
@pytest.mark.slow
def test_a_process_of_fsdp_holds_half(alone, together):
    total = sum(t.numel() for name, t in alone["weights"].items() if name != "head.weight")  # tied
    assert together["held"] == total // 2


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_fsdp_processes_resumes_on_two(how, alone, together):
    assert largest_difference(together[f"half {how}"]["weights"], alone["weights"]) < 1e-5
    assert len(together[f"half {how}"]["curve"]) == worker.STEPS // 2
    assert together[f"random {how}"].tolist() == [True, True], (
        "each process goes on with its own random numbers"
    )
    assert together["different"] == 2, "two processes must not draw the same dropout masks"


@needs_gloo
@pytest.mark.slow
def test_a_checkpoint_of_two_fsdp_processes_resumes_on_one(alone, together):
    trainer = worker.make_trainer("none")
    trainer.load_state_dict(load_tree(together["folder"] / "half.ckpt")[0])
    assert trainer.step == worker.STEPS // 2 and trainer.batches.seen == worker.BATCH * trainer.step
    curve, weights = worker.train(trainer)
    assert largest_difference(weights, alone["weights"]) < 1e-5
    assert torch.allclose(torch.tensor(curve), torch.tensor(alone["curve"][worker.STEPS // 2 :]), atol=1e-5)


@needs_gloo
@pytest.mark.slow
def test_processes_agree_on_numbers_wishes_and_first_weights(together):
    assert together["agree"] == [0.1, True, False]
    assert together["broadcast"].tolist() == torch.zeros(3, 3).tolist(), "the first process's weights"
    assert together["shard round trip"]


# --- one process is a world, too ----------------------------------------------------------------------------


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert start(torch.device("cpu")) == torch.device("cpu") and not dist.is_initialized()
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    tensor = torch.tensor([1.0, 2.0])
    assert all_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert gather_objects({"a": 1}) == [{"a": 1}] and agree(0.25) == 0.25
    assert any_of(True) is True and any_of(False) is False
    assert whole({"w": tensor, "n": [1, None]})["w"] is tensor and shard_like(tensor, tensor) is tensor
    barrier(), stop()


def test_parallelize_alone_and_with_a_slip():
    model = nn.Linear(2, 2)
    assert all(parallelize(model, how) is model for how in ("none", "ddp", "fsdp"))
    with pytest.raises(ValueError, match="unknown strategy 'dpp'"):
        parallelize(model, "dpp")


def test_unwrap_and_gradient_sync_of_a_plain_model():
    model = nn.Linear(2, 2)
    assert unwrap(model) is model
    with gradient_sync(model, False):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


# --- DeepSpeed ----------------------------------------------------------------------------------------------


@needs_gloo
@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed (the extra `deepspeed`)")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(str(ROOT / "tests/train/distributed_worker.py"), str(tmp_path), str(stage))
    out, _ = load_tree(tmp_path / "out.ckpt")
    assert largest_difference(out["weights"], alone["weights"]) < 1e-5
    assert largest_difference(out["resumed"], alone["weights"]) < 1e-5
    assert torch.allclose(torch.tensor(out["curve"]), torch.tensor(alone["curve"]), atol=1e-5)
    trainer = worker.make_trainer("none")  # and one process goes on with it, without DeepSpeed
    trainer.load_state_dict(load_tree(tmp_path / "half.ckpt")[0])
    _, weights = worker.train(trainer)
    assert largest_difference(weights, alone["weights"]) < 1e-5


def test_the_config_of_deepspeed():
    config = deepspeed_config(3, 4, None, torch.bfloat16, offload=True)
    assert config["zero_optimization"]["stage"] == 3 and config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["train_micro_batch_size_per_gpu"] == 4 and config["gradient_clipping"] == 0.0
    plain = deepspeed_config()
    assert (
        "bf16" not in plain and "fp16" not in plain and "offload_optimizer" not in plain["zero_optimization"]
    )
    with pytest.raises(ValueError, match="choose 1, 2 or 3"):
        deepspeed_config(4)
    with pytest.raises(ValueError, match="bfloat16"):
        deepspeed_config(dtype=torch.int8)


@pytest.mark.skipif(bool(find_spec("deepspeed")), reason="DeepSpeed is installed")
def test_without_deepspeed_one_sentence_names_the_extra():
    with pytest.raises(ModuleNotFoundError, match="pip install deepspeed$"):
        deepspeed_trainer(nn.Linear(2, 2), None, [], steps=1)


@pytest.mark.slow
@needs_gloo
def test_unequal_batches_that_end_at_unequal_times_hang_nobody(tmp_path):
    """All stop with the first whose batches end; a metric's mean is over all rows, whatever order they are named in."""
    launch(str(Path(worker.__file__).with_name("uneven_worker.py")), str(tmp_path))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["step"] for one in told] == [3, 3]
    for one in told:
        assert one["metrics"] == pytest.approx({"ones": 1.0, "twos": 2.0, "rank_of_a_row": 2 / 6})
