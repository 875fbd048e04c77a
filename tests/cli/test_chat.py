"""Pretrained models on the command line: chat at a terminal and through a pipe, generate, eval, export, train."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

from tests.cli.test_cli import ROOT, SMALL, run
from tutorial_lib.cli.main import app
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.checkpoint import load_model
from tutorial_lib.interop.gguf import load_gguf
from tutorial_lib.interop.hf import load_hf, save_hf
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.interop.tokenizers import load_tokenizer, same_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = 1 << 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama as Hugging Face has it, with a tokenizer and a way to chat; it never stops by itself."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer(["<|im_start|>", "<|im_end|>", "<|eos|>"])
    config = ModelConfig(tokenizer.vocab_size, LONG, 32, 4, 2, 2, d_mlp=48, tie_embeddings=False)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        # The first channel is always large and positive, and speaks against all but ASCII.
        model.tokens.weight[:, 0], model.norm.weight[0] = 10.0, 1.0
        for block in model.blocks:
            block.attn.out.weight[0], block.mlp.down.weight[0] = 0.0, 0.0
        model.head.weight[:, 0], model.head.weight[128:, 0] = 0.0, -50.0
    return save_hf(model, tmp_path_factory.mktemp("hf") / "small", tokenizer, chat_template=CHATML)


class Terminal:
    """`llm-scratch chat` as a person has it before them."""

    def __init__(self, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # What runs behind a shell's & has Ctrl-C ignored, and hands that on.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(OMP_NUM_THREADS="1", TERM="dumb", PYTHONPATH=str(ROOT))
            os.execv(sys.executable, [sys.executable, "-m", "tutorial_lib.cli.chat", *words])
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to a pattern."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen[-300:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += self.decoder.decode(os.read(self.fd, 1 << 16))
                except OSError as error:
                    raise AssertionError(f"it ended: {self.seen[-300:]!r}") from error
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def say(self, text: str) -> None:
        time.sleep(0.3)  # nobody is so fast that a Ctrl-C arrives between the prompt and its reading
        os.write(self.fd, text.encode())

    def end(self) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            try:
                if select.select([self.fd], [], [], 0.1)[0]:
                    self.seen += self.decoder.decode(os.read(self.fd, 1 << 16))
            except OSError:  # it has let go of the terminal, and is still tidying up
                time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end: {self.seen[-300:]!r}")


@pytest.mark.slow
def test_a_person_at_a_terminal(folder):
    """Ctrl-C stops the answer and not the program; commands answer; Ctrl-D leaves."""
    terminal = Terminal("--model", str(folder), "--max-new-tokens", "60000", "--seed", "1")
    terminal.until("you › ")
    terminal.say("Hello\n")
    terminal.until(r"(?s)Hello.*\S{3}")
    terminal.say("\x03")
    stopped = terminal.until("you › ")
    assert " …" in stopped and "Traceback" not in stopped
    held = re.search(r"([\d,]+) of 65,536 tokens", stopped)
    assert held and int(held[1].replace(",", "")) > 10
    terminal.say("/temp 0.2\n")
    assert "temperature 0.2" in terminal.until("you › ")
    terminal.say("/tmp 1\n")
    assert "did you mean /temp?" in terminal.until("you › ")
    terminal.say("/temp warm\n")
    assert "'warm' is no number" in terminal.until("you › ")
    terminal.say("/temp -1\n")
    assert "0 or more" in terminal.until("you › ")
    terminal.say("/reset\n")
    assert "forgotten" in terminal.until("you › ")
    terminal.say("\x03")
    assert "/quit leaves" in terminal.until("you › ")
    terminal.say("Again\n")
    terminal.until(r"(?s)Again.*\S{3}")
    terminal.say("\x03")
    terminal.until("you › ")
    terminal.say("\x04")
    assert terminal.end() == 0


def pipe(folder: Path, lines: str, *words: str):
    return CliRunner().invoke(app, ["chat", "--model", str(folder), *words], input=lines)


def test_each_line_of_a_pipe_is_answered(folder):
    words = ["--seed", "1", "--max-new-tokens", "20"]
    first, again = (pipe(folder, "One\n\n/temp 0.3\nTwo\n", *words) for _ in range(2))
    assert first.exit_code == 0 and first.stdout == again.stdout and len(first.stdout) >= 40
    assert "temperature 0.3" in first.stderr and "you ›" not in first.stdout
    assert pipe(folder, "/quit\nOne\n", *words).stdout == ""
    late = pipe(folder, "One\n" + "x" * 300 + "\nTwo\n", *words, "--context", "128")
    assert late.exit_code == 2 and "the message has" in late.stderr  # and the others are answered
    assert late.stdout == pipe(folder, "One\nTwo\n", *words, "--context", "128").stdout


def test_the_seed_and_the_numbers(folder):
    words = ["generate", "--model", str(folder), "--prompt", "To be", "--max-new-tokens", "12", "--seed", "5"]
    first = run(*words)
    assert first.exit_code == 0 and first.stdout.startswith("To be") and first.stdout == run(*words).stdout
    for dtype in ("bf16", "int8"):
        assert run(*words, "--dtype", dtype).exit_code == 0
    two = run(*words, "--prompt", "Or not to be, that is", "--num-samples", "2")
    assert two.exit_code == 0 and two.stdout.count("To be") == two.stdout.count("Or not to be") == 2
    assert first.stdout in two.stdout, "a text does not depend on those written beside it"
    stopped = run(*words, "--stop", first.stdout[8:10])
    assert first.stdout.startswith(stopped.stdout[:-1]) and len(stopped.stdout) < len(first.stdout)


def test_what_is_exported_comes_back_bit_for_bit(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = load_hf(folder)
    assert run("export", "small.gguf", "--model", str(folder), "--kind", "F32").exit_code == 0
    assert run("export", "again", "--model", "small.gguf").exit_code == 0
    assert run("export", "LOUD.GGUF", "--model", "again", "--kind", "F32").exit_code == 0
    assert Path("again/model.safetensors").stat().st_mode == Path("again/config.json").stat().st_mode
    for model in (load_gguf("small.gguf"), load_hf("again"), open_pretrained("LOUD.GGUF").model):
        assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))
    again = open_pretrained("again")
    with pytest.raises(ValueError, match="is no device of torch's: use"):
        open_pretrained("again", device="gpu")
    assert again.template.source == CHATML
    assert same_tokenizer(again.tokenizer, load_tokenizer(str(folder)))
    for words, sentence in (
        (["again", "--model", "small.gguf"], "there already"),
        (["small.gguf", "--model", "again"], "there already"),
        (["x.gguf", "--model", "small.gguf", "--kind", "Q3"], "can hold F32, F16, Q8_0"),
        (["x", "--model", "small.gguf", "--kind", "Q8_0"], "can hold fp32, bf16, fp16"),
        (["x", "--model", "smal.gguf"], "there is no"),
        (["x"], "say which model"),
        (["x", "--model", "small.gguf", "--ckpt", "small.gguf"], "say which model"),
    ):
        result = run("export", *words)
        assert result.exit_code == 2 and sentence in result.output and not Path("x").exists(), result.output
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_run_with_windows_goes_on(text):
    """YAML makes a list of what was a tuple."""
    tokenizer = ByteTokenizer(["<|eos|>"])
    config = ModelConfig(257, 64, 32, 4, 2, 2, qk_norm=True, window=(None, 8), d_head=8)
    save_hf(Transformer(config), text.parent / "windows", tokenizer)
    how = [
        "log.name=w",
        "train.batch_size=2",
        "train.seq_len=16",
        "train.warmup_steps=0",
        "log.tensorboard=false",
    ]
    first = run("train", "train.init_from=windows", f"data.dataset={text}", "train.steps=2", *how)
    assert first.exit_code == 0, first.output
    again = run("train", "-c", "runs/w/config.yaml", "train.steps=3", "--resume")
    assert again.exit_code == 0, again.output


def test_a_model_whose_texts_began_with_bos(folder, text):
    """It is evaluated as it was trained."""
    tokenizers = pytest.importorskip("tokenizers")
    llama = shutil.copytree(folder, text.parent / "llama")
    theirs = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    bos = theirs.token_to_id("<|im_start|>")
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    theirs.save(str(llama / "tokenizer.json"))
    about = json.loads((llama / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_start|>"}
    (llama / "tokenizer_config.json").write_text(json.dumps(about))
    words = ["--data", text, "--json", "--seq-len", "32"]
    with_bos, without = (json.loads(run("eval", "--model", f, *words).stdout) for f in (llama, folder))
    ids = torch.tensor(list(text.read_bytes()))
    ids = ids[len(ids) - len(ids) // 10 :]
    windows = ids[: (len(ids) - 1) // 32 * 32].view(-1, 32)
    labels = ids[1 : windows.numel() + 1].view(-1, 32)
    with torch.no_grad():
        logits = load_hf(folder)(torch.cat([torch.full((len(windows), 1), bos), windows], dim=1))[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert with_bos["tokens"] == without["tokens"] == windows.numel()
    assert with_bos["loss"] == pytest.approx(expected, abs=1e-4) != without["loss"]


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    line = "To be, or not to be, that is the question. Whether 'tis nobler in the mind to suffer.\n"
    (tmp_path / "text.txt").write_text(line * 60, encoding="utf-8")
    return tmp_path / "text.txt"


def test_it_trains_and_goes_out_again(folder, text):
    """From a pretrained model to a run of ours, to chat, to Hugging Face."""
    overrides = [
        f"train.{name}={value}" for name, value in SMALL["train"].items() if name != "micro_batch_size"
    ]
    overrides += ["log.tensorboard=false", "log.name=tuned", f"data.dataset={text}", "train.lr=1e-3"]
    before = run("eval", "--model", folder, "--data", text, "--json", "--seq-len", "32")
    assert before.exit_code == 0, before.output
    copy = shutil.copytree(folder, text.parent / "pretrained")
    result = run("train", f"train.init_from={copy}", *overrides)
    assert result.exit_code == 0, result.output
    shutil.rmtree(copy)  # from here on the run has all that it needs
    model, about = load_model("runs/tuned/latest.ckpt")
    assert model.config == load_hf(folder).config and about["tokenizer"] == "tokenizer.json"
    after = run("eval", "--ckpt", "runs/tuned/latest.ckpt", "--json")
    assert json.loads(after.stdout)["loss"] < json.loads(before.stdout)["loss"]
    assert (
        run("train", "-c", "runs/tuned/config.yaml", "log.name=tuned", "train.steps=14", "--resume").exit_code
        == 0
    )
    assert open_pretrained("runs/tuned/latest.ckpt").template.source == CHATML
    assert run("export", "out", "--ckpt", "runs/tuned/best.ckpt", "--kind", "bf16").exit_code == 0
    assert open_pretrained("out").tokenizer.encode("né") == [110, 195, 169]

    wrong = run("train", f"train.init_from={folder}", *overrides, "data.tokenizer=byte", "log.name=w")
    assert wrong.exit_code == 2 and "another tokenizer" in wrong.output
    wrong = run("train", f"train.init_from={folder}", *overrides, f"train.seq_len={LONG + 1}", "log.name=w")
    assert wrong.exit_code == 2 and "reads at most 65,536 tokens" in wrong.output
    wrong = run("train", "train.init_from=nowhere", *overrides, "log.name=w")
    assert wrong.exit_code == 2 and "there is no model 'nowhere'" in wrong.output
    assert not Path("runs/w").exists()
    wrong = run("train", f"train.init_from={folder}", *overrides, "model.dropout=0.1", "log.name=w")
    assert wrong.exit_code == 2 and "model.dropout is 0.1, but" in wrong.output and "with 0.0" in wrong.output
    assert not Path("runs/w").exists()
    assert "parameters" in run("train", f"train.init_from={folder}", *overrides, "--dry-run").output


@pytest.mark.parametrize("mode", ["0", "1"])
def test_bytes_that_are_no_text_are_said_in_a_sentence(folder, mode):
    """By `chat` and by `generate`."""
    how = {"env": {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": mode}, "capture_output": True}
    python = [sys.executable, "-m"]
    words = ["--model", str(folder), "--max-new-tokens", "3", "--seed", "1"]
    result = subprocess.run(
        [*python, "tutorial_lib.cli.generate", *words, "--prompt", "-"], input=b"x\xff", **how
    )
    assert (
        result.returncode == 2 and result.stderr == b"error: what was typed or piped in is not UTF-8 text\n"
    )
    lines = b"x\xff\n/system x\xff\nHello\n"
    result = subprocess.run([*python, "tutorial_lib.cli.chat", *words], input=lines, **how)
    assert result.returncode == 2 and result.stderr == b"error: this line is not UTF-8 text\n" * 2
    assert result.stdout, "the line that is text is answered"


def test_no_terminal_obeys_a_model_or_its_template(folder, tmp_path):
    """Escapes could rename the window, clear what was said before, or type: a pipe has them, a terminal does not."""
    evil = shutil.copytree(folder, tmp_path / "evil")
    model = load_hf(folder)
    with torch.no_grad():
        model.head.weight[:, 0], model.head.weight[27, 0] = 0.0, 50.0  # always ESC
    weights = load_file(evil / "model.safetensors")
    save_file({**weights, "lm_head.weight": model.head.weight.detach().clone()}, evil / "model.safetensors")
    about = json.loads((evil / "tokenizer_config.json").read_text())
    about["chat_template"] = "{{ raise_exception('\x1b]0;owned\x07 \u202etxt') }}"
    (evil / "tokenizer_config.json").write_text(json.dumps(about))
    words = ["--model", str(evil), "--max-new-tokens", "8"]
    assert run("generate", "--prompt", "A", *words).stdout == "A" + "\x1b" * 8 + "\n"

    def shown(command: str, *more: str) -> str:
        parent, child = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", f"tutorial_lib.cli.{command}", *words, *more]
        subprocess.run(line, input=b"Hello\n", stdout=child, stderr=child, env=environment)  # fmt: skip
        os.close(child)
        said = b""
        try:
            while block := os.read(parent, 1 << 16):
                said += block
        except OSError:  # how Linux says that nobody holds the other end
            pass
        os.close(parent)
        return said.decode()

    assert "A" + "�" * 8 in shown("generate", "--prompt", "A")
    complaint = shown("chat")
    assert "]0;owned" in complaint and not set("\x1b\x07\u202e") & set(complaint)
