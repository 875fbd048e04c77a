"""A model with experts trains like any other: in two processes as in one, resumed as uninterrupted, from the command line."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.moe import distributed_worker as worker
from tests.train.test_distributed import ROOT, largest_difference, launch, needs_gloo
from tutorial_lib.cli.main import app
from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.sampler import generate
from tutorial_lib.interop.checkpoint import load_model
from tutorial_lib.kinds import kind_named
from tutorial_lib.moe.balance import expert_load
from tutorial_lib.moe.model import MOE_PRESETS, MoEConfig, MoETransformer
from tutorial_lib.moe.upcycle import upcycle
from tutorial_lib.quant.int8 import to_int8
from tutorial_lib.runs.config import ConfigError, load_config
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.runs.settings import model_config, new_model
from tutorial_lib.tools.accounting import count_parameters
from tutorial_lib.train.balance import routers_of
from tutorial_lib.train.checkpoints import load_tree
from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.muon import muon_groups

# --- two processes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(str(ROOT / "tests/moe/distributed_worker.py"), str(folder))
    return load_tree(folder / "out.ckpt")[0]


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    curve, weights = worker.train(*worker.make_trainer("none"))
    assert largest_difference(weights, worker.make_model().state_dict()) > 0.01
    assert weights["blocks.1.mlp.router.bias"].abs().max() > 0
    return curve, weights


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_equal_one_balancing_loss_and_bias_included(how, alone, together):
    assert largest_difference(together[how]["weights"], alone[1]) < 1e-5
    curves = torch.tensor(together[how]["curve"]) - torch.tensor(alone[0])
    assert curves.shape == (worker.STEPS, 6) and curves.abs().max() < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_is_uninterrupted_bit_for_bit(optimizer):
    torch.set_num_threads(1)
    _, whole = worker.train(*worker.make_trainer("none", optimizer))
    trainer, nudge = worker.make_trainer("none", optimizer)
    worker.train(trainer, nudge, worker.STEPS // 2)
    state = trainer.state_dict()
    resumed, nudge = worker.make_trainer("none", optimizer)
    resumed.load_state_dict(state)
    _, weights = worker.train(resumed, nudge)
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_recomputed_blocks_give_the_same_step():
    from tutorial_lib.train.recompute import recompute_blocks

    found = []
    for recompute in (False, True):
        trainer, nudge = worker.make_trainer("none")
        if recompute:
            recompute_blocks(trainer.model.blocks)
        curve, weights = worker.train(trainer, nudge, 3)
        found.append((curve, weights, nudge.load))
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(found[1][0]), rtol=1e-5, atol=1e-6)
    assert largest_difference(found[0][1], found[1][1]) < 1e-6


# --- the model ----------------------------------------------------------------------------------------------


def model_of(**more) -> MoETransformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "max_seq_len": 48, "d_model": 32, "n_heads": 4, "n_layers": 3, "d_expert": 24}
    return MoETransformer(MoEConfig(**shape | more)).eval()


@pytest.mark.parametrize(
    "more", [{}, {"window": 8}, {"dense_first": 1, "n_shared_experts": 2}, {"capacity_factor": 0.5}]
)
def test_cached_is_uncached(more):
    """Without a capacity, which no model has in eval mode, a token's experts do not depend on anybody else."""
    model, ids = model_of(**more), torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache(2, 20)
        pieces = [model(ids[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
        alone = torch.cat([model(row[None]) for row in ids])
        torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-4)
    written = torch.stack(list(generate_cached(model, ids[:, :5], 6, temperature=0)), dim=1)
    assert torch.equal(written, torch.stack(list(generate(model, ids[:, :5], 6, temperature=0)), dim=1))


def test_a_capacity_lets_other_rows_matter():
    """Why it is for training alone."""
    model, ids = model_of(capacity_factor=0.5).train(), torch.randint(64, (2, 20))
    assert not torch.allclose(model(ids)[1], model(ids[1:])[0], atol=1e-3)


def test_which_layers_have_experts():
    for more, wanted in (
        ({}, [True, True, True, True]),
        ({"moe_every": 2}, [False, True, False, True]),
        ({"dense_first": 1}, [False, True, True, True]),
        ({"moe_every": 2, "dense_first": 2}, [False, False, False, True]),
    ):
        model = model_of(n_layers=4, **more)
        found = [hasattr(block.mlp, "router") for block in model.blocks]
        assert found == wanted == [model.config.has_experts(layer) for layer in range(4)]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"moe_every": 2, "n_shared_experts": 2, "mlp": "gelu", "d_mlp": 40},
        {"d_expert": None, "tie_embeddings": False, "qk_norm": True, "norm": "layernorm"},
    ],
)
def test_the_accounting_counts_what_is_there(more):
    model = model_of(**more)
    kind = kind_named("MoETransformer")
    counts = count_parameters(kind.shape(model.config))
    assert counts["total"] == model.num_params()
    E, K = model.config.n_experts, model.config.experts_per_token
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert counts["active"] == counts["total"] - experts // E * (E - K)


