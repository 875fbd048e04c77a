"""`make check-chapter N`, `make hint ID` and `make progress`.

Exit code: 0 when every exercise passes, 1 when one is wrong, crashed or not started, 2 when asked wrongly.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tutorial_lib.checks.confine import what_stays_open
from tutorial_lib.checks.grade import Result
from tutorial_lib.checks.gradings import all_exercises, find_exercise, grading_files
from tutorial_lib.checks.notebook import find_home, notebook_of, statements
from tutorial_lib.checks.progress import next_hint, overview, record, recorded
from tutorial_lib.checks.report import as_text, chapter_table, summary
from tutorial_lib.checks.sandbox import grade_notebook

SAVE = " If you have written there, save the notebook (Ctrl-S): the file is what counts here."


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _titles(lesson: str) -> dict[str, str]:
    """Its exercises' titles, from the course's own notebook: a learner's may be damaged."""
    home = find_home()
    path = notebook_of(lesson, home / "solutions") if home else None
    return {s.id: s.title for s in statements(path).values()} if path else {}


def _passed_before(results: list[Result]) -> list[str]:
    """The exercises that are not started, to go by the file, and that `check()` has seen solved in the kernel."""
    return [r.id for r in results if r.status == "not started" and recorded(r.id) == "passed"]


def chapter(part: str, tree: Path, verbose: bool = False, as_json: bool = False, strict: bool = False) -> int:
    """Grade all exercises of a part, and say how it went.

    Args:
        strict: The tree is somebody else's.
    """
    parts = sorted({e.part for e in all_exercises().values()})
    exercises = [e for e in all_exercises().values() if str(e.part) == part]
    if not exercises:
        asked = f"there is no chapter {part!r}" if part else "say which chapter"
        return _fail(
            f"{asked}: the chapters with exercises are {', '.join(map(str, parts))} (make check-chapter 1)"
        )
    results: list[Result] = []
    titles: dict[str, str] = {}
    show_progress = not as_json and sys.stderr.isatty()
    for lesson in dict.fromkeys(e.lesson for e in exercises):
        mine = [e for e in exercises if e.lesson == lesson]
        path = notebook_of(lesson, tree)
        if path is None:
            grading = grading_files()[lesson]  # at the notebook's own path, in its tree
            name = f"{grading.parent.name}/{grading.stem}.ipynb"
            return _fail(f"{tree / name} is not there: `make exercises` writes it again")
        titles |= _titles(lesson)
        for exercise in mine:
            if show_progress:
                print(f"\r  … {exercise.id}", end="\033[K", file=sys.stderr, flush=True)
            results += grade_notebook(path, [exercise], strict)
    if show_progress:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    unsaved = _passed_before(results) if tree.name == "exercises" else []
    if tree.name == "exercises":
        record(result for result in results if result.id not in unsaved)
    if as_json:
        print(json.dumps({"chapter": int(part), "exercises": [r.to_json() for r in results]}, indent=1))
    else:
        for result in results:
            if verbose or result.status in ("wrong", "crashed"):
                print(as_text(result, verbose), end="\n\n")
        print(chapter_table(results, titles))
        print(f"\n  Chapter {part}: {summary(results)}")
        if unsaved:
            print(f"  {', '.join(unsaved)}: solved when check() saw it, and in the file as it came.{SAVE}")
        elif any(result.status == "not started" for result in results):
            print(f"  Not started: the notebook's file holds the stub as it came.{SAVE}")
        if strict and (open_still := what_stays_open()):
            print(f"  {open_still}")
    return 0 if all(result.passed for result in results) else 1


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tutorial_lib.checks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("chapter", help="grade the exercises of a part")
    one.add_argument("part")
    one.add_argument("--tree", type=Path, help="folder with the notebooks (default: exercises/)")
    one.add_argument("--verbose", action="store_true", help="show every probe, and tracebacks")
    one.add_argument("--strict", action="store_true", help="for the work of others: see SECURITY.md")
    one.add_argument("--json", action="store_true", help="print the results as JSON")
    two = commands.add_parser("hint", help="the next hint for an exercise")
    two.add_argument("id")
    two.add_argument("--all", action="store_true", help="all hints")
    commands.add_parser("progress", help="what is done, what is next")
    args = parser.parse_args(argv)
    home = find_home()
    if home is None and not (args.command == "chapter" and args.tree):
        return _fail("the course's folder is not here: run this inside a clone of it")
    try:
        grading_files()
    except FileNotFoundError as error:
        return _fail(str(error))
    if args.command == "progress":
        print(overview())
        return 0
    if args.command == "hint":
        if not args.id:
            return _fail("say which exercise: make hint 1.4.a")
        try:
            print(next_hint(find_exercise(args.id), args.all))
        except KeyError as error:
            return _fail(error.args[0])
        return 0
    try:
        return chapter(args.part, args.tree or home / "exercises", args.verbose, args.json, args.strict)  # type: ignore[operator]
    except OSError as error:  # no solutions here to grade strictly by, or no processes
        return _fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
