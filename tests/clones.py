"""The course in a repository of its own, and a learner's clone of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tutorial_lib.nb.exercises import regenerate
from tutorial_lib.nb.graph import ROOT

READY = ["make", "-o", ".venv/.ready"]
"""make, where the environment that runs the tests stands for the one that `make setup` would make."""


def run(folder: Path, *words: str, rc: int = 0, stdin: str = "") -> str:
    """Run a command in a clone, as its owner would; what it printed."""
    foreign = ("GIT_", "MAKE", "MFLAGS", "PYTEST_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment |= {
        "PRE_COMMIT_HOME": str(folder.parent / "hooks"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),  # the clone's package, also for a command that stands in .venv/bin
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, input=stdin)
    assert done.returncode == rc, f"{' '.join(words)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def commit_all(folder: Path, message: str) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "-qm", message)


def make_course(course: Path) -> Path:
    """The repository as it stands here, with nobody's work in it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not shutil.which("make"):
        pytest.skip("needs make, and a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("exercises/part_", ".venv")):
            (course / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, course / name)
    assert not regenerate(course).errors
    run(course, "git", "init", "-q", "-b", "main")
    _introduce(course)
    commit_all(course, "feat: the course")
    return course


def make_clone(course: Path, clone: Path) -> Path:
    """A learner's clone, set up."""
    run(course, "git", "clone", "-q", str(course), str(clone))
    _introduce(clone)
    (clone / ".venv").symlink_to(sys.prefix)
    (clone / ".git/info/exclude").write_text(".venv\n")  # which is a link here, and no folder
    driver = re.search(r"git config merge\.notebook\.driver '(.*?)'", (clone / "Makefile").read_text())
    run(clone, "git", "config", "merge.notebook.driver", driver[1].replace("$(PY)", ".venv/bin/python"))
    return clone


def _introduce(folder: Path) -> None:
    run(folder, "git", "config", "user.name", "Somebody")
    run(folder, "git", "config", "user.email", "somebody@example.org")
