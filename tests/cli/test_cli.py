"""The commands: what is asked for happens; whatever is wrong is one sentence, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tutorial_lib.cli.main import app
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.tar_shards import write_tar_shards
from tutorial_lib.interop.checkpoint import load_model, save_model
from tutorial_lib.runs.config import ConfigError, load_config
from tutorial_lib.runs.terminal import Stop
from tutorial_lib.train.checkpoints import load_tree

ROOT = Path(__file__).resolve().parents[2]
PLAN = """\
model: {d_model: 256, n_heads: 4, n_layers: 8, d_mlp: 1024, vocab_size: 50257, rope: true, norm: rmsnorm}
train: {batch_size: 32, seq_len: 256, steps: 20000, lr: 3e-4, warmup_steps: 500, weight_decay: 0.1, grad_clip: 1.0, amp: true}
data: {tokenizer: byte, dataset: "data/tiny_text/*.txt"}
log: {wandb: true, project: "wincode-llm-scratch"}
"""
"""The original plan's `configs/tiny.yaml`, as written."""
SMALL = {
    "model": {"d_model": 32, "n_heads": 2, "n_layers": 2, "dropout": 0.1},
    "train": {"batch_size": 4, "micro_batch_size": 2, "seq_len": 32, "steps": 12, "warmup_steps": 2,
              "lr": 3e-3, "eval_every": 4, "eval_windows": 4, "save_every": 3, "ema": 0.9},
    "data": {"dataset": "data/tiny_text/*.txt"},
    "log": {"tensorboard": False, "every": 1},
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a text and a configuration, to work in."""
    folder = tmp_path / "data" / "tiny_text"
    folder.mkdir(parents=True)
    line = "To be, or not to be, that is the question. Whether 'tis nobler in the mind to suffer.\n"
    for name in "ab":
        (folder / f"{name}.txt").write_text(line * 60, encoding="utf-8")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def shell(*words: str, cwd: Path, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_train_eval_generate(home):
    result = run("train", "--config", "small.yaml")
    assert result.exit_code == 0, result.output
    made = {path.name for path in Path("runs/small").iterdir()}
    assert {"config.yaml", "metrics.csv", "latest.ckpt", "best.ckpt", "step_00000012.ckpt"} <= made
    assert not [name for name in made if name.startswith(".")]
    rows = Path("runs/small/metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,grad_norm,lr,tokens") and len(rows) >= 13
    assert load_config("runs/small/config.yaml").model.d_model == 32, "a run can be repeated from its folder"

    result = run("eval", "--ckpt", "runs/small/latest.ckpt", "--split", "val", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item(), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / 0.6931472, rel=1e-4)
    assert "bits per byte" in run("eval", "--ckpt", "runs/small/best.ckpt", "--max-windows", "2").stdout

    words = ["generate", "--ckpt", "runs/small/latest.ckpt", "--prompt", "WinCode LLM says:", "--seed", "3"]
    words += ["--temperature", "0.7", "--top_p", "0.9", "--max_new_tokens", "60"]
    first, again = run(*words), run(*words)
    assert first.exit_code == 0 and first.stdout.startswith("WinCode LLM says:")
    assert first.stdout == again.stdout and len(first.stdout) > 30
    assert run(*words[:-1], "0").stdout == "WinCode LLM says:\n"


def test_resuming_is_as_if_nothing_had_happened(home, monkeypatch):
    assert run("train", "-c", "small.yaml", "log.name=whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "__call__", lambda self, info: info.step == 5)
        assert run("train", "-c", "small.yaml", "log.name=parts").exit_code == 0
    assert load_tree("runs/parts/latest.ckpt")[0]["progress"]["step"] == 5
    Path("runs/parts/latest.ckpt").unlink()  # only a second name
    result = run("train", "-c", "small.yaml", "log.name=parts", "--resume")
    assert result.exit_code == 0 and "going on from" in result.output
    whole, parts = (load_tree(f"runs/{name}/latest.ckpt")[0] for name in ("whole", "parts"))
    for branch in ("model", "ema"):
        for name, tensor in whole[branch].items():
            assert torch.equal(tensor, parts[branch][name]), name
    assert whole["callbacks"] == parts["callbacks"]
    lines = [Path(f"runs/{name}/metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[row.split(",")[:4] for row in table if row.split(",")[1]] for table in lines]
    assert losses[0] == losses[1], "the table has every step once"


def test_a_damaged_checkpoint_is_passed_over(home):
    assert run("train", "-c", "small.yaml", "train.steps=6").exit_code == 0
    newest = Path("runs/small/step_00000006.ckpt")
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.unlink()  # latest.ckpt is another name of the same file
    newest.write_bytes(data)
    result = run("train", "-c", "small.yaml", "train.steps=8", "--resume")
    assert result.exit_code == 0 and "damaged" in result.output and "Traceback" not in result.output
    assert load_tree("runs/small/latest.ckpt")[0]["progress"]["step"] == 8


def test_a_folder_with_a_run_is_not_written_over(home):
    assert run("train", "-c", "small.yaml", "train.steps=3").exit_code == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    result = run("train", "-c", "small.yaml")
    assert result.exit_code == 2 and "--resume" in result.output and "log.name" in result.output
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    result = run("train", "-c", "small.yaml", "model.n_layers=3", "--resume")
    assert result.exit_code == 2 and "n_layers=2" in result.output and "says 3" in result.output


def test_settings_of_a_resumed_run_are_its_own(home):
    assert run("train", "-c", "small.yaml", "train.steps=3").exit_code == 0
    words = ["train.steps=5", "train.weight_decay=0.5", "train.lr=1e-5", "train.schedule=constant"]
    assert run("train", "-c", "small.yaml", *words, "train.warmup_steps=0", "--resume").exit_code == 0
    groups = load_tree("runs/small/latest.ckpt")[0]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.5, 1e-5), (0.0, 1e-5)]


def test_a_warmup_in_steps_keeps_its_length_when_the_clock_ends_the_run(home):
    words = ["train.max_seconds=0.4", "train.steps=100000", "train.warmup_steps=50"]
    assert run("train", "-c", "small.yaml", *words).exit_code == 0
    rows = [row.split(",") for row in Path("runs/small/metrics.csv").read_text().splitlines()[1:]]
    rates = [float(row[3]) for row in rows if row[3]]
    assert rates[0] == pytest.approx(3e-3 * 0.5 / 50, rel=0.3), "the first step is at the foot of the warm-up"


def test_what_does_not_belong_together(home):
    for name, text in (
        ("a", "To be, or not to be. " * 200),
        ("b", "The quality of mercy is not strained. " * 200),
    ):
        Path(f"{name}.txt").write_text(text)
        assert (
            run("tokenize", "--dataset", f"{name}.txt", "--vocab-size", "270", "--out", name).exit_code == 0
        )
    words = [
        "train",
        "-c",
        "small.yaml",
        "data.dataset=a",
        "model.vocab_size=280",
        "log.prompt=To",
        "train.steps=2",
    ]
    words += ["train.warmup_steps=0", "train.seq_len=8", "train.eval_windows=2"]
    result = run(*words)
    assert result.exit_code == 0, f"more rows than tokens is a warning: {result.output}"
    wrong = run("eval", "--ckpt", "runs/small/latest.ckpt", "--data", "b")
    assert wrong.exit_code == 2 and "another tokenizer" in wrong.output
    wrong = run(*words, "data.val=b/val", "log.name=x")
    assert wrong.exit_code == 2 and "another tokenizer" in wrong.output
    wrong = run("train", "-c", "small.yaml", "data.val=x.tar", "log.name=x")
    assert wrong.exit_code == 2 and "only stream" in wrong.output
    for path in Path("runs/small").glob("step_*"):
        path.unlink()
    wrong = run(*words, "--resume")
    assert wrong.exit_code == 2 and "latest.ckpt" in wrong.output


def test_tar_files_stream_in_and_a_run_goes_on_in_them(home):
    write_tar_shards(
        [f"Scene {n}. To be, or not to be, that is the question." for n in range(60)], "tars", 20
    )
    assert (
        run("tokenize", "--dataset", "data/tiny_text/a.txt", "--vocab-size", "270", "--out", "bpe").exit_code
        == 0
    )
    data = ["data.dataset=tars/*.tar", "data.tokenizer=bpe/tokenizer.json", "data.val=data/tiny_text/b.txt"]
    words = ["train", "-c", "small.yaml", *data, "model.vocab_size=270", "train.steps=4"]
    assert run(*words).exit_code == 0
    result = run(*words, "train.steps=6", "--resume")
    assert result.exit_code == 0 and load_tree("runs/small/latest.ckpt")[0]["progress"]["step"] == 6, (
        result.output
    )
    assert run("eval", "--ckpt", "runs/small/latest.ckpt", "--max-windows", "2").exit_code == 0
    wrong = run("eval", "--ckpt", "runs/small/latest.ckpt", "--split", "train")
    assert wrong.exit_code == 2 and "streams in" in wrong.output


def test_early_stopping_says_so(home):
    result = run(
        "train", "-c", "small.yaml", "train.lr=1e-9", "train.ema=null", "train.patience=1", "train.steps=100"
    )
    assert result.exit_code == 0 and "stopped early" in result.output
    assert load_tree("runs/small/latest.ckpt")[0]["progress"]["step"] < 100


@pytest.mark.skipif(os.name != "posix", reason="locks a folder")
def test_one_run_at_a_time_in_a_folder(home):
    import fcntl

    Path("runs/small").mkdir(parents=True)
    handle = os.open("runs/small", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    result = run("train", "-c", "small.yaml")
    os.close(handle)
    assert result.exit_code == 2 and "another process" in result.output
    assert not list(Path("runs/small").iterdir())


def test_brackets_in_a_name_are_no_markup(home):
    result = run("train", "-c", "small.yaml", "--dry-run", "log.name=a[bold]b")
    assert result.exit_code == 0 and "a[bold]b: a dry run" in result.output


def test_dry_run_writes_nothing(home):
    before = files(home)
    result = run("train", "-c", "small.yaml", "--dry-run")
    assert result.exit_code == 0 and files(home) == before
    for word in (
        "parameters: total",
        "FLOPs per token",
        "memory: scores",
        "memory: total",
        "tokens/s",
        "time",
    ):
        assert word in result.output
    assert "more than this machine" not in result.output
    large = ["model.d_model=65536", "model.n_layers=500", "train.device=cpu"]
    result = run("train", "-c", "small.yaml", *large, "--dry-run")
    assert result.exit_code == 0 and "more than this machine" in result.output
    said = " ".join(result.output.replace("│", " ").split())
    assert "it takes a smaller model" in said and "micro_batch_size" not in said
    result = run(
        "train", "-c", "small.yaml", "train.micro_batch_size=null", "train.batch_size=4000000", "--dry-run"
    )
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 0 and "it takes a smaller train.micro_batch_size" in said


@pytest.mark.parametrize(
    ("rope", "positions", "refused"),
    [("true", "none", ""), ("false", "none", ""), ("true", "learned", "positions for 8 tokens only")],
)
def test_eval_past_the_length_of_training(home, rope, positions, refused):
    """Only a table of positions ends; with RoPE beside it, too."""
    model = [f"model.rope={rope}", f"model.positions={positions}", "model.max_seq_len=8"]
    train = ["train.seq_len=8", "train.steps=1", "train.warmup_steps=0", "log.name=short"]
    assert run("train", "-c", "small.yaml", *model, *train).exit_code == 0
    result = run("eval", "--ckpt", "runs/short/latest.ckpt", "--seq-len", "16")
    assert result.exit_code == (2 if refused else 0) and refused in result.output, result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "eval", "generate", "tokenize", "fetch", "main"])
def test_every_command_is_a_module_too(home, name):
    result = shell(f"tutorial_lib.cli.{name}", "--help", cwd=home)
    assert result.returncode == 0 and "Usage" in result.stdout


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_our_configurations_load(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.model.vocab_size == {"tiny": 256, "base": 50304}[name]
    changed = load_config(
        ROOT / "configs/base.yaml", ["train.lr=2e-4", "train.batch_size=64", "model.rope=true"]
    )
    assert (changed.train.lr, changed.train.batch_size, changed.model.rope) == (2e-4, 64, True)


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "a ${oc.env:SECRET}", "${oc.decode:x}", "${train.lr}", "x\\${y}"]
)
def test_a_strangers_configuration_does_not_read_the_environment(home, monkeypatch, value):
    monkeypatch.setenv("SECRET", "hunter2")
    Path("evil.yaml").write_text(yaml.safe_dump({"log": {"prompt": value}, "data": {"dataset": "x"}}))
    for where in (
        ("evil.yaml", []),
        (None, [f"log.prompt={value}"]),
        (None, [f"data.dataset=https://x.org/{value}.tar"]),
    ):
        with pytest.raises(ConfigError) as said:
            load_config(*where)
        assert "hunter2" not in str(said.value)
    with pytest.raises(ConfigError, match="log.prompt is .* write the value itself"):
        load_config("evil.yaml")


def test_the_plans_own_file_loads_as_written(home):
    config = load_config("plan.yaml")
    assert (config.train.lr, config.train.amp, config.log.wandb) == (3e-4, True, True)
    assert (config.model.vocab_size, config.model.norm, config.model.max_seq_len) == (50257, "rmsnorm", 256)


@pytest.mark.slow
def test_the_plans_own_file_trains(home):
    words = ["tutorial_lib.cli.train", "--config", "plan.yaml", "train.steps=1", "train.warmup_steps=0"]
    quiet = {"HOME": str(home), "WANDB_API_KEY": "", "NETRC": str(home / "none")}
    result = shell(*words, "train.batch_size=2", "train.eval_windows=1", cwd=home, **quiet)
    assert result.returncode == 0, result.stderr
    assert "50,001 rows of the embedding" in " ".join(result.stderr.split()), "what a large vocabulary wastes"
    assert result.stderr.count("wandb") >= 1 and "wandb sync" in result.stderr
    assert (home / "runs/plan/latest.ckpt").is_file() and list((home / "runs/plan/wandb").glob("offline-*"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_and_the_run_goes_on(home):
    words = [
        "-m",
        "tutorial_lib.cli.train",
        "-c",
        "small.yaml",
        "train.steps=100000",
        "train.save_every=50000",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words, "train.eval_every=20"],
        cwd=home,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 120
    while not (home / "runs/small/metrics.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "SIGINT" in said and "--resume" in said and "Traceback" not in said
    step = load_tree(home / "runs/small/latest.ckpt")[0]["progress"]["step"]
    result = run("train", "-c", "small.yaml", "train.warmup_steps=0", f"train.steps={step + 1}", "--resume")
    assert result.exit_code == 0 and load_tree("runs/small/latest.ckpt")[0]["progress"]["step"] == step + 1


@pytest.mark.slow
def test_two_processes_make_one_run(home):
    assert run("train", "-c", "small.yaml", "model.dropout=0").exit_code == 0
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tutorial_lib.cli.train"]
    result = shell(
        *words, "-c", "small.yaml", "model.dropout=0", "train.micro_batch_size=1", "log.name=two", cwd=home
    )
    assert result.returncode == 0, result.stderr
    one, two = (load_model(f"runs/{name}/latest.ckpt")[0] for name in ("small", "two"))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    rows = Path("runs/two/metrics.csv").read_text().splitlines()
    assert sum(row.startswith("12,") for row in rows) == 2, "one row of the step and one of its evaluation"
    assert result.stderr.count("best validation loss") == 1


def test_tokenize_then_train_on_the_shards(home):
    result = run(
        "tokenize", "--dataset", "data/tiny_text/*.txt", "--vocab-size", "300", "--out", "data/shards"
    )
    assert result.exit_code == 0, result.output
    size = len(json.loads(Path("data/shards/tokenizer.json").read_text())["tokens"]) + 1
    words = [
        "train",
        "-c",
        "small.yaml",
        "data.dataset=data/shards",
        f"model.vocab_size={size}",
        "train.steps=3",
    ]
    result = run(*words, "train.seq_len=8", "train.eval_windows=2")
    assert result.exit_code == 0, result.output
    result = run("eval", "--ckpt", "runs/small/latest.ckpt", "--json", "--max-windows", "2")
    assert result.exit_code == 0 and json.loads(result.stdout)["bytes_per_token"] > 1.5, result.output
    assert (
        run(
            "generate", "--ckpt", "runs/small/latest.ckpt", "--prompt", "To", "--max_new_tokens", "5"
        ).exit_code
        == 0
    )
    again = run("tokenize", "--dataset", "data/tiny_text/*.txt", "--out", "data/shards")
    assert again.exit_code == 2 and "not empty" in again.output
    wrong = run(*words, "data.tokenizer=byte", "log.name=x")
    assert wrong.exit_code == 2 and "written with" in " ".join(wrong.output.split())


def test_two_that_tokenize_at_once(home):
    """Both want one folder: one of them gets it, whole; the other says so, and takes nothing away."""
    Path("long.txt").write_text("To be, or not to be: that is the question.\n" * 40_000)
    words = ["tutorial_lib.cli.tokenize", "--dataset", "long.txt", "--vocab-size", "280", "--out", "mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-m", *words], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (loser,) = [text for process, text in zip(both, said, strict=True) if process.returncode]
    assert "another process is writing" in loser or "is not empty" in loser
    assert sum(shards["total"] for shards in map(index_of, ("mine/train", "mine/val"))) > 10_000
    assert not list(Path().glob(".*"))


def test_a_tokenize_that_was_killed_is_simply_run_again(home):
    Path("long.txt").write_text("To be, or not to be: that is the question.\n" * 400_000)
    words = ["tutorial_lib.cli.tokenize", "--dataset", "long.txt", "--out", "mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words += ["--vocab-size", "280", "--shard-tokens", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", *words], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 60
    while not list(Path().glob(".mine.unfinished/train/*.npy")) and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Path("mine").exists() and Path(".mine.unfinished/train").exists()
    again = run("tokenize", "--dataset", "data/tiny_text/*.txt", "--vocab-size", "280", "--out", "mine")
    assert again.exit_code == 0, again.output
    assert index_of("mine/train")["total"] and not list(Path().glob(".*"))


def index_of(folder: str):
    return json.loads(Path(folder, "index.json").read_text())


def test_a_text_without_an_end_is_refused(home):
    os.mkfifo("pipe.txt")
    for dataset in ("/dev/zero", "pipe.txt", "pipe*"):
        tokens = run("tokenize", "--dataset", dataset, "--out", "mine")
        trained = run("train", "-c", "small.yaml", f"data.dataset={dataset}")
        for result in (tokens, trained):
            assert result.exit_code == 2 and "is a device or a pipe" in result.output, result.output
    model = Transformer(ModelConfig(256, 64, 32, 2, 2, 2))
    for dataset in ("/dev/zero", "pipe.txt"):  # a stranger's checkpoint names its text
        about = {"tokenizer": "byte", "run": {"data": {"dataset": dataset}}}
        save_model("stranger.ckpt", model, about)
        result = run("eval", "--ckpt", "stranger.ckpt")
        assert result.exit_code == 2 and "is a device or a pipe" in result.output, result.output
        about["tokenizer"] = dataset
        save_model("stranger.ckpt", model, about)
        result = run("generate", "--ckpt", "stranger.ckpt")
        assert result.exit_code == 2 and "there is no tokenizer" in result.output, result.output


def broken_configurations(n: int, rng: random.Random):
    """Words after `train` that cannot be run, each with why."""
    good = load_config().as_dict()
    keys = [(table, name) for table, inside in good.items() for name in inside]
    texts = {"norm", "mlp", "positions", "schedule", "optimizer", "attention", "parallel", "device", "tokenizer",
             "dataset", "val", "dir", "name", "project", "prompt", "amp", "window", "rope_scaling"}  # fmt: skip
    numbers = [(table, name) for table, name in keys if name not in texts]
    positive = ["train.batch_size", "train.seq_len", "train.steps", "train.lr", "train.eval_every", "train.save_every",
                "train.keep_last", "train.grad_clip", "train.micro_batch_size", "train.patience", "log.every",
                "model.d_model", "model.n_heads", "model.n_layers", "model.vocab_size", "model.d_mlp", "model.window"]  # fmt: skip
    impossible = [
        ["model.d_model=30", "model.n_heads=4"], ["model.n_heads=4", "model.n_kv_heads=3"], ["model.d_head=7"],
        ["train.warmup_steps=12"], ["model.vocab_size=255"], ["train.seq_len=64", "model.max_seq_len=32", "model.rope=false"],
        ["train.seq_len=100000"], ["data.dataset=nowhere/*.txt"], ["data.tokenizer=nothing.json"], ["train.parallel=fsdp", "train.optimizer=muon"],
        ["train.parallel=fsdp", "train.ema=0.9"], ["train.betas=[0.9]"], ["train.betas=[0.9,1.0]"], ["train.zero_stage=4"],
        ["data.val_fraction=0"], ["data.val_fraction=1.5"], ["train.device=gpu"], ["train.device=cuda:99"], ["log.name=a/b"],
        ["data.dataset=data/tiny_text"], ["data.dataset=shards/*.tar"], ["train.lr=${train.nothing}"], ["train.lr=${"],
        ["model.rope_scaling=3"], ["model.window=[]"], ["model.window=[a]"], ["model.dropout=2"], ["train.amp=bf61"],
        ["model=null"], ["train=3"], ["data=[1]"], ["=3"], ["abc"], ["train.lr"], ["train.lr=nan"], ["train.lr=inf"],
    ]  # fmt: skip
    yield from impossible
    for _ in range(n):
        kind = rng.randrange(5)
        table, name = rng.choice(keys)
        if kind == 0:  # a slip of the finger
            place = rng.randrange(len(name))
            slip = name[:place] + rng.choice(string.ascii_lowercase) + name[place + rng.randrange(2) :]
            if slip in good[table]:
                slip += "x"
            yield [f"{table}.{slip}=1"]
        elif kind == 1:  # a table that is not there
            yield [f"{rng.choice(['models', 'training', 'dat', 'logs', 'x'])}.{name}=1"]
        elif kind == 2:  # a text where a number or a bool should be
            table, name = rng.choice(numbers)
            yield [f"{table}.{name}={rng.choice(['abc', 'tru', '1e', '0x', '[a]', '{a: 1}', '1,2'])}"]
        elif kind == 3:
            yield [f"{rng.choice(positive)}={rng.choice([0, -1, -1000])}"]
        else:
            name = rng.choice(["norm", "mlp", "positions", "schedule", "optimizer", "attention", "parallel"])
            table = "model" if name in ("norm", "mlp", "positions") else "train"
            yield [
                f"{table}.{name}={rng.choice(['rmsnrom', 'swigul', 'cosin', 'adamx', 'flsh', 'dp', 'zz'])}"
            ]


def broken_files(rng: random.Random):
    """YAML that is none, or holds no configuration."""
    yield from (
        "",
        "[1, 2]",
        "model",
        "model: [1",
        "model: {d_model: }}",
        "\t\tmodel:",
        "train: {lr: abc}",
        "a: &a [*a]",
    )
    yield from (
        "model: 3",
        "!!python/object/apply:os.system ['true']",
        "train: {lr: 1e-3, lr: abc}",
        "? {}",
        "\x00",
    )
    for _ in range(40):
        text = bytearray(PLAN.encode())
        for _ in range(rng.randrange(1, 4)):  # brackets and colons are what holds it together
            place = rng.choice([i for i, c in enumerate(text) if chr(c) in "{}:"])
            text[place] = ord(rng.choice("{}[&*!%@`\x01"))
        yield text.decode()


def broken_command_lines():
    """Words that are no command."""
    yield from (["trian"], ["train", "--confg", "x"], ["train", "--config"], ["train", "-c", "nowhere.yaml"])
    yield from (["train", "-c", "smal.yaml"], ["train", "-c", "."], ["eval"], ["eval", "--ckpt", "none.ckpt"])
    yield from (
        ["eval", "--ckpt", "data"],
        ["eval", "--ckpt", "small.yaml"],
        ["generate", "--ckpt", "none.ckpt"],
    )
    yield from (
        ["generate", "--ckpt", "small.yaml"],
        ["generate", "--prompt", "x"],
        ["tokenize"],
        ["fetch", "shakspere"],
    )
    yield from (
        ["tokenize", "--out", "o", "--dataset", "nowhere/*"],
        ["tokenize", "--out", "data", "--dataset", "x"],
    )
    yield from (["tokenize", "--out", "o", "--vocab-size", "3", "--dataset", "data/tiny_text/*.txt"],)
    yield from (["tokenize", "--out", "o", "--tokenizer", "none", "--dataset", "data/tiny_text/*.txt"],)
    yield from (["tokenize", "--out", "o", "--val-fraction", "2", "--dataset", "data/tiny_text/*.txt"],)
    yield from (["tokenize", "--out", "o", "--shard-tokens", "0", "--dataset", "data/tiny_text/*.txt"],)


def test_whatever_is_wrong_is_one_sentence(home):
    rng = random.Random(0)
    lines = [["train", "-c", "small.yaml", *words] for words in broken_configurations(230, rng)]
    for number, text in enumerate(broken_files(rng)):
        path = home / f"bad_{number}.yaml"
        path.write_text(text, encoding="utf-8")
        # An empty file, or one that happens to be whole, still needs a text to train on.
        lines.append(["train", "-c", path.name, "data.dataset=nowhere/*.txt"])
    lines += broken_command_lines()
    assert len(lines) >= 300
    before = files(home)
    for words in lines[0:]:
        result = run(*words)
        said = " ".join(result.output.split())
        assert result.exit_code == 2, (words, result.exit_code, said, result.exception)
        assert "Traceback" not in said and 10 < len(said) < 900, (words, said)
        assert "rror" in said or "Usage" in said, (words, said)
        assert files(home) == before, (words, "nothing may be written")


def test_a_slip_is_answered_with_the_nearest_name():
    for words, answer in (
        (["train.learning_rate=1"], "'train.learning_rate'"),
        (["lr=1"], "did you mean 'train.lr'?"),
        (["model.nheads=2"], "did you mean 'model.n_heads'?"),
        (["train.d_model=2"], "did you mean 'model.d_model'?"),
        (["train.schedule=cosin"], "did you mean 'cosine'?"),
        (["train.attention=flsh"], "did you mean 'flash'?"),
        (["model.d_model=130", "model.n_heads=4"], "130 does not split into 4 heads"),
        (["train.lr=fast"], "train.lr is 'fast', but must be float"),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(None, words)
        assert answer in str(error.value) and "\n" not in str(error.value)
