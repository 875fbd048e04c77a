"""How a result looks: in a terminal, in a notebook, and as a table of a whole chapter."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from tutorial_lib.checks.notebook import find_home

__all__ = ["SYMBOLS", "as_html", "as_text", "chapter_table", "summary"]

SYMBOLS = {"passed": "✓", "wrong": "✗", "crashed": "!", "not started": "○"}
COLOURS = {"passed": "#2a9d5c", "wrong": "#d1495b", "crashed": "#b86e00", "not started": "#6c757d"}
CRASHED = "It could not be run to the end"
PROBE_SYMBOLS = {"passed": "✓", "failed": "✗", "not run": "–"}

Result = Any  # checks.grade.Result, which imports this module to show itself: naming it here makes a circle


def _count(result: Result) -> str:
    passed, n = list(result.probes.values()).count("passed"), len(result.probes)
    if result.status == "not started":
        return "not started"
    return f"all {n} probes pass" if passed == n else f"{passed} of {n} probes pass"


def _full_stop(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else sentence + "."


def _hint(result: Result, which: str) -> str:
    here = find_home() is not None
    return f"{which} hint: make hint {result.id}" if here else f"{which} hint: below the task"


def _look_again(result: Result) -> str:
    lesson = result.id.rpartition(".")[0]
    return f"Look again at lesson {lesson}, “{result.look_again}”.    {_hint(result, 'Next')}"


def _variant(result: Result) -> str:
    return f"this equals the variant “{result.diagnosis}”. {result.explanation}"


def as_text(result: Result, verbose: bool = False) -> str:
    """A few lines of plain text."""
    lines = [f"{SYMBOLS[result.status]} {result.id}  {result.symbol}".ljust(52) + _count(result)]
    if result.status == "not started":
        lines.append(f"  {_hint(result, 'First')}")
        return "\n".join(lines)
    if result.passed and not verbose:
        return lines[0]
    passed = [name for name, state in result.probes.items() if state == "passed"]
    if passed:
        lines.append("  " + "   ".join(f"✓ {name}" for name in passed))
    failed = [name for name, state in result.probes.items() if state == "failed"]
    if result.status == "crashed":
        at = f" (while checking: {failed[0]})" if failed else ""
        lines.append(f"  ! {CRASHED}{at}: {_full_stop(result.sentence)}")
    elif failed:
        lines.append(f"  ✗ {failed[0]}: {result.sentence}")
    width = max(map(len, result.table), default=0)
    lines += [f"      {key.ljust(width)}  {value}" for key, value in result.table.items()]
    if result.diagnosis:
        lines.append(f"  What happened: {_variant(result)}")
    lines += [f"  – {name}: not run" for name, state in result.probes.items() if state == "not run"]
    if not result.passed:
        lines.append(f"  {_look_again(result)}")
    if verbose and result.details:
        lines += ["", *("    " + line for line in result.details.rstrip().splitlines())]
    return "\n".join(lines)


def as_html(result: Result) -> str:
    """A small card for a notebook. Colours hold on light and dark themes."""
    colour = COLOURS[result.status]
    head = (
        f'<div style="font-weight:600">'
        f'<span style="color:{colour}">{SYMBOLS[result.status]} {escape(result.id)}</span>'
        f" &nbsp;<code>{escape(result.symbol)}</code>"
        f'<span style="float:right;font-weight:400">{escape(_count(result))}</span></div>'
    )
    if result.status == "not started":
        body = (
            "<div>Replace the line <code>raise NotImplementedError</code>, or, in a debug exercise, "
            "find the bug. The first hint is below the task.</div>"
        )
    else:
        body = _probes_html(result) + ("" if result.passed else _finding_html(result))
    return (
        f'<div style="border-left:4px solid {colour};padding:6px 12px;margin:4px 0;max-width:52em;'
        f'line-height:1.5">{head}{body}</div>'
    )


def _probes_html(result: Result) -> str:
    marks = " &nbsp; ".join(
        f'<span style="white-space:nowrap;opacity:{0.55 if state == "not run" else 1}">'
        f"{PROBE_SYMBOLS[state]} {escape(name)}</span>"
        for name, state in result.probes.items()
    )
    return f'<div style="font-size:90%">{marks}</div>'


def _finding_html(result: Result) -> str:
    """What is wrong, the numbers side by side, whose mistake it is, and where to look."""
    crashed = result.status == "crashed"
    sentence = f"{CRASHED}: {_full_stop(result.sentence)}" if crashed else result.sentence
    rows = [f"<div>{escape(sentence)}</div>"]
    if result.table:
        cells = "".join(
            f'<tr><td style="text-align:left;opacity:.7;vertical-align:top">{escape(key)}</td>'
            f'<td style="text-align:left"><code>{escape(value)}</code></td></tr>'
            for key, value in result.table.items()
        )
        rows.append(f'<table style="margin:4px 0">{cells}</table>')
    if result.diagnosis:
        rows.append(f"<div><b>What happened:</b> {escape(_variant(result))}</div>")
    rows.append(f'<div style="opacity:.8">{escape(_look_again(result))}</div>')
    return "".join(rows)


def chapter_table(results: Sequence[Result], titles: dict[str, str]) -> str:
    """One line for each exercise."""
    lines = []
    for r in results:
        title = titles.get(r.id, r.symbol)
        lines.append(f"  {SYMBOLS[r.status]} {r.id:<7} {title[:44]:<45} {r.status}")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """ "3 passed · 1 wrong · 2 not started"."""
    counts = {status: sum(r.status == status for r in results) for status in SYMBOLS}
    return " · ".join(f"{n} {status}" for status, n in counts.items() if n) or "no exercises"
