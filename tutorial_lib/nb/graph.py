"""The import graph is the curriculum: read it, print it, and hold it to the law.

    python -m tutorial_lib.nb.graph

A module that a lesson exports belongs to that lesson, (part, number), which its header line names. Every
other module is plain. The law:

1. an exported module reaches no later lesson, neither directly nor through plain modules;
2. no import between folders goes up: the house has floors, see `FLOORS`;
3. no circle, anywhere.

Imports inside functions and under `TYPE_CHECKING` count as well: they, too, make one idea depend on another.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "tutorial_lib"
FLOORS = (
    ("files", "viz"),
    ("tools",),
    ("core",),
    ("data",),
    ("moe", "quant"),
    ("train",),
    ("serve",),
    ("sft", "rlhf"),
    ("kinds",),
    ("interop",),
    ("eval",),
    ("runs",),
    ("cli", "tour"),
    ("nb",),
    ("checks",),
)
"""The folders of the package, and the modules beside them, the ground floor first. Rooms on one floor may not import
each other."""
ROOT = Path(__file__).resolve().parents[2]

_HEADER = re.compile(r"# Exported from (?P<notebook>\S+\.ipynb)\.(?:\s|$)")
_LESSON = re.compile(r"(\d+)_(\d+)(?:_\S+)?")

Lesson = tuple[int, int]


@dataclass(frozen=True)
class Module:
    """One file of the package: where it is, which lesson made it (None: plain), what it imports."""

    name: str
    path: str
    notebook: str | None
    lesson: Lesson | None
    imports: tuple[str, ...]

    def __str__(self) -> str:
        return f"{short(self.name)} ({dotted(self.lesson) if self.lesson else 'plain'})"


def short(name: str) -> str:
    """`tutorial_lib.core.rope` -> `core.rope`."""
    return name.removeprefix(PACKAGE + ".")


def dotted(lesson: Lesson) -> str:
    return f"{lesson[0]}.{lesson[1]}"


def notebook_of(source: str) -> str | None:
    """The notebook that an exported module's first line names; None for a plain module."""
    found = _HEADER.match(source)
    return found["notebook"] if found else None


def lesson_of(notebook: str) -> Lesson | None:
    """`chapters/part_3_modernizing/3_2_rope.ipynb` -> (3, 2)."""
    found = _LESSON.fullmatch(Path(notebook).stem)
    return (int(found[1]), int(found[2])) if found else None


def read_package(root: Path) -> dict[str, str]:
    """The source of every module below root, keyed by its path (`tutorial_lib/core/rope.py`)."""
    # An installed package brings the gradings along; in the repository they lie outside.
    files = sorted(f for f in (root / PACKAGE).rglob("*.py") if "grading" not in f.relative_to(root).parts)
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


