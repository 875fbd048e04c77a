"""The seams for later parts: another kind of model, another objective and other batches, with public names alone.

A toy mixture of experts with a balancing loss, a toy model with a scalar head trained on preference pairs, and a batch of
four tensors: each is trained, saved, resumed and evaluated.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.core.experts import Experts
from tutorial_lib import kinds
from tutorial_lib.cli.main import app
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.eval.held_out import held_out
from tutorial_lib.interop.checkpoint import load_model, model_header, save_model
from tutorial_lib.kinds import KINDS, grow, kind_named, kind_of, register
from tutorial_lib.runs.callbacks import judged
from tutorial_lib.runs.config import Config, ConfigError, load_config
from tutorial_lib.runs.parts import make_trainer
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.runs.run import Start, Work, carry_out
from tutorial_lib.runs.settings import model_config
from tutorial_lib.train.checkpoints import CheckpointError
from tutorial_lib.train.compiled import Compiled
from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.objective import Batch, NextToken
from tutorial_lib.train.optim import decay_groups
from tutorial_lib.train.trainer import DivergedError, Trainer

# --- a toy mixture of experts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyMoEConfig(ModelConfig):
    """A Transformer's, and how many experts there are."""

    n_experts: int = 4


class ToyMoE(Transformer):
    """A Transformer with experts for MLPs."""

    def __init__(self, config: ToyMoEConfig) -> None:
        super().__init__(
            config,
            lambda layer: Experts(config.d_model, 16, config.n_experts, bias=False, stacked=layer == 1),
        )


class Balanced(NextToken):
    """The next token, and a penalty on routers that are sure of themselves."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen: list[Tensor] = []
        routers = [m.router for m in model.modules() if isinstance(m, Experts)]
        hooks = [router.register_forward_hook(lambda *call: seen.append(call[-1])) for router in routers]
        try:
            plain, _ = super().loss(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        z = sum(scores.logsumexp(-1).square().sum() for scores in seen)
        return plain + 0.1 * z, {"loss": plain, "z_loss": z}


# --- a toy model that scores --------------------------------------------------------------------------------


class ToyScorer(Transformer):
    """One number for a text, read at its last token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.d_model, 1, bias=False)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`(B, T)` and `(B,)` to `(B,)`."""
        hidden = self.hidden(ids)
        return self.score(hidden[torch.arange(len(ids), device=ids.device), lengths - 1]).squeeze(-1)


class Preference:
    """Bradley–Terry on pairs; a batch is four tensors: the better text and its length, the worse and its length."""

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch[0]))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        better, better_length, worse, worse_length = batch
        margin = model(better, better_length) - model(worse, worse_length)
        return -F.logsigmoid(margin).sum(), {"accuracy": (margin > 0).sum()}


class Pairs:
    """N pairs of texts: the better one has more of the letter 1. (For `ShuffledBatches`.)"""

    def __init__(self, n: int, T: int = 12) -> None:
        generator = torch.Generator().manual_seed(n)
        texts = torch.randint(0, 2, (2, n, T), generator=generator)
        lengths = torch.randint(T // 2, T + 1, (2, n), generator=generator)
        texts[0] = torch.where(torch.rand(n, T, generator=generator) < 0.8, 1, texts[0])
        self.tensors = (texts[0], lengths[0], texts[1], lengths[1])

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices) -> Batch:
        return tuple(tensor[torch.as_tensor(indices)] for tensor in self.tensors)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The toys are known while a test runs, and not longer."""
    monkeypatch.setattr(kinds, "KINDS", KINDS)
    before = dict(KINDS)
    register(ToyMoEConfig, ToyMoE)
    register(ModelConfig, ToyScorer, writes=False)
    yield
    KINDS.clear()
    KINDS.update(before)


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = {
    "model": {"kind": "ToyMoE", "n_experts": 3, "d_model": 16, "n_heads": 2, "n_layers": 2},
    "train": {"batch_size": 4, "micro_batch_size": 3, "seq_len": 16, "steps": 8, "warmup_steps": 2, "lr": 3e-3,
              "eval_every": 4, "eval_windows": 4, "save_every": 4, "keep_last": 9, "device": "cpu"},
    "data": {"dataset": "text.txt"},
    "log": {"tensorboard": False, "every": 1, "name": "toy"},
}  # fmt: skip


def config_file(home: Path, **changes) -> Path:
    tables = {name: {**table, **changes.get(name, {})} for name, table in SMALL.items()}
    path = home / "toy.yaml"
    path.write_text(yaml.safe_dump(tables))
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- kinds --------------------------------------------------------------------------------------------------


