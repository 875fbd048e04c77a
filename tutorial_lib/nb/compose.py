"""What a module is: from the exported cells of a lesson to a text that reads as if written by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tutorial_lib.nb import graph
from tutorial_lib.nb.cells import Cell, path_of
from tutorial_lib.nb.pieces import Piece, take_apart, what_stays

__all__ = ["compose", "faults", "polish"]

_LINE_LENGTH = 110


def compose(cells: list[Cell]) -> str:
    """The module's text, before ruff sorts the imports and formats it. The cells must be without `faults`."""
    pieces = take_apart(cells)

    def every(kind: str) -> list[str]:
        return [piece.text for piece in pieces if piece.kind == kind]

    header = f"# Exported from {cells[0].notebook}. Edit the lesson, then run: make export"
    if len(header) > _LINE_LENGTH:
        header = header.replace(". Edit", ".\n# Edit")
    public = dict.fromkeys(f'"{name}"' for piece in pieces for name in piece.public)
    top = [
        "\n".join([header, *every("docstring")]),
        "\n".join(every("import")),
        "\n\n".join(every("import for type checkers")),
        f"__all__ = [{', '.join(public)}]",
    ]
    bodies = [what_stays(cell, pieces) for cell in cells]
    return "\n\n".join(filter(None, top)) + "\n\n\n" + "\n\n\n".join(filter(None, bodies)) + "\n"


def faults(module: str, cells: list[Cell]) -> Iterator[str]:
    """What keeps the cells from being a module, each fault a sentence with the place and the mend."""
    notebook, pieces = cells[0].notebook, take_apart(cells)
    if not graph.lesson_of(notebook):
        yield f"{notebook}: name it part_lesson_title, like 3_2_rope.ipynb."
    for piece in pieces:
        yield from _imports_of_itself(f"{graph.PACKAGE}.{module}", piece)
        if piece.kind == "one of two on a line":
            yield f"{piece.place}: two statements on one line: give each its own."
        elif piece.kind == "__all__":
            yield f"{piece.place}: `__all__` is written for you: take this line away."
        elif piece.kind == "something else":
            yield (
                f"{piece.place}: an exported cell may hold only imports and definitions: move "
                f"`{ast.unparse(piece.stmt).splitlines()[0][:40]}` to a cell without `#| export`."
            )
    yield from _defined_twice(module, pieces)
    if not any(piece.kind == "docstring" for piece in pieces):
        yield (
            f"{notebook}, cell {cells[0].number}: the first cell exported to {path_of(module)} must begin "
            "with the module's docstring: add it there."
        )


def _imports_of_itself(module: str, piece: Piece) -> Iterator[str]:
    for name, line in graph.imported_names(piece.stmt, module, is_package=False):
        if f"{name}.".startswith(f"{module}."):
            yield (
                f"{piece.cell.at(line)}: imports {module}, the module that it is exported to: use the "
                "name as it is, or move this import to a cell without `#| export`."
            )


def _defined_twice(module: str, pieces: list[Piece]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for piece in pieces:
        if piece.kind != "definition" or piece.is_overload:
            continue
        for name in piece.names:
            if name in seen and name != "_":  # `def _` is singledispatch's idiom
                yield (
                    f"`{name}` is defined twice in {path_of(module)}, by {seen[name]} and by "
                    f"{piece.place}: export only the final version."
                )
            seen[name] = piece.place


def polish(
    texts: dict[str, str], notebook: dict[str, str], root: Path, problems: list[str]
) -> dict[str, str]:
    """Let ruff sort imports, drop unused ones, format, and find names that no exported cell brought along."""
    if not texts:
        return {}
    config = next(r / "pyproject.toml" for r in (root, graph.ROOT) if (r / "pyproject.toml").is_file())
    with tempfile.TemporaryDirectory() as folder:
        files = {path: Path(folder, path) for path in texts}
        for path, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(texts[path], encoding="utf-8")

        def ruff(*arguments: str) -> str:
            command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config", str(config)]
            done = subprocess.run(
                [*command, *map(str, files.values())], capture_output=True, text=True, cwd=folder
            )
            if done.returncode not in (0, 1) or not done.stdout:
                raise ValueError(f"ruff does not run here, so make setup: {done.stderr.strip()}")
            return done.stdout

        ours = f'lint.isort.known-first-party=["{graph.PACKAGE}"]'
        select = ("--select", "I,F401,F821", "--fix", "--output-format", "json", "--config", ours)
        for left in json.loads(ruff("check", *select)):
            path = Path(left["filename"]).resolve().relative_to(Path(folder).resolve()).as_posix()
            if left["code"] == "F821":
                problems.append(
                    f"{left['message']} in {path}: import or define it in a cell of {notebook[path]} that is "
                    "exported there."
                )
        ruff("format")
        return {path: file.read_text(encoding="utf-8") for path, file in files.items()}
