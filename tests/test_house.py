"""The house in order: links that lead somewhere, notebooks of a decent size, no traces of a machine."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p for tree in ("chapters", "solutions", "exercises") for p in (ROOT / tree).rglob("*.ipynb")
)
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]
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
def test_notebooks_are_whole_and_small(path):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    stored = [output for c in code for output in c["outputs"]]
    assert path.stat().st_size <= 600_000
    assert not [o for o in stored if o["output_type"] == "error"]
    tree = path.relative_to(ROOT).parts[0]
    assert bool(stored) == (tree == "chapters"), "lessons have outputs, exercises and solutions have none"


@each_notebook
def test_one_path_four_trees(path):
    tail = Path(*path.relative_to(ROOT).parts[1:])
    assert all((ROOT / tree / tail).is_file() for tree in ("chapters", "solutions", "exercises"))
    assert (ROOT / "grading" / tail).with_suffix(".py").is_file()


def test_no_trace_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    here = re.compile(r"/(work|root|tmp|home/\w+)/[\w.]|ipykernel_\d+")
    bad = []
    for name in listed.stdout.split():
        if name.startswith("tests/") or not name.endswith(
            (".ipynb", ".py", ".md", ".toml", ".yml", ".txt", "Makefile")
        ):
            continue
        path = ROOT / name
        if path.is_file() and (found := here.search(path.read_text(encoding="utf-8"))):
            bad.append(f"{name}: {found[0]}")
    assert not bad


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