def test_a_model_with_experts_is_saved_and_comes_back(tmp_path):
    model = ToyMoE(ToyMoEConfig(vocab_size=20, d_model=16, n_heads=2, n_layers=2, n_experts=5))
    path = save_model(tmp_path / "moe.safetensors", model, {"note": 1})
    again, about = load_model(path)
    assert type(again) is ToyMoE and again.config == model.config and about == {"note": 1}
    assert same(model, again) and any("blocks.1.mlp.down" == name for name in again.state_dict())


def test_what_its_configuration_cannot_make_again_is_not_saved(tmp_path):
    config = ModelConfig(vocab_size=20, d_model=16, n_heads=2, n_layers=1)
    with pytest.raises(ValueError, match=r"other weights than its configuration makes .blocks\.0\.mlp"):
        save_model(tmp_path / "x", Transformer(config, make_mlp=lambda layer: Experts(16, 16, 4)))

    class Unknown(Transformer):
        pass

    with pytest.raises(
        ValueError, match="a Unknown is no kind of model.*GPT, Transformer, .*ToyMoE.*register"
    ):
        save_model(tmp_path / "x", Unknown(config))
    assert not (tmp_path / "x").exists()


def test_a_file_of_a_kind_that_is_not_known_says_so(tmp_path):
    path = save_model(tmp_path / "moe.ckpt", ToyMoE(ToyMoEConfig(20, 8, 8, 2)))
    del KINDS["ToyMoE"]
    with pytest.raises(CheckpointError, match="no kind of model 'ToyMoE'.*GPT, Transformer"):
        load_model(path)


def test_a_name_belongs_to_one_class_but_a_cell_may_run_again():
    def cell() -> type:
        class Again(Transformer):
            pass

        return Again

    first, second = cell(), cell()
    register(ModelConfig, first)
    assert register(ModelConfig, second) is kind_named("Again") and KINDS["Again"].model is second
    with pytest.raises(ValueError, match="no kind"):
        kind_of(first(ModelConfig(8, 8, 8, 2, n_layers=1)))
    with pytest.raises(ValueError, match="there is a kind Transformer already"):
        register(ModelConfig, type("Transformer", (Transformer,), {}))


