"""The tour: it learns, it leaves what it promises, and Ctrl-C leaves a checkpoint that can be used."""

from __future__ import annotations

import html
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tutorial_lib.eval import baselines
from tutorial_lib.interop.checkpoint import load_model
from tutorial_lib.runs.callbacks import write_on
from tutorial_lib.runs.terminal import printable
from tutorial_lib.tour.__main__ import main
from tutorial_lib.tour.recipes import RECIPES, with_seconds
from tutorial_lib.train.checkpoints import read_header


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text of the learner's own, with enough repetition to be learned in seconds."""
    folder = tmp_path_factory.mktemp("text")
    line = "To be, or not to be, that is the question. Whether 'tis nobler in the mind to suffer.\n"
    (folder / "a.txt").write_text(line * 150, encoding="utf-8")
    (folder / "b.txt").write_text(line * 150, encoding="utf-8")
    return str(folder / "*.txt")


@pytest.mark.slow
def test_a_short_tour_learns_and_leaves_everything(tmp_path, text, capsys):
    assert main(["--seconds", "6", "--dataset", text, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    first, last = result["val_curve"][0][1], result["val_curve"][-1][1]
    assert abs(first - math.log(256)) < 0.5, "an untrained model is about uniform"
    assert last < first - 0.5
    assert [round(sample[0], 1) for sample in result["samples"]][::2] == [0.0, 1.0]
    assert len(result["samples"]) == 3
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
    assert all(printable(sample) == sample for _, _, sample in result["samples"])
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png;base64,") == 2
    for word in ("uniform", "train.lr", "nats per byte", *(str(n) for n in ("0%", "100%"))):
        assert word in report
    model, about = load_model(tmp_path / "best.safetensors")
    assert about["val_loss"] == pytest.approx(min(loss for _, loss in result["val_curve"]))
    from tutorial_lib.data.tokenize import ByteTokenizer

    assert write_on(model, ByteTokenizer(), "**JULIET**", n=20).startswith("**JULIET**")
    assert "bits per byte" in capsys.readouterr().out
    code = html.unescape(re.search(r"<pre class=code>(.*?)</pre>", report, re.S)[1])
    exec(code, {})  # what the report says about using the model
    assert capsys.readouterr().out.startswith("**ROMEO**")
    assert main(["--seconds", "1", "--dataset", text, "--out", str(tmp_path)]) == 0, (
        "a second tour takes its place"
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path, text):
    command = [sys.executable, "-m", "tutorial_lib.tour", "--seconds", "300", "--dataset", text]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.time() + 120
    while not (tmp_path / "latest.ckpt").exists() and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "usable checkpoint" in output
    model, _ = load_model(tmp_path / "latest.ckpt")
    assert int(read_header(tmp_path / "latest.ckpt")["step"]) >= 1
    assert torch.isfinite(model(torch.zeros(1, 8, dtype=torch.long))).all()
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


@pytest.mark.parametrize("file", ["step_00000010.ckpt", "best.ckpt", "latest.ckpt"])
def test_a_run_of_somebody_else_is_left_alone(tmp_path, text, file, capsys):
    (tmp_path / file).write_bytes(b"weights")
    (tmp_path / "result.json").write_text("{}", encoding="utf-8")
    assert main(["--seconds", "1", "--dataset", text, "--out", str(tmp_path)]) == 1
    assert "holds a run that is no tour" in capsys.readouterr().out
    assert (tmp_path / file).read_bytes() == b"weights"


def test_errors_are_one_sentence(tmp_path, capsys):
    assert main(["--dataset", str(tmp_path / "none*.txt"), "--out", str(tmp_path / "o")]) == 1
    assert main(["--dataset", str(tmp_path / "[/x]*.txt"), "--out", str(tmp_path / "o")]) == 1  # no markup
    (tmp_path / "short.txt").write_text("brief", encoding="utf-8")
    assert main(["--dataset", str(tmp_path / "short.txt"), "--out", str(tmp_path / "o")]) == 1
    out = capsys.readouterr().out
    assert out.count("The tour stopped:") == 3 and "Traceback" not in out
    with pytest.raises(SystemExit) as exit:
        main(["--seconds", "-1"])
    assert exit.value.code == 2


def test_the_recipes_are_what_they_say():
    assert with_seconds(RECIPES["tour"], 7).training.max_seconds == 7
    assert RECIPES["tour"].training.max_seconds == 120
    plain = RECIPES["plain"]
    assert (plain.training.steps, plain.batch_size, plain.model.max_seq_len) == (2000, 12, 64)


def test_baselines_against_plain_counting():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 5, 400), rng.integers(0, 5, 60)
    freq = [(np.sum(train == c) + 1) / (len(train) + 8) for c in range(8)]
    assert baselines.unigram(train, test, 8) == pytest.approx(-np.mean([math.log2(freq[c]) for c in test]))
    total = 0.0
    for a, b in zip(test[:-1], test[1:], strict=True):
        together = np.sum((train[:-1] == a) & (train[1:] == b))
        total -= math.log2((together + freq[b]) / (np.sum(train[:-1] == a) + 1))
    assert baselines.bigram(train, test, 8) == pytest.approx(total / (len(test) - 1))
    text = b"the same words again and again " * 40
    found = baselines.compressors(text, text)
    assert found["xz, having read the training text"] < found["xz"] < 8
