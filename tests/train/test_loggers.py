"""What was logged is there when it is read back: after a kill, after a resume, and with a logger that fails."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tutorial_lib.train.loggers import (
    CSVLogger,
    Logger,
    Loggers,
    TensorBoardLogger,
    WandbLogger,
)
from tutorial_lib.train.loop import StepInfo, TrainConfig, train
from tutorial_lib.train.watchers import LogSteps, LogWeights, TraceProfiler

ROOT = Path(__file__).resolve().parents[2]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Recorder(Logger):
    """Remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def scalars(self, step, values):
        self.calls.append(("scalars", step, dict(values)))

    def histogram(self, step, name, values):
        self.calls.append(("histogram", step, name))

    def text(self, step, name, text):
        self.calls.append(("text", step, name, text))

    def close(self):
        self.calls.append(("close",))


def tiny_run(callbacks, steps: int = 12) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))

    def batches():
        while True:
            ids = torch.randint(0, 8, (2, 5))
            yield ids[:, :-1], ids[:, 1:]

    train(model, batches(), TrainConfig(steps=steps), callbacks)
    return model


# ── CSV ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_csv_columns_come_when_they_come(tmp_path):
    log = CSVLogger(tmp_path / "deep" / "log.csv")
    log.scalars(1, {"loss": 2.5, "lr": 1e-3})
    log.scalars(2, {"loss": torch.tensor(2.25)})
    log.histogram(2, "weights", torch.zeros(3))
    log.text(2, "sample", "To be")
    log.scalars(2, {"val, held out": math.inf})
    log.scalars(3, {"loss": math.nan, "val, held out": 2.0})
    rows = table(tmp_path / "deep" / "log.csv")  # not closed yet: a reader looks while the run goes on
    log.close()
    assert list(rows[0]) == ["step", "loss", "lr", "val, held out"]
    assert [list(row.values()) for row in rows] == [
        ["1", "2.5", "0.001", ""],
        ["2", "2.25", "", ""],
        ["2", "", "", "inf"],
        ["3", "nan", "", "2.0"],
    ]


def test_csv_without_resume_starts_anew(tmp_path):
    for _ in range(2):
        log = CSVLogger(tmp_path / "log.csv")
        log.scalars(1, {"loss": 1.0})
        log.close()
    assert len(table(tmp_path / "log.csv")) == 1


def test_csv_resume_drops_what_will_come_again(tmp_path):
    path = tmp_path / "log.csv"
    log = CSVLogger(path)
    for step in range(1, 8):
        log.scalars(step, {"loss": step / 2})
    log.scalars(7, {"val": 9.0})
    log.close()
    for _ in range(2):  # killed and resumed twice from the same checkpoint
        log = CSVLogger(path, resume_step=4)
        for step in range(5, 8):
            log.scalars(step, {"loss": step / 2})
        log.close()
    rows = table(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(str(s), str(s / 2)) for s in range(1, 8)]
    assert list(rows[0]) == ["step", "loss", "val"]


def test_csv_resume_without_a_file_begins_one(tmp_path):
    log = CSVLogger(tmp_path / "log.csv", resume_step=100)
    log.scalars(101, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in table(tmp_path / "log.csv")] == ["101"]


@pytest.mark.parametrize("cut", range(1, 9))
def test_csv_half_a_line_is_dropped(tmp_path, cut):
    path = tmp_path / "log.csv"
    log = CSVLogger(path)
    for step in (1, 2, 30):
        log.scalars(step, {"loss": 1.25})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # "30,1.25\n", cut short anywhere
    CSVLogger(path, resume_step=1000).close()
    assert [row["step"] for row in table(path)] == ["1", "2"]


def test_csv_of_something_else_is_refused(tmp_path):
    path = tmp_path / "grades.csv"
    path.write_text("name,grade\nKate,A\n")
    with pytest.raises(ValueError, match="no table of steps"):
        CSVLogger(path, resume_step=3)
    assert path.read_text() == "name,grade\nKate,A\n"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["loss", "val", 'a "name", quoted', "lr"]), st.floats(), max_size=3),
        max_size=12,
    ),
    st.integers(0, 12),
)
def test_csv_resumed_equals_uninterrupted(tmp_path_factory, calls, resume_step):
    folder = tmp_path_factory.mktemp("csv")

    def write(path: Path, first: int, **resume) -> None:
        log = CSVLogger(path, **resume)
        for step, values in enumerate(calls, 1):
            if step >= first:
                log.scalars(step, values)
        log.close()

    write(folder / "whole.csv", 1)
    write(folder / "resumed.csv", 1)
    write(folder / "resumed.csv", resume_step + 1, resume_step=resume_step)
    assert (folder / "resumed.csv").read_bytes() == (folder / "whole.csv").read_bytes()
    for row, values in zip(table(folder / "whole.csv"), calls, strict=True):
        read = {name: float(cell) for name, cell in row.items() if cell and name != "step"}
        assert read.keys() == values.keys()
        assert all(np.array_equal(read[name], values[name], equal_nan=True) for name in values)