@pytest.mark.parametrize("name, total", [("mixtral-8x7b", 46_702_792_704), ("qwen3-30b-a3b", 30_532_122_624)])
def test_the_presets_have_every_parameter(name, total):
    kind = kind_named("MoETransformer")
    assert kind.outline(MOE_PRESETS[name]).num_params() == total
    assert count_parameters(kind.shape(MOE_PRESETS[name]))["total"] == total


def test_what_experts_add_to_the_stream_begins_small_and_muon_has_the_stacks():
    model = model_of(d_model=64, d_expert=64, n_layers=4, n_shared_experts=1)
    layer = model.blocks[0].mlp
    for weight, wanted in (
        (layer.experts.up, 0.02),
        (layer.router.weight, 0.02),
        (layer.experts.down, 0.02 / 8**0.5),
        (layer.shared.down.weight, 0.02 / 8**0.5),
    ):
        assert weight.std().item() == pytest.approx(wanted, rel=0.1)
    muon = {id(p) for group in muon_groups(model, 0.02, 1e-3) if group["muon"] for p in group["params"]}
    assert {id(layer.experts.up), id(layer.router.weight)} <= muon


def test_int8_leaves_the_router_and_stays_close():
    model, ids = model_of(n_shared_experts=1), torch.randint(64, (2, 30))
    with torch.no_grad():
        plain = model(ids)
        small = to_int8(model)
        assert small.blocks[0].mlp.router.weight.dtype == torch.float32
        assert small.blocks[0].mlp.experts.up.weight.dtype == torch.int8
        torch.testing.assert_close(small(ids), plain, atol=0.02, rtol=0.1)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"experts_per_token": 9}, "experts_per_token is 9, but there are only 8 experts"),
        ({"experts_per_token": 1}, "renormalize must be false"),
        ({"n_experts": 0}, "n_experts is 0, but must be at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, but must be above 0"),
        ({"moe_every": 5}, "none of the 3 layers has experts"),
        ({"bias": True}, "bias must be false"),
        ({"aux_loss_coef": -0.1}, "aux_loss_coef is -0.1, but must not be negative"),
        ({"z_loss_coef": float("nan")}, "z_loss_coef is nan"),
        ({"d_expert": 0}, "d_expert is 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(more, said):
    with pytest.raises(ValueError, match=said):
        model_of(**more)


# --- upcycling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"experts_per_token": 3, "n_experts": 5}, {"moe_every": 2}, {"mlp": "gelu", "norm": "layernorm"}],
)
def test_an_upcycled_model_starts_where_the_dense_one_is(more):
    torch.manual_seed(0)
    dense = {name: more.pop(name) for name in ("mlp", "norm") if name in more}
    model = Transformer(ModelConfig(64, 32, 32, 4, 2, 3, qk_norm=True, **dense))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(64, (4, 33))
    grown = upcycle(model, **more)
    with torch.no_grad():
        losses = [lm_loss(m(ids[:, :-1]), ids[:, 1:]).item() for m in (model, grown)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    router = routers_of(grown)[-1]
    assert expert_load(router.routing.experts, router.n_experts).min() > 0, (
        "every expert gets to see something"
    )
    loss = lm_loss(grown(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    gate = grown.blocks[1].mlp.experts.up.grad
    assert not torch.allclose(gate[0], gate[1]), "they would never part"


@pytest.mark.parametrize("more", [{"renormalize": False}, {"n_shared_experts": 1}, {"d_expert": 16}])
def test_what_would_not_be_the_same_function_is_not_upcycled(more):
    model = Transformer(ModelConfig(64, 32, 32, 4, n_layers=1))
    with pytest.raises(ValueError, match=f"{next(iter(more))} is .*, but experts that are copies"):
        upcycle(model, **more)


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    return tmp_path


def config_file(home: Path, **model) -> Path:
    tables = {
        "model": {"kind": "MoETransformer", "d_model": 32, "n_heads": 4, "n_layers": 2, "d_expert": 24, **model},
        "train": {"steps": 8, "batch_size": 4, "seq_len": 32, "eval_every": 4, "save_every": 4, "device": "cpu",
                  "warmup_steps": 2, "optimizer": "muon"},
        "data": {"dataset": "text.txt"},
        "log": {"name": "experts", "every": 1, "tensorboard": False},
    }  # fmt: skip
    path = home / "experts.yaml"
    path.write_text(yaml.safe_dump(tables))
    return path


@pytest.mark.parametrize(
    "more", [{"bias_update_speed": 0.01, "aux_loss_coef": 0.0}, {"capacity_factor": 1.0}]
)
def test_a_run_with_experts_is_trained_resumed_judged_and_writes(home, more):
    path = config_file(home, **more)
    pretrain(load_config(path))
    folder = home / "runs/experts"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    steps = [row for row in rows if row["loss"]]
    assert all(float(row["max_load"]) >= 1 and float(row["balance_loss"]) > 0 for row in steps)
    assert any(row["val_max_load"] for row in rows) and (
        ("dropped" in steps[0]) == ("capacity_factor" in more)
    )
    whole, _ = load_model(folder / "step_00000008.ckpt")
    if "bias_update_speed" in more:
        assert routers_of(whole)[0].bias.abs().max() >= 0.01
    (folder / "step_00000008.ckpt").unlink()
    assert pretrain(load_config(path), resume=True).last.step == 8
    again, _ = load_model(folder / "step_00000008.ckpt")
    assert type(again) is MoETransformer and all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    runner = CliRunner()
    done = runner.invoke(
        app, ["generate", "--ckpt", str(folder / "latest.ckpt"), "--prompt", "To", "--max-new-tokens", "5"]
    )
    assert done.exit_code == 0 and done.stdout.startswith("To")
    done = runner.invoke(app, ["eval", "--ckpt", str(folder / "latest.ckpt"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["loss"] > 0
    talk = ["chat", "--ckpt", str(folder / "latest.ckpt"), "--max-new-tokens", "5", "--seed", "1"]
    done = runner.invoke(app, talk, input="To be\n")
    assert done.exit_code == 0 and done.stdout.strip(), done.output
    done = runner.invoke(app, ["train", "--config", str(path), "--dry-run"])
    assert done.exit_code == 0 and "parameters: active" in done.output and "parameters: router" in done.output


def test_a_wrong_setting_is_a_sentence(home):
    done = CliRunner().invoke(app, ["train", "--config", str(config_file(home)), "model.n_expert=4"])
    assert done.exit_code == 2 and "did you mean 'model.n_experts'" in done.stderr
    done = CliRunner().invoke(app, ["train", "--config", str(config_file(home)), "model.experts_per_token=1"])
    assert (
        done.exit_code == 2 and "renormalize must be false" in done.stderr and "Traceback" not in done.stderr
    )


def test_a_dense_checkpoint_goes_on_with_experts(home):
    dense = ["model.d_model=32", "model.n_heads=4", "model.n_layers=2", "train.seq_len=32", "train.batch_size=4",
             "train.device=cpu", "data.dataset=text.txt", "log.tensorboard=false"]  # fmt: skip
    pretrain(load_config(None, [*dense, "log.name=dense", "train.steps=6", "train.warmup_steps=0"]))
    go_on = ["train.init_from=runs/dense/latest.ckpt", "train.steps=1", "train.warmup_steps=0", "train.lr=1e-9",
             "log.name=grown", *dense[3:]]  # fmt: skip
    grown = ["model.kind=MoETransformer", "model.n_experts=4"]
    outcome = pretrain(load_config(None, [*go_on, *grown]))
    model, _ = load_model(outcome.folder / "latest.ckpt")
    before, _ = load_model(home / "runs/dense/latest.ckpt")
    assert type(model) is MoETransformer and model.config.n_experts == 4 and model.config.d_model == 32
    ids = torch.randint(97, 120, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), before(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="d_expert is 7, but experts that are copies of an MLP need None"):
        pretrain(load_config(None, [*go_on, *grown, "model.d_expert=7", "log.name=other"]))
    with pytest.raises(ConfigError, match="model.d_model is 64, but train.init_from"):
        pretrain(load_config(None, [*go_on, *grown, "model.d_model=64", "log.name=other"]))


def test_the_shipped_configuration_is_sound(monkeypatch):
    config = load_config(ROOT / "configs/moe.yaml")
    assert asdict(model_config(config))["n_experts"] >= 8
    assert type(new_model(config)) is MoETransformer
