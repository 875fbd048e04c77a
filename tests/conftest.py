"""What all tests share: fresh exercises, no deadlines for hypothesis, and at the end the kill rate of the mutants."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from tutorial_lib.nb.exercises import regenerate
from tutorial_lib.nb.graph import ROOT

# Time is reported, never asserted: a slow machine is not a failure.
settings.register_profile("course", deadline=None)
settings.load_profile("course")


@pytest.fixture(scope="session")
def fresh_exercises(tmp_path_factory) -> Path:
    """exercises/ as its solutions give it: what stands in the repository may hold a learner's work."""
    course = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "solutions", course / "solutions")
    shutil.copy(ROOT / "pyproject.toml", course)
    done = regenerate(course)
    assert not done.errors, done.errors
    return course / "exercises"


def pytest_terminal_summary(terminalreporter):
    rows = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                rows += [value for name, value in report.user_properties if name == "mutants"]
    if rows:
        killed, survived = sum(r[1] for r in rows), sum(r[2] for r in rows)
        terminalreporter.section("mutants of the solutions")
        for exercise, dead, alive in sorted(rows):
            terminalreporter.line(f"  {exercise}  {dead:>3} of {dead + alive:>3} killed")
        rate = killed / max(1, killed + survived)
        total = f"{killed} of {killed + survived} killed ({rate:.1%})"
        terminalreporter.line(f"  all    {total}; the survivors are listed as equivalent")
