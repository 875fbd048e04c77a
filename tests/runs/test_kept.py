"""Nothing that was trained is lost: saved before a look, kept when the end is asked for, and no folder of others written over."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest

from tutorial_lib.data import tar_shards
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.tar_shards import read_texts, write_tar_shards
from tutorial_lib.data.tar_stream import stream_batches
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.runs import pretrain as module
from tutorial_lib.runs.callbacks import Stopped
from tutorial_lib.runs.config import Config, ConfigError, load_config
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.runs.terminal import Stop
from tutorial_lib.train.checkpoints import load_tree, read_header
from tutorial_lib.train.trainer import Trainer

LINE = "To be, or not to be, that is the question. "


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.txt").write_text(LINE * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(*more: str) -> Config:
    return load_config(
        None,
        [
            *(
                "model.d_model=16",
                "model.n_heads=2",
                "model.n_layers=1",
                "train.batch_size=2",
                "train.seq_len=8",
            ),
            *("train.steps=4", "train.warmup_steps=0", "train.save_every=100", "train.eval_every=100"),
            *(
                "train.micro_batch_size=1",
                "train.eval_windows=8",
                "train.device=cpu",
                "data.dataset=text.txt",
            ),
            *("log.tensorboard=false", "log.name=run", *more),
        ],
    )


def steps_saved() -> list[int]:
    return sorted(int(path.stem[5:]) for path in Path("runs/run").glob("step_*.ckpt"))


# --- looks --------------------------------------------------------------------------------------------------


def test_what_was_trained_is_saved_before_it_is_looked_at(home, monkeypatch):
    """A kill in the middle of the last look loses nothing; the run that goes on makes up for the look."""
    real, found = module.held_out, []

    def killed(model, batches, objective):
        next(iter(batches))
        found.extend(steps_saved())
        raise MemoryError("the end")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(module, "held_out", killed)
        pretrain(small())
    assert found == [4] and read_header("runs/run/latest.ckpt")["val_loss"] == "null"
    outcome = pretrain(small(), resume=True)
    assert outcome.last is None and outcome.val_loss is not None
    assert float(read_header("runs/run/best.ckpt")["val_loss"]) == outcome.best == outcome.val_loss
    assert module.held_out is real
    whole = pretrain(small("log.name=whole"))
    assert whole.val_loss == outcome.val_loss


def test_a_look_shows_how_far_it_is_and_ends_within_a_batch(home, monkeypatch):
    seen, told = [], []

    def look(model, batches, objective):
        for n, _ in enumerate(batches, 1):
            seen.append(n)
            if n == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 1.0}

    real = Stop.through
    with monkeypatch.context() as patch:
        patch.setattr(module, "held_out", look)

        def through(self, items, of=None):
            self.looking = lambda done, total: told.append((done, total))
            return real(self, items, of)

        patch.setattr(Stop, "through", through)
        outcome = pretrain(small("train.eval_every=2"))
    assert seen == [1, 2, 3] and told == [(1, 8), (2, 8), (3, 8)]
    assert outcome.stopped_by == "SIGINT" and not outcome.stopped_early and steps_saved() == [2]
    assert pretrain(small("train.eval_every=2"), resume=True).last.step == 4
    rows = [row.split(",")[0] for row in Path("runs/run/metrics.csv").read_text().splitlines()]
    assert rows.count("2") == 1 and rows.count("4") == 2, "the look that was broken off was made after all"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_or_twice_leaves_the_checkpoint_that_was_promised(home, monkeypatch, capfd, presses):
    real = Trainer.train_step

    def step(self, *batch):
        if self.step == 1:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        return real(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", step)
    outcome = pretrain(small())
    said = " ".join(capfd.readouterr().err.split())
    assert outcome.stopped_by == "SIGINT" and steps_saved() == [2]
    assert "with a checkpoint" in said and ("a third Ctrl-C ends at once" in said) == (presses == 2)


def test_the_third_ctrl_c_insists():
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        for presses in range(1, 4):
            assert presses < 4
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked == "SIGINT"
    with pytest.raises(Stopped):
        next(stop.through([1]))


# --- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "tokenizer.json", "tensorboard", "wandb"])
@pytest.mark.parametrize("resume", [False, True])
def test_what_somebody_else_wrote_is_left_alone(home, name, resume):
    folder = Path("runs/run")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / name).write_text("mine, too")
    with pytest.raises(ConfigError, match=f"has a {name} that no run of ours wrote"):
        pretrain(small(), resume)
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "notes.txt"])
    assert (folder / name).read_text() == "mine, too"
    (folder / name).unlink()
    assert pretrain(small(), resume).last.step == 4 and (folder / "notes.txt").read_text() == "mine"


def test_a_run_that_ended_before_its_first_checkpoint_may_begin_again(home, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            "tutorial_lib.train.trainer.Trainer.train_step", lambda *a: (_ for _ in ()).throw(MemoryError())
        )
        pretrain(small())
    assert {"config.yaml", "metrics.csv"} <= {path.name for path in Path("runs/run").iterdir()}
    assert pretrain(small()).last.step == 4


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_folder_that_is_removed_while_the_run_writes_to_it_is_made_anew(
    home, monkeypatch, capfd, tensorboard
):
    (home / "tok").mkdir()
    BPETokenizer.train(LINE * 5, 262).save(home / "tok/t.json")
    real = Trainer.train_step

    def step(self, *batch):
        if self.step == 2:
            shutil.rmtree("runs/run")
        return real(self, *batch)

    crashed = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    monkeypatch.setattr(Trainer, "train_step", step)
    words = [
        "data.tokenizer=tok/t.json",
        "model.vocab_size=264",
        "log.every=1",
        f"log.tensorboard={tensorboard}",
    ]
    assert pretrain(small(*words)).last.step == 4
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("somebody removed runs/run") == 1 and not crashed and "Traceback" not in said
    assert "left out" not in said
    assert {"config.yaml", "tokenizer.json", "metrics.csv"} <= {
        path.name for path in Path("runs/run").iterdir()
    }
    assert open_pretrained("runs/run/latest.ckpt").tokenizer.vocab_size == 262
    rows = Path("runs/run/metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss") and rows[-2].startswith("4,")


# --- texts --------------------------------------------------------------------------------------------------


def test_another_text_of_the_same_length_is_noticed(home):
    pretrain(small("train.steps=2"))
    text = home / "text.txt"
    good = text.read_text()
    text.write_text(good.replace("be", "bo", 1))
    with pytest.raises(ConfigError, match="the text to train on is not the one that the run has read so far"):
        pretrain(small(), resume=True)
    text.write_text(good[:-5] + "xxxx.")
    with pytest.raises(ConfigError, match="the text to validate on is not the one"):
        pretrain(small(), resume=True)
    assert load_tree("runs/run/latest.ckpt")[0]["progress"]["step"] == 2
    text.write_text(good)
    assert pretrain(small(), resume=True).last.step == 4


def test_a_stream_leaves_pythons_own_generator_alone(home):
    """A run that goes on reads an epoch's files again: whatever they drew would be drawn twice."""
    pytest.importorskip("webdataset")
    write_tar_shards([f"{LINE}{n}" for n in range(9)], "tars", 3)
    stream = stream_batches("tars/*.tar", ByteTokenizer(["<|eos|>"]), 2, 16)
    random.seed(3)
    before = random.getstate()
    for _ in range(20):
        next(stream)
    assert random.getstate() == before
    with pytest.MonkeyPatch.context() as patch:  # as if they came from the web
        patch.setattr(tar_shards, "WEB", ("file:",))
        assert len(list(read_texts(f"file:{home}/tars/documents-00000.tar"))) == 3
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model:\n  d_model: 3\n train: [\n", "line 3"),
        ("model: {d_model: 3\ntrain: {}\n", "line 2"),
        ("a: 1\nb: 2\nb: 3\n", "line 3"),
        ("train:\n\tlr: 1\n", "line 2"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_yaml_names_the_line(home, content, said):
    Path("bad.yaml").write_text(content)
    with pytest.raises(ConfigError, match=f"bad.yaml is not YAML.*|{said}") as error:
        load_config("bad.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        "model.n_layers=999999", "model.vocab_size=10000000", "model.d_head=100000000", "model.max_seq_len=999999999",
        "train.batch_size=2147483648", "train.seq_len=999999999", "train.batch_size=9999999999999999999999",
    ],
)  # fmt: skip
def test_settings_that_would_take_for_ever_are_refused_at_once(home, setting):
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        small(setting)
    with pytest.raises(ConfigError, match="max_seq_len"):
        small("model.positions=sinusoidal", "model.rope=false", "model.max_seq_len=100000000")
