"""The house in order: links that lead somewhere, one path in four trees, no traces of a machine, advice that works.

exercises/ and the outputs of lessons are the learner's as soon as the repository is cloned, so nothing here looks at
them; what is published is judged by `make lint ARGS=--published`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tutorial_lib.nb.form import badge_source
from tutorial_lib.nb.graph import ROOT
from tutorial_lib.nb.normalise import A_MACHINE
from tutorial_lib.nb.notebooks import notebooks

NOTEBOOKS = notebooks(ROOT)
ids = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def dead_links(text: str, folder: Path) -> list[str]:
    found = [a or b for a, b in LINK.findall(text)]
    local = [x.split("#")[0] for x in found if not re.match(r"[a-z]+:|#|%", x)]
    return [x for x in local if x and not (folder / x).exists()]


@pytest.mark.parametrize("name", ["README.md", "docs/AUTHORING.md"])
def test_links_of_the_texts(name):
    path = ROOT / name
    assert not dead_links(path.read_text(encoding="utf-8"), path.parent)


@each_notebook
def test_links_of_the_notebooks(path):
    text = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    assert not dead_links(text, path.parent)


@each_notebook
def test_one_path_four_trees(path):
    tail = Path(*path.relative_to(ROOT).parts[1:])
    assert all((ROOT / tree / tail).is_file() for tree in ("chapters", "solutions", "exercises"))
    assert (ROOT / "grading" / tail).with_suffix(".py").is_file()


def test_no_trace_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    bad = []
    for name in listed.stdout.split():
        if name.startswith("tests/") or not name.endswith(
            (".py", ".md", ".toml", ".yml", ".txt", "Makefile")
        ):
            continue
        path = ROOT / name
        if path.is_file() and (found := A_MACHINE.search(path.read_text(encoding="utf-8"))):
            bad.append(f"{name}: {found[0]}")
    assert not bad


ADVICE = re.compile(r"""pip install (?:-q )?["']?([\w.\[\]-]+)( @ git\+)?""")


def test_what_we_advise_to_install_is_there_to_be_installed():
    """The course itself is on no package index: it comes from its repository, and what it uses, by its own name."""
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "tutorial_lib").rglob("*.py")]
    texts += ["\n".join("".join(c["source"]) for c in cells(path)) for path in NOTEBOOKS]
    texts += [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/AUTHORING.md")]
    advised = {match.groups() for text in texts for match in ADVICE.finditer(text)}
    known = set(re.findall(r'"([\w-]+)[\["<>=]', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert ("llm-from-scratch[lessons]", " @ git+") in advised
    for name, from_git in advised:
        assert from_git or name.replace("_", "-") in known | {"flash-attn", "xformers"}, name
    # Where the code says `pip install {package}`, these are the packages.
    assert {"tensorboard", "wandb", "phonenumbers", "python-stdnum"} <= known


IN_EVERY_KERNEL = {"IPython", "psutil"}  # ipykernel brings them
IMPORTED_AS = {"stdnum": "python-stdnum", "huggingface_hub": "huggingface-hub"}


def test_colab_installs_what_the_notebooks_import():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r"^(?:dependencies|interop|logging|data|lessons) = \[(.*?)\]$", text, re.M | re.S)
    installed = set(re.findall(r'"([\w-]+)[\["<>=]', "\n".join(wanted))) | IN_EVERY_KERNEL
    assert {"torch", "gguf", "webdataset", "ipywidgets"} <= installed
    for path in NOTEBOOKS:
        for cell in cells(path):
            imports = re.findall(r"^(?:import|from) (\w+)", "".join(cell["source"]), re.MULTILINE)
            for name in imports if cell["cell_type"] == "code" else ():
                known = name in sys.stdlib_module_names or name == "tutorial_lib"
                assert known or IMPORTED_AS.get(name, name) in installed, f"{path.name} imports {name}"


def test_the_readme_opens_a_lesson_of_every_part_on_colab():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for part in sorted((ROOT / "chapters").glob("part_*")):
        first = min(part.glob("[0-9]*.ipynb")).relative_to(ROOT).as_posix()
        assert badge_source(first) in text, f"no badge for {first}"


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    explained = set(re.findall(r"^([a-z][a-z-]*):.*## ", text, re.MULTILINE))
    assert targets == explained
    promised = "setup tour test test-fast lab check-chapter hint progress export exercises lint help".split()
    assert set(promised) <= explained


def test_ci_runs_the_readmes_test_command():
    assert "make test " in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