def test_a_configuration_speaks_of_the_settings_of_its_kind(home):
    config = load_config(config_file(home), ["model.n_experts=6"])
    assert model_config(config) == ToyMoEConfig(
        max_seq_len=16, d_model=16, n_heads=2, n_layers=2, n_experts=6
    )
    with pytest.raises(
        ConfigError, match="model.n_experts is a setting of a MoETransformer, and model.kind asks for"
    ):
        load_config(None, ["model.n_experts=6"])
    with pytest.raises(ConfigError, match="model.n_experts is 'many'"):
        load_config(config_file(home), ["model.n_experts=many"])
    with pytest.raises(ConfigError, match="did you mean 'ToyMoE'"):
        load_config(None, ["model.kind=ToyMOE"])


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_another_kind_resumes_to_the_same_bits(home, optimizer):
    """Pretraining, by its own command's function: the kind is a word in the configuration."""
    path = config_file(home, train={"optimizer": optimizer})
    whole = pretrain(load_config(path))
    assert whole.last.step == 8
    (home / "runs" / "toy" / "step_00000008.ckpt").rename(home / "whole.ckpt")
    again = pretrain(load_config(path), resume=True)
    assert again.last.step == 8
    ours, theirs = load_model(home / "runs/toy/step_00000008.ckpt")[0], load_model(home / "whole.ckpt")[0]
    assert type(ours) is ToyMoE and same(ours, theirs)
    plain = [
        "log.name=toy",
        "data.dataset=text.txt",
        "train.seq_len=16",
        "train.batch_size=4",
        "train.device=cpu",
    ]
    with pytest.raises(ConfigError, match="holds a ToyMoE, but the configuration asks for a Transformer"):
        pretrain(load_config(None, plain), resume=True)
    result = CliRunner().invoke(
        app, ["generate", "--ckpt", "runs/toy/latest.ckpt", "--prompt", "To", "--max-new-tokens", "5"]
    )
    assert result.exit_code == 0 and result.stdout.startswith("To")
    result = CliRunner().invoke(app, ["eval", "--model", "runs/toy/latest.ckpt", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["loss"] > 0


def balanced(config, start: Start) -> Work:
    """The run of a later part, as short as it may be: its own objective, everything else is there."""
    torch.manual_seed(config.train.seed)
    model = ToyMoE(model_config(config))
    ids = torch.randint(64, (9, 17), generator=torch.Generator().manual_seed(3))

    class Rows:
        def __len__(self) -> int:
            return len(ids)

        def batch(self, indices) -> Batch:
            rows = ids[torch.as_tensor(indices)]
            return rows[:, :-1], rows[:, 1:]

    rows = [(ids[:, :-1], ids[:, 1:])]
    batches = ShuffledBatches(Rows(), config.train.batch_size, seed=1)
    trainer = make_trainer(config, model, Balanced(), batches)
    header = model_header(model, {"tokenizer": "byte"})
    return Work(trainer, header, lambda judged: held_out(judged, rows, trainer.objective))


def test_a_penalty_is_learned_and_logged_and_does_not_pollute_the_loss(home):
    config = load_config(config_file(home))
    outcome = carry_out(config, balanced)
    steps = [row for row in rows_of(home / "runs/toy") if row["loss"]]
    looks = [row for row in rows_of(home / "runs/toy") if row["val_loss"]]
    assert len(steps) == 8 and len(looks) == 2
    assert all(float(row["z_loss"]) > 0 for row in steps) and all(
        float(row["val_z_loss"]) > 0 for row in looks
    )
    assert outcome.last.metrics.keys() == {"objective", "z_loss"}
    model, _ = load_model(home / "runs/toy/step_00000008.ckpt")
    ids = torch.randint(64, (9, 17), generator=torch.Generator().manual_seed(3))
    plain = lm_loss(model(ids[:, :-1]), ids[:, 1:]).item()
    assert outcome.val_loss == pytest.approx(plain, rel=1e-5), (
        "the reported loss is the one without the penalty"
    )
    assert float(steps[-1]["z_loss"]) < float(steps[0]["z_loss"]), "the penalty was not learned"


def scorer_run(config, start: Start) -> Work:
    torch.manual_seed(config.train.seed)
    model = ToyScorer(model_config(config))
    batches = ShuffledBatches(Pairs(48), config.train.batch_size, seed=2)
    trainer = make_trainer(config, model, Preference(), batches)
    header, held = model_header(model, {"tokenizer": "byte"}), [Pairs(40).batch(range(40))]
    return Work(trainer, header, lambda judged: held_out(judged, held, trainer.objective))


SCORER = {
    "model": {"kind": "ToyScorer", "vocab_size": 256, "n_layers": 1, "n_experts": None},
    "train": {"steps": 60, "batch_size": 8, "lr": 1e-2, "eval_every": 30, "save_every": 30},
    "log": {"name": "scorer"},
}


def scorer_config(home: Path):
    path = config_file(home, **SCORER)
    tables = yaml.safe_load(path.read_text())
    del tables["model"]["n_experts"]
    path.write_text(yaml.safe_dump(tables))
    return load_config(path)


def test_a_scalar_head_learns_preferences_from_batches_of_four_tensors_and_resumes(home):
    whole = carry_out(scorer_config(home), scorer_run)
    assert whole.val_loss < 0.55 < 0.6931, "it learned nothing: ln 2 is a coin"
    assert 0.5 < whole.last.metrics["accuracy"] <= 1
    (home / "runs/scorer/step_00000060.ckpt").rename(home / "whole.ckpt")
    again = carry_out(scorer_config(home), scorer_run, resume=True)
    assert again.val_loss == whole.val_loss
    ours, _ = load_model(home / "runs/scorer/step_00000060.ckpt")
    theirs, _ = load_model(home / "whole.ckpt")
    assert type(ours) is ToyScorer and same(ours, theirs)
    shared = Transformer(ours.config).state_dict().keys()
    assert ours.state_dict().keys() - shared == {"score.weight"}, "what is shared keeps its names"
    means = held_out(
        ours, [Pairs(40).batch(range(start, start + 8)) for start in range(0, 40, 8)], Preference()
    )
    assert means["loss"] == pytest.approx(whole.val_loss, rel=1e-5) and means["accuracy"] > 0.6


def test_a_model_that_only_scores_is_not_asked_to_write(home):
    carry_out(scorer_config(home), scorer_run)
    for command in (["generate", "--prompt", "a"], ["eval"], ["chat"]):
        result = CliRunner().invoke(app, [*command, "--model", "runs/scorer/latest.ckpt"])
        assert result.exit_code == 2 and "ToyScorer, which gives no scores for next tokens" in result.stderr
    result = CliRunner().invoke(app, ["export", "x.gguf", "--model", "runs/scorer/latest.ckpt"])
    assert result.exit_code == 2 and not (home / "x.gguf").exists()


@dataclass
class ScoreTable:
    """What a run of another sort may set."""

    bonus: float = 0.5
    """Added to every score."""


@dataclass
class ScorerRunConfig(Config):
    """A run with a table more."""

    score: ScoreTable = field(default_factory=ScoreTable)


def test_a_run_of_another_sort_has_a_table_of_its_own(home):
    config = load_config(config_file(home), ["score.bonus=2", "train.steps=3"], ScorerRunConfig)
    assert type(config) is ScorerRunConfig and (config.score.bonus, config.train.steps) == (2.0, 3)
    assert config.as_dict()["score"] == {"bonus": 2.0}
    for override, said in (
        ("score.bonu=1", "did you mean 'score.bonus'"),
        ("score.bonus=x", "score.bonus is 'x'"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(None, [override], ScorerRunConfig)
    with pytest.raises(ConfigError, match="no setting 'score.bonus'"):
        load_config(None, ["score.bonus=1"])


class Controller:
    """Something with a state that the rest of a run depends on: it counts the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, info) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_what_else_has_a_state_is_saved_and_given_back_and_may_judge_by_its_own_score(home):
    controllers = []

    def prepare(config, start: Start) -> Work:
        work, controller = scorer_run(config, start), Controller()
        controllers.append(controller)
        work.callbacks, work.also = (controller,), {"controller": controller}
        work.look = lambda judged: {"loss": -float(controller.steps), "gold": 1.0}
        return work

    config = scorer_config(home)
    outcome = carry_out(config, prepare)
    assert (outcome.best, outcome.val_loss) == (-60, -60) and rows_of(home / "runs/scorer")[-1][
        "val_gold"
    ] == "1.0"
    (home / "runs/scorer/step_00000060.ckpt").unlink()
    carry_out(config, prepare, resume=True)
    assert [controller.steps for controller in controllers] == [60, 60]


def test_a_model_grows_a_head_and_keeps_the_rest():
    torch.manual_seed(0)
    base = Transformer(ModelConfig(20, 8, 16, 2, n_layers=1))
    scorer = grow(base, kind_named("ToyScorer"))
    assert type(scorer) is ToyScorer and scorer.config == base.config
    for name, weight in base.state_dict().items():
        assert torch.equal(scorer.state_dict()[name], weight), name
    with pytest.raises(
        ValueError, match="a ToyMoE cannot take over blocks.0.mlp.* of a Transformer: there it is not there"
    ):
        grow(base, kind_named("ToyMoE"), n_experts=2)
    with pytest.raises(ValueError, match=r"tokens.weight \(20, 16\) .* there it has shape \(21, 16\)"):
        grow(base, kind_named("ToyScorer"), vocab_size=21)


def test_a_run_whose_batches_end_is_judged_and_saved_and_was_not_stopped(home):
    def prepare(config, start: Start) -> Work:
        work = scorer_run(config, start)
        work.trainer.batches = [Pairs(8).batch(range(8))] * 7
        return work

    outcome = carry_out(scorer_config(home), prepare)
    assert outcome.last.step == 7 and not outcome.stopped_early and outcome.val_loss is not None
    assert (home / "runs/scorer/best.ckpt").is_file()


def test_a_run_does_not_begin_with_another_kind_than_it_asks_for(home):
    pretrain(load_config(config_file(home)))
    with pytest.raises(ConfigError, match="model.kind is GPT, but train.init_from .* is a ToyMoE"):
        pretrain(load_config(None, ["train.init_from=runs/toy/latest.ckpt", "model.kind=GPT", "data.dataset=text.txt",
                                    "train.seq_len=16", "train.device=cpu", "log.name=other"]))  # fmt: skip
    outcome = pretrain(load_config(None, ["train.init_from=runs/toy/latest.ckpt", "data.dataset=text.txt", "log.name=on",
                                          "train.seq_len=16", "train.device=cpu", "train.steps=1", "train.warmup_steps=0",
                                          "log.tensorboard=false"]))  # fmt: skip
    assert type(load_model(outcome.folder / "latest.ckpt")[0]) is ToyMoE


def test_a_penalty_that_is_no_number_ends_the_run_before_anything_is_saved():
    class Broken(NextToken):
        def loss(self, model, batch):
            plain, _ = super().loss(model, batch)
            return plain * float("nan"), {"loss": plain}

    trainer, told = toy_trainer(Broken(), [four(4, 0)[:2]]), []
    with pytest.raises(DivergedError):
        trainer.run([told.append])
    assert not told


# --- objectives ---------------------------------------------------------------------------------------------


def toy_trainer(objective, batches, **options) -> Trainer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(16, 8, 16, 2, n_layers=1))
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-2)
    return Trainer(model, optimizer, batches, 6, objective=objective, **options)


def test_batches_may_be_made_when_they_are_asked_for():
    """What keeps reinforcement learning on policy: batch k is made by the model as it is after step k - 1."""
    seen: list[float] = []
    trainer = toy_trainer(NextToken(), ())

    def rollouts() -> Iterator[Batch]:
        while True:
            weight = trainer.model.blocks[0].mlp.down.weight
            seen.append(float(weight.detach().double().sum()))
            ids = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(len(seen)))
            yield ids[:, :-1], ids[:, 1:]

    after: list[float] = []
    trainer.batches = rollouts()
    trainer.run(
        [lambda info: after.append(float(trainer.model.blocks[0].mlp.down.weight.detach().double().sum()))]
    )
    assert len(after) == 6 and len(set(after)) == 6
    assert seen[1:6] == after[:5]


class FourTensors:
    """Weighted next tokens, from a base that shifts the scores: inputs, labels, weights and shifts."""

    def count(self, batch: Batch) -> Tensor:
        return (batch[2] > 0).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, labels, weights, shifts = batch
        each = lm_loss(model(inputs) + shifts[:, None], labels, reduction="none")
        return (each * weights).sum(), {"heavy": (weights > 0.5).sum()}


def four(rows: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids, weights = torch.randint(16, (rows, 9), generator=g), torch.rand(rows, 8, generator=g)
    return ids[:, :-1], ids[:, 1:], weights * (weights > 0.3), torch.randn(rows, 16, generator=g)


@pytest.mark.parametrize("size", [1, 2, 5, None])
def test_four_tensors_in_pieces_train_as_one(size):
    whole, pieces = (toy_trainer(FourTensors(), [], micro_batch_size=s) for s in (None, size))
    for seed in range(3):
        wanted, _ = whole.train_step(*four(5, seed))
        found, _ = pieces.train_step(*four(5, seed))
        assert found == pytest.approx(wanted, rel=1e-5)
        batch = four(5, seed)
        assert wanted["heavy"] == pytest.approx(float((batch[2] > 0.5).sum() / (batch[2] > 0).sum()))
    for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_held_out_is_judged_by_the_objective_whatever_the_batches():
    trainer = toy_trainer(FourTensors(), [])
    rows = four(7, 1)
    whole = held_out(trainer.model.train(), [rows], FourTensors())
    cut = held_out(trainer.model, zip(*(part.split(3) for part in rows), strict=True), FourTensors())
    assert cut == pytest.approx(whole, rel=1e-6) and trainer.model.training
    assert judged(trainer) is trainer.model
    with pytest.raises(ValueError, match="nothing in the held-out batches counts"):
        held_out(trainer.model, [(rows[0], rows[1], torch.zeros(7, 8), rows[3])], FourTensors())


def test_labels_that_do_not_count_do_not_count_when_held_out():
    model = Transformer(ModelConfig(16, 8, 16, 2, n_layers=1)).eval()
    ids = torch.randint(16, (4, 9))
    labels = ids[:, 1:].clone()
    labels[:, :5] = -100
    wanted = lm_loss(model(ids[:, :-1]), labels).item()
    assert held_out(model, [(ids[:, :-1], labels)], NextToken())["loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("objective", [NextToken(), FourTensors()], ids=["two tensors", "four tensors"])
def test_a_compiled_objective_is_one_graph_and_the_same_step(objective):
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    batch = four(4, 0)[: 2 if isinstance(objective, NextToken) else 4]
    plain, compiled = (
        toy_trainer(objective, []),
        toy_trainer(Compiled(objective, backend=look, fullgraph=True), []),
    )
    for _ in range(2):
        (found, norm), (wanted, wanted_norm) = compiled.train_step(*batch), plain.train_step(*batch)
        assert found == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(wanted_norm, rel=1e-4)
    calls = [getattr(node.target, "__name__", "") for node in graphs[0].graph.nodes]
    assert len(graphs) == 1 and "cross_entropy" in calls and "embedding" in calls


def test_the_fields_of_a_kind_and_of_a_table_are_the_same():
    for kind in KINDS.values():
        table = load_config(None, [f"model.kind={kind.name}"]).model
        assert asdict(table).keys() - {"kind"} == asdict(kind.config()).keys()