def imported_names(tree: ast.AST, name: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every name that module `name` imports, as (absolute dotted name, line), at any depth of the code.

    `from a.b import c` gives `a.b.c`: whether c is a module or something inside a.b is for the caller.
    """
    home = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield ".".join(base if alias.name == "*" else [*base, alias.name]), node.lineno


def build(sources: Mapping[str, str]) -> dict[str, Module]:
    """Parse `{path: source}` into modules by name. A file that is not Python is a ValueError naming it."""
    names = {_module_name(path): path for path in sources}
    graph: dict[str, Module] = {}
    for name, path in names.items():
        try:
            tree = ast.parse(sources[path])
        except SyntaxError as error:
            raise ValueError(f"{path}, line {error.lineno}, is not Python ({error.msg}): mend it.") from error
        is_package = path.endswith("__init__.py")
        targets = {_nearest(target, names) for target, _ in imported_names(tree, name, is_package)}
        # A package that names one of its own attributes imports nothing new.
        targets -= {None, name} if is_package else {None}
        notebook = notebook_of(sources[path])
        lesson = lesson_of(notebook) if notebook else None
        graph[name] = Module(name, path, notebook, lesson, tuple(sorted(filter(None, targets))))
    return graph


def _module_name(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


def _nearest(target: str, known: Mapping[str, str]) -> str | None:
    """The module that `target` is, or is a part of; None when it is no part of the package."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target or None


def levels(graph: Mapping[str, Module]) -> dict[str, Lesson]:
    """How far into the course each module reaches: the latest lesson among itself and all that it imports."""
    return {
        name: max((graph[seen].lesson or (0, 0) for seen in _paths(graph, name)), default=(0, 0))
        for name in graph
    }


def _paths(graph: Mapping[str, Module], start: str, plain_only: bool = False) -> dict[str, list[str]]:
    """Shortest path from start to each module it reaches; with plain_only, walk on only from plain ones."""
    paths = {start: [start]}
    queue = [start]
    for name in queue:  # the queue grows as we walk: breadth first
        if plain_only and name != start and graph[name].lesson:
            continue
        for target in graph[name].imports:
            if target not in paths:
                paths[target] = [*paths[name], target]
                queue.append(target)
    return paths


def violations(graph: Mapping[str, Module]) -> list[str]:
    """Every breach of the law, each a sentence with the arrows that make it and the mend."""
    found: list[str] = []
    for name, module in sorted(graph.items()):
        if not module.lesson:
            continue
        # What another lesson's module reaches is that module's own affair, so walk through plain ones only.
        for target, path in _paths(graph, name, plain_only=True).items():
            arrows = " → ".join(str(graph[step]) for step in path)
            later = graph[target].lesson
            if later and later > module.lesson:
                found.append(
                    f"{module.notebook}: {arrows} reaches a later lesson: move what {short(name)} needs into "
                    f"lesson {dotted(module.lesson)} or an earlier one, or let lesson {dotted(later)} "
                    "plug it in as an argument."
                )
    return found + _upward(graph) + _circles(graph)


def _upward(graph: Mapping[str, Module]) -> list[str]:
    """Imports that go up a floor or stay on it, and rooms that are on none."""
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    found = []
    for name, module in sorted(graph.items()):
        here = _room(name)
        if here and here not in floor:
            found.append(
                f"{module.path}: {here} is on no floor of the house: give it one in nb/graph.py, FLOORS."
            )
        for target in module.imports:
            there = _room(target)
            if here != there and floor.get(here, len(FLOORS)) <= floor.get(there, -1):
                found.append(
                    f"{module.path}: {module} → {graph[target]} goes up, from {here} to {there}: move what it needs "
                    f"down into {here} or below, or pass it in."
                )
    return found


def _room(name: str) -> str:
    """The folder of a module, or the module itself where it lies in none; empty for the package."""
    return short(name).split(".")[0] if name != PACKAGE else ""


def _circles(graph: Mapping[str, Module]) -> list[str]:
    found: list[str] = []
    told: set[str] = set()
    for name in sorted(graph):
        if name in told:
            continue
        paths = _paths(graph, name)
        back = [path for end, path in paths.items() if name in graph[end].imports]
        if back:
            circle = min(back, key=len)
            told.update(circle)  # one sentence a circle, not one for each of its members
            arrows = " → ".join(str(graph[step]) for step in [*circle, name])
            files = ", ".join(graph[step].notebook or graph[step].path for step in circle)
            found.append(
                f"{arrows} is a circle ({files}): move what they share to a module below them, or pass it in."
            )
    return found


def table(graph: Mapping[str, Module]) -> str:
    """The graph in course order, a module a row. A plain module stands at the latest lesson it reaches."""
    reach = levels(graph)
    order = sorted(graph.values(), key=lambda m: (reach[m.name], m.lesson is None, m.name))
    rows = [("module", "lesson", "imports")]
    for module in order:
        if module.path.endswith("__init__.py") and not module.imports:
            continue
        upto = reach[module.name]
        lesson = (
            dotted(module.lesson) if module.lesson else f"plain ≤ {dotted(upto)}" if any(upto) else "plain"
        )
        rows.append((short(module.name), lesson, ", ".join(map(short, module.imports)) or "–"))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    rows.insert(1, ("─" * first, "─" * second, "─" * len("imports")))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tutorial_lib.nb.graph", description="Print the course.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    args = parser.parse_args(argv)
    try:
        graph = build(read_package(args.root))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(graph))
    broken = violations(graph)
    for sentence in broken:
        print(f"✗ {sentence}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
