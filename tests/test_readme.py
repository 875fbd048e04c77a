"""Every command of the README runs, small; those that do not are listed, with the reason.

The commands are read from the README, so one that is added there is run here, or this test asks for it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.clones import READY, make_clone, make_course, run
from tutorial_lib.data.corpora import load_text
from tutorial_lib.nb.graph import ROOT
from tutorial_lib.nb.stubs import STUB

README = (ROOT / "README.md").read_text(encoding="utf-8")

NOT_RUN = {
    "git clone https://github.com/ahmad-wincode/llm-from-scratch": "from the network; `make_clone` clones",
    "cd llm-from-scratch": "where all of this runs",
    "make setup": "installs; every CI run begins with it",
    "make setup TORCH_BACKEND=cpu": "installs",
    "conda env create -f environment.yml": "installs",
    "source .venv/bin/activate": "a shell's own",
    "make tour": "two minutes; tests/tour/test_tour.py makes a short one",
    "python -m tutorial_lib.tour": "the same",
    "make test": "this is it",
    "make test-fast": "this is part of it",
    "make lab": "a server that stays; tests/test_browser.py opens one",
    "make bench": "minutes, and needs transformers' weights in memory beside ours",
    "tensorboard --logdir runs": "a server that stays; tests/train/test_loggers.py reads the event files",
    "torchrun --nproc-per-node 2 -m tutorial_lib.cli.train --config configs/base.yaml": "two GPUs; "
    "tests/train/test_distributed.py runs two processes",
    "torchrun --nproc-per-node 2 -m tutorial_lib.cli.train --config configs/base.yaml train.parallel=fsdp": "the same",
    "git pull --no-rebase": "`make update` is it",
    "make update FROM=https://github.com/ahmad-wincode/llm-from-scratch": "from the network; run without FROM",
}
ENDS_WITH = {"make check-chapter 1": 2}  # exercises are left to do
TINY = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_windows": 2, "eval_every": 2, "save_every": 2}
TINY |= {"warmup_steps": 1}


def commands() -> list[str]:
    """Those of the code blocks, in order, and those in the text."""
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)).splitlines()
    found = [re.split(r"\s+#", f" {line}")[0].strip() for line in lines]
    words = "make|python -m|conda|llm-scratch|tensorboard|source|git|torchrun"
    found += re.findall(rf"`((?:{words}) [^`\n]+)`", README)
    return [command for command in dict.fromkeys(found) if command]


def chosen(start: str) -> list[str]:
    return [c for c in commands() if c.startswith(start) and c not in NOT_RUN]


def small(command: str) -> list[str]:
    """The command's words, with less to do; steps are 3 where a run goes on."""
    words = shlex.split(command.replace("8192", "300"))[1:]
    if words[0] in ("train", "sft") and "--dry-run" not in words:
        tiny = TINY | ({"steps": 3} if "--resume" in words else {})
        words = [word for word in words if word.partition("=")[0].removeprefix("train.") not in tiny]
        words += [f"train.{key}={value}" for key, value in tiny.items()]
        words += ["sft.n_problems=40"] if words[0] == "sft" else []
    elif "--problems" in words:
        words[words.index("--problems") + 1] = "1"
    elif words[0] == "eval":
        words = [*words, "--max-windows", "1"]
    elif words[0] in ("generate", "chat"):
        words = [*words, "--max-new-tokens", "2"]
    return words


# One process for many commands: most of a small command's time is the import of torch.
RUN_ALL = """
import io, json, sys
from tutorial_lib.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv, sys.stdin = ["llm-scratch", *words], io.StringIO("Who are you?\\n/quit\\n")
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{words} ended with {end.code}")
    print("done:", *words, flush=True)
"""


def run_small(folder: Path, some: list[str]) -> str:
    words = [small(command) for command in some]
    out = run(folder, sys.executable, "-c", RUN_ALL, json.dumps(words))
    assert out.count("done:") == len(some) > 0, out
    return out


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    clone = make_clone(make_course(home / "course"), home / "clone")
    (clone / "my").mkdir()
    (clone / "my/plays.txt").write_bytes(load_text("shakespeare")[:60_000])
    talks = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(60)]
    (clone / "my/talks.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    return clone


def test_the_list_of_what_is_not_run_is_up_to_date():
    found = commands()
    assert len(found) > 35 and not [c for c in NOT_RUN if c not in found]
    known = ("llm-scratch ", "make ", "git ", "python -m ", ".venv/bin/pre-commit install")
    assert not [c for c in found if c not in NOT_RUN and not c.startswith(known)]


@pytest.mark.slow
def test_commands_of_make_and_git(clone: Path):
    path = clone / "exercises/part_1_core_transformer/1_4_multi_head_attention.ipynb"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(STUB, "return x", 1), encoding="utf-8")
    for command in [*chosen("make "), *chosen("git "), *chosen("python -m "), *chosen(".venv/")]:
        words = shlex.split(command)
        words = [*READY, *words[1:]] if words[0] == "make" else words
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        words = [".venv/bin/python", "-m", "pre_commit", "install"] if "pre-commit" in command else words
        out = run(clone, *words, rc=1 if "checks chapter" in command else ENDS_WITH.get(command, 0))
        assert out or "restore" in command, command
    assert "return x" in path.read_text(encoding="utf-8"), "the learner's work outlives them all"


@pytest.mark.slow
def test_commands_of_a_run_of_ones_own(clone: Path):
    mine = [c for c in chosen("llm-scratch ") if "smollm2" not in c and "bard" not in c]
    assert len(mine) >= 8
    out = run_small(clone, mine)
    assert "going on from runs/tiny/step_00000002.ckpt" in out and "124" in out
    names = ("tiny", "mine", "bpe", "moe", "grown", "sft", "talks", "moe_sft")
    assert all((clone / "runs" / name / "latest.ckpt").is_file() for name in names)


@pytest.mark.slow
def test_commands_with_a_real_model(clone: Path):
    real = [c for c in chosen("llm-scratch ") if "smollm2" in c or "bard" in c]
    assert len(real) >= 8
    run_small(clone, real)
    assert (clone / "bard.gguf").stat().st_size > 100_000_000 and (clone / "bard/config.json").is_file()
    for folder in ("runs/bard", "bard"):  # gigabytes, which pytest would keep for three runs
        shutil.rmtree(clone / folder)


@pytest.mark.slow
def test_the_python_blocks(clone: Path, tmp_path: Path):
    """One after the other, in one process; the tour's model is one that never learned."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks).replace("ids, 300,", "ids, 3,").replace("max_new_tokens=40", "max_new_tokens=8")
    model = "Transformer(ModelConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=256))"
    before = (
        "import os; os.makedirs('runs/tour', exist_ok=True)\n"
        "from tutorial_lib.core.model import ModelConfig, Transformer\n"
        "from tutorial_lib.interop.checkpoint import save_model\n"
        f"save_model('runs/tour/best.safetensors', {model})\n"
    )
    after = "\nassert Sharp().loss and Wide(WideConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=256))"
    out = run(clone, sys.executable, "-c", before + code + after)
    assert "7,241,732,096" in out and "Paris" in out
