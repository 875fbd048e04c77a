"""`make check-chapter N`, `make hint ID` and `make progress`.

Exit code: 0 when every exercise passes, 1 when one is wrong, crashed or not started, 2 when asked wrongly.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tutorial_lib.checks.grade import Result
from tutorial_lib.checks.gradings import all_exercises, find_exercise, grading_files
from tutorial_lib.checks.notebook import find_home, notebook_of, statements
from tutorial_lib.checks.progress import next_hint, overview, record
from tutorial_lib.checks.report import as_text, chapter_table, summary
from tutorial_lib.checks.sandbox import grade_notebook


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def chapter(part: str, tree: Path, verbose: bool = False, as_json: bool = False) -> int:
    """Grade all exercises of a part, and say how it went."""
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
        try:
            titles |= {s.id: s.title for s in statements(path).values()}
        except ValueError:
            pass  # a damaged notebook is said below, exercise by exercise
        for exercise in mine:
            if show_progress:
                print(f"\r  … {exercise.id}", end="\033[K", file=sys.stderr, flush=True)
            results += grade_notebook(path, [exercise])
    if show_progress:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if tree.name == "exercises":
        record(results)
    if as_json:
        print(json.dumps({"chapter": int(part), "exercises": [r.to_json() for r in results]}, indent=1))
    else:
        for result in results:
            if verbose or result.status in ("wrong", "crashed"):
                print(as_text(result, verbose), end="\n\n")
        print(chapter_table(results, titles))
        print(f"\n  Chapter {part}: {summary(results)}")
    return 0 if all(result.passed for result in results) else 1


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tutorial_lib.checks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("chapter", help="grade the exercises of a part")
    one.add_argument("part")
    one.add_argument("--tree", type=Path, help="folder with the notebooks (default: exercises/)")
    one.add_argument("--verbose", action="store_true", help="show every probe, and tracebacks")
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
    return chapter(args.part, args.tree or home / "exercises", args.verbose, args.json)  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(main())