@pytest.mark.slow
def test_csv_survives_a_kill(tmp_path):
    program = f"""
        from tutorial_lib.train.loggers import CSVLogger
        log = CSVLogger({str(tmp_path / "log.csv")!r})
        for step in range(1, 10**9):
            log.scalars(step, {{"loss": step / 7, f"name{{min(step // 50, 20)}}": 1.0}})
            if step == 200: print("going", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "going\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    log = CSVLogger(tmp_path / "log.csv", resume_step=10**9)
    log.close()
    rows = table(tmp_path / "log.csv")
    assert len(rows) >= 200 and [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(float(row["loss"]) == int(row["step"]) / 7 for row in rows)


# ── TensorBoard ──────────────────────────────────────────────────────────────────────────────────────────


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import (
        COMPRESSED_HISTOGRAMS,
        HISTOGRAMS,
        SCALARS,
        TENSORS,
        EventAccumulator,
    )

    everything = {SCALARS: 0, HISTOGRAMS: 0, TENSORS: 0, COMPRESSED_HISTOGRAMS: 0}  # 0: keep all
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    torch.manual_seed(0)
    weights = torch.randn(40, 25)
    sample = "ROMEO:\n\n  *But*, soft\n# what light\n"
    log = TensorBoardLogger(tmp_path)
    for step in range(1, 31):
        log.scalars(step, {"loss": 1 / step, "lr": torch.tensor(0.5)})
    log.histogram(30, "weights", nn.Parameter(weights))
    log.text(30, "sample", sample)
    log.close()
    read = events(tmp_path)
    assert [e.step for e in read.Scalars("loss")] == list(range(1, 31))
    assert np.allclose([e.value for e in read.Scalars("loss")], [1 / s for s in range(1, 31)])
    assert {e.value for e in read.Scalars("lr")} == {0.5}
    (histogram,) = read.Histograms("weights")
    found = histogram.histogram_value
    assert histogram.step == 30 and found.num == 1000
    assert np.isclose(found.sum, weights.sum(), rtol=1e-3, atol=1e-3)
    assert np.isclose(found.min, weights.min()) and np.isclose(found.max, weights.max())
    edges = np.array(found.bucket_limit)
    below = np.cumsum(found.bucket)
    expected = [(weights <= edge).sum().item() for edge in edges]
    assert np.allclose(below, expected)
    (text,) = read.Tensors("sample/text_summary")
    assert text.step == 30
    lines = text.tensor_proto.string_val[0].decode().split("\n")
    assert "\n".join(line[4:] for line in lines) == sample and {line[:4] for line in lines[:-1]} == {"    "}


@pytest.mark.parametrize("resume_step, kept", [(None, []), (3, [1, 2, 3])])
def test_tensorboard_hides_what_will_come_again(tmp_path, resume_step, kept):
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 8):
        first.scalars(step, {"loss": 1.0})
    first.close()
    second = TensorBoardLogger(tmp_path, resume_step=resume_step)
    for step in (4, 5):
        second.scalars(step, {"loss": 2.0})
    second.close()
    read = events(tmp_path).Scalars("loss")
    assert [(e.step, e.value) for e in read] == [(s, 1.0) for s in kept] + [(4, 2.0), (5, 2.0)]


def test_tensorboard_takes_a_diverged_run(tmp_path):
    log = TensorBoardLogger(tmp_path)
    log.histogram(1, "weights", torch.tensor([1.0, math.nan, 2.0, math.inf]).bfloat16())
    log.histogram(2, "weights", torch.full((3, 3), math.nan))
    log.histogram(3, "weights", torch.empty(0))
    log.scalars(3, {"loss": math.nan})
    log.close()
    read = events(tmp_path)
    assert [(e.step, e.histogram_value.num) for e in read.Histograms("weights")] == [(1, 2.0)]
    assert math.isnan(read.Scalars("loss")[0].value)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    make = {"tensorboard": TensorBoardLogger, "wandb": lambda folder: WandbLogger(folder, "p")}[package]
    with pytest.raises(ImportError, match=f"{package}.*: pip install {package}$"):
        make(tmp_path)


# ── wandb ────────────────────────────────────────────────────────────────────────────────────────────────

WANDB = """
import sys, torch
from tutorial_lib.train.loggers import WandbLogger
log = WandbLogger(sys.argv[1], project="p", name="n", config={"lr": 0.1}, resume_step=eval(sys.argv[2]))
log.scalars(1, {"loss": 2.0}); log.scalars(1, {"val": 3.0}); log.scalars(2, {"loss": float("nan")})
log.histogram(2, "weights", torch.tensor([1.0, float("nan")])); log.histogram(2, "none", torch.empty(0))
log.text(2, "sample", "To be & <not>"); log.close()
"""


def wandb_run(tmp_path: Path, resume_step: int | None = None, **more: str) -> subprocess.CompletedProcess:
    """In a process of its own, with an empty home and nothing of wandb's in the environment."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    clean |= {"HOME": str(home), "USERPROFILE": str(home), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path / "run"), repr(resume_step)],
        cwd=ROOT,
        env=clean,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )


