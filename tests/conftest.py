"""What all tests share: no deadlines for hypothesis, and the kill rate of the mutants at the end of a run."""

from __future__ import annotations

from hypothesis import settings

# Time is reported, never asserted: a slow machine is not a failure.
settings.register_profile("course", deadline=None)
settings.load_profile("course")


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
