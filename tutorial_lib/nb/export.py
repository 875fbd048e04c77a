"""Write the package's modules from the lessons, so that they read as if written by hand.

    python -m tutorial_lib.nb.export [--check]

On top of a code cell, nbdev's directives: `#| default_exp core.rope` names the notebook's module, `#| export`
sends the cell there, `#| export core.masks` to another. An exported cell holds imports and definitions only;
the first one for a module begins with the module's docstring. A comment glued to an import moves with it.

Everything is composed and judged before the first byte is written: one error, and nothing changes.
"""

from __future__ import annotations

import argparse
import sys
from itertools import zip_longest
from pathlib import Path

from tutorial_lib.nb import graph
from tutorial_lib.nb.cells import collect, path_of
from tutorial_lib.nb.compose import compose, faults, polish


def plan(root: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(what the lessons export, what the package holds, what is wrong): two `{path: text}` and sentences."""
    root = root.resolve()
    problems: list[str] = []
    package = graph.read_package(root)
    modules = collect(root, problems)
    for module, cells in modules.items():
        problems += faults(module, cells)
    if problems:
        return {}, package, list(dict.fromkeys(problems))
    texts = {path_of(module): compose(cells) for module, cells in modules.items()}
    notebook = {path_of(module): cells[0].notebook for module, cells in modules.items()}
    new = polish(texts, notebook, root, problems)
    for path, text in package.items():
        source = graph.notebook_of(text)
        if path in new and text.strip() and not source:
            problems.append(
                f"{path} is written by hand, and {notebook[path]} would overwrite it: export to another "
                "module, or delete the file if the lesson replaces it."
            )
        elif source and path not in new:
            gone = "no longer exports it" if (root / source).is_file() else "is gone"
            problems.append(
                f"{path} is an orphan: {source} {gone}: delete the module, or bring its export back."
            )
    for path in list(new):
        for room in Path(path).parents[:-1]:
            init = f"{room.as_posix()}/__init__.py"
            if init not in package:
                new[init] = ""
    problems += graph.violations(graph.build({**package, **new}))
    return new, package, problems


def drift(path: str, new: str, root: Path) -> str:
    """One sentence on how a committed module differs from its lesson's export."""
    file = root / path
    source = graph.notebook_of(new)
    if not file.is_file():
        return f"{path} is missing{f', {source} exports it' if source else ''}: run make export."
    old = file.read_text(encoding="utf-8")
    pairs = zip_longest(old.split("\n"), new.split("\n"))
    line = next(i for i, (a, b) in enumerate(pairs, 1) if a != b)
    # A minute of grace: a fresh clone writes both at about the same time.
    if file.stat().st_mtime > (root / source).stat().st_mtime + 60:
        return (
            f"{path} differs from {source}, first in line {line}, and is the newer of the two, so it looks "
            "edited by hand: make the change in the notebook, then run make export."
        )
    return (
        f"{path} differs from {source}, first in line {line}: run make export (if that line was edited by "
        "hand, first make the change in the notebook)."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_lib.nb.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a module differs")
    parser.add_argument("--root", type=Path, default=graph.ROOT, help="the repository (default: this one)")
    args = parser.parse_args(argv)
    root: Path = args.root
    try:
        new, package, problems = plan(root)
    except ValueError as error:
        new, package, problems = {}, {}, [str(error)]
    stale = [path for path in sorted(new) if package.get(path) != new[path]]
    if args.check and not problems:
        problems = [drift(path, new[path], root) for path in stale]
    for problem in problems:
        print(f"✗ {problem}", file=sys.stderr)
    if problems:
        return 1
    for path in stale:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(new[path], encoding="utf-8")
        print(f"wrote {path}")
    print(f"{sum(map(bool, new.values()))} modules agree with their lessons")
    return 0


if __name__ == "__main__":
    sys.exit(main())