def wandb_history(folder: Path) -> list[dict]:
    """The rows of an offline run, from its own file: protobuf records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data, place, record_bytes, rows = file.read_bytes(), 7, b"", []  # 7 bytes name the format
    while place + 7 <= len(data):
        if (left := -place % 32768) and left < 7:  # no header fits into the rest of the block
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)  # behind a checksum
        record_bytes += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(record_bytes)
            record_bytes = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.slow
def test_wandb_without_a_key_stays_here_and_says_so_once(tmp_path):
    done = wandb_run(tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(lines) == 1 and "no key" in lines[0] and f"wandb sync {folder}" in lines[0]
    first, second = wandb_history(folder)
    assert (first["_step"], first["loss"], first["val"]) == (1, 2.0, 3.0)
    assert (
        second["_step"] == 2
        and second["weights/_type"] == "histogram"
        and not any("none" in k for k in second)
    )
    (page,) = folder.rglob("*.html")
    assert "To be &amp; &lt;not&gt;" in page.read_text()
    again = wandb_run(tmp_path, resume_step=1)
    assert again.returncode == 0, again.stderr
    names = {path.name[-8:] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert names == {(tmp_path / "run" / "wandb-id.txt").read_text()}  # one run, in two folders


@pytest.mark.slow
def test_wandb_with_a_key_but_no_server_stays_here(tmp_path):
    done = wandb_run(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(lines) == 1 and "does not answer" in lines[0] and "wandb sync" in lines[0]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
@pytest.mark.parametrize("mode, folders", [("offline", 1), ("disabled", 0)])
def test_wandb_mode_is_respected_without_a_word(tmp_path, mode, folders):
    done = wandb_run(tmp_path, WANDB_MODE=mode)
    assert done.returncode == 0, done.stderr
    assert not (done.stdout + done.stderr).strip()
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == folders


# ── Several at once ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["scalars", "histogram", "text", "close"])
def test_a_failing_logger_is_reported_once_and_dropped(method):
    class Full(Recorder):
        pass

    def fail(*_):
        raise OSError("no space left on device")

    setattr(Full, method, fail)
    before, full, after, said = Recorder(), Full(), Recorder(), []
    log = Loggers([before, full, after], report=said.append)
    for step in (1, 2):
        log.scalars(step, {"loss": 1.0})
        log.histogram(step, "weights", torch.ones(2))
        log.text(step, "sample", "To be")
    log.close()
    assert said == ["Full failed and is left out from here on: no space left on device"]
    expected = [call for s in (1, 2) for call in (("scalars", s), ("histogram", s), ("text", s))] + [
        ("close",)
    ]
    assert [call[:2] for call in before.calls] == [call[:2] for call in after.calls] == expected
    assert before.calls[0] == ("scalars", 1, {"loss": 1.0})


def test_ctrl_c_is_no_failure_of_a_logger():
    class Interrupted(Logger):
        def scalars(self, step, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loggers([Interrupted()]).scalars(1, {})


def test_reports_go_to_stderr(capsys):
    class Broken(Logger):
        def close(self):
            raise RuntimeError("gone")

    Loggers([Broken()]).close()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "gone" in err


# ── Callbacks ────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_are_logged_raw():
    log = Recorder()
    steps = LogSteps(log, every=5)
    for step in range(1, 13):
        steps(StepInfo(step, 10.0 - step, 0.5, 1e-3, step * 100, step * 0.25, step / 12))
    assert [call[1] for call in log.calls] == [1, 5, 10, 12]
    first, second, *_ = (call[2] for call in log.calls)
    assert first == {"loss": 9.0, "grad_norm": 0.5, "lr": 1e-3, "tokens": 100}
    assert second == {"loss": 5.0, "grad_norm": 0.5, "lr": 1e-3, "tokens": 500, "tokens_per_second": 400.0}


def test_steps_of_a_resumed_run_have_no_wrong_rate():
    log = Recorder()
    steps = LogSteps(log, every=10)
    steps(StepInfo(510, 1.0, 0.5, 1e-3, 51_000, 0.5, 0.6))  # the clock began anew, the tokens did not
    assert "tokens_per_second" not in log.calls[0][2]


def test_weights_gradients_and_updates_are_logged_as_they_were():
    log, before = Recorder(), {}
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = LogWeights(model, log, every=3)
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        watch(StepInfo(step, 0.0, 0.0, 0.1, 0, 0.0, step / 6))
        if step == 3:
            at_3 = {
                f"update_ratio/{n}": ((p - before[n]).norm() / before[n].norm()).item()
                for n, p in model.named_parameters()
                if p.ndim == 2
            }
    names = {call[2] for call in log.calls if call[0] == "histogram"}
    assert names == {f"{what}/{i}.weight" for what in ("weights", "gradients") for i in (0, 1)}
    scalars = [call for call in log.calls if call[0] == "scalars"]
    assert [call[1] for call in scalars] == [3, 6]
    assert scalars[0][2].keys() == at_3.keys()
    assert all(math.isclose(scalars[0][2][name], at_3[name], rel_tol=1e-5) for name in at_3)


def test_all_loggers_hold_the_same_curve(tmp_path):
    log = Loggers([CSVLogger(tmp_path / "log.csv"), TensorBoardLogger(tmp_path / "tb")])
    model_log = []
    tiny_run([LogSteps(log, every=4), lambda info: model_log.append(info) and None])
    log.close()
    rows = table(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == [1, 4, 8, 12]
    assert [float(row["loss"]) for row in rows] == [model_log[s - 1].loss for s in (1, 4, 8, 12)]
    curve = events(tmp_path / "tb").Scalars("grad_norm")
    assert np.allclose([e.value for e in curve], [float(row["grad_norm"]) for row in rows])


# ── Traces ───────────────────────────────────────────────────────────────────────────────────────────────


def trace_events(path: Path) -> list[dict]:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_opens_and_holds_the_operators(tmp_path, name):
    trace = TraceProfiler(tmp_path / "deep" / name, start=4, steps=2)
    tiny_run([trace])
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / name]
    found = trace_events(tmp_path / "deep" / name)
    operators = [e for e in found if e.get("cat") == "cpu_op"]
    assert all(e["ph"] == "X" and e["dur"] >= 0 for e in operators)
    assert {"aten::embedding", "aten::linear", "aten::addmm"} <= {e["name"] for e in operators}
    assert sum(e["name"] == "aten::embedding" for e in operators) == 2  # one for each step
    assert sum(e["name"].startswith("Optimizer.step") for e in found) == 2


def test_a_trace_of_a_run_that_ends_early(tmp_path):
    for steps, exists in ((1, False), (2, False), (3, False), (4, True), (5, True)):
        path = tmp_path / f"{steps}.json"
        trace = TraceProfiler(path, start=4, steps=3)
        trace.close()  # nothing has begun
        tiny_run([trace], steps=steps)
        trace.close()
        trace.close()
        assert path.is_file() == exists, steps
    assert sum(e["name"].startswith("Optimizer.step") for e in trace_events(tmp_path / "5.json")) == 2


def test_a_trace_that_cannot_be():
    for start, steps in ((2, 3), (5, 0)):
        with pytest.raises(ValueError, match="from step 3"):
            TraceProfiler("trace.json", start, steps)
