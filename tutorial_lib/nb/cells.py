"""Which cells of the lessons go into the package, and to which module of it."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutorial_lib.nb import graph
from tutorial_lib.nb.notebooks import notebooks, read_notebook

__all__ = ["Cell", "collect", "path_of"]

_DIRECTIVE = re.compile(r"#\s*\|\s*(?P<name>[\w-]+)(?P<colon>:)?\s*(?P<argument>.*?)\s*$")
_OVERLOOKED = re.compile(r"^#\s*\|\s*(export|default_exp)\b", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """An exported cell: its source with the directives blanked out, so that line numbers hold."""

    notebook: str
    number: int
    source: str
    tree: ast.Module

    def at(self, line: int) -> str:
        return f"{self.notebook}, cell {self.number}, line {line}"


def path_of(module: str) -> str:
    """`core.rope` -> `tutorial_lib/core/rope.py`."""
    return f"{graph.PACKAGE}/{module.replace('.', '/')}.py"


def collect(root: Path, problems: list[str]) -> dict[str, list[Cell]]:
    """The exported cells of every lesson, by module; what is wrong goes to `problems`."""
    modules: dict[str, list[Cell]] = {}
    default: dict[str, str] = {}  # the module that a notebook names once for all of its cells
    owner: dict[str, str] = {}  # the notebook that a module belongs to
    for notebook, number, text in _code_cells(root):
        here = f"{notebook}, cell {number}"
        found, source = directives(text)
        if _OVERLOOKED.search(source):
            problems.append(f"{here}: a directive stands below code: move it to the top of the cell.")
        for name, argument in found:
            try:
                module = _target(name, argument, default.get(notebook), root)
                if name == "default_exp":
                    default[notebook] = module
                if (first := owner.setdefault(module, notebook)) != notebook:
                    problems.append(
                        f"{path_of(module)} is claimed by both {first} and {notebook}: keep its exports "
                        "in one of them."
                    )
                elif name == "export":
                    cell = Cell(notebook, number, source, ast.parse(source))
                    modules.setdefault(module, []).append(cell)
            except SyntaxError as error:
                problems.append(
                    f"{here}, line {error.lineno}: an exported cell must be plain Python ({error.msg}): "
                    "mend it, or take `#| export` away."
                )
            except ValueError as error:
                problems.append(f"{here}: {error}.")
    return modules


def _code_cells(root: Path) -> Iterator[tuple[str, int, str]]:
    """The code cells of every lesson, as (notebook, number of the cell, source)."""
    for file in notebooks(root, [root / "chapters"]):
        for number, cell in enumerate(read_notebook(file).cells, 1):
            if cell.cell_type == "code":
                yield file.relative_to(root).as_posix(), number, cell.source


def directives(source: str) -> tuple[list[tuple[str, str]], str]:
    """The directives on top of a cell as (name, argument), and the source with them blanked out."""
    found: list[tuple[str, str]] = []
    lines = source.split("\n")
    for i, line in enumerate(lines):
        match = _DIRECTIVE.match(line)
        if match:
            lines[i] = ""
            if not match["colon"]:  # `#| label: fig` is Quarto's, none of our business
                found.append((match["name"], match["argument"]))
        elif line.strip():
            break
    found.sort(key=lambda one: one[0] != "default_exp")  # it may stand below the `#| export` that needs it
    return found, "\n".join(lines)


def _target(name: str, argument: str, default: str | None, root: Path) -> str:
    """The module that a directive means. A ValueError says what is wrong with it, and the mend."""
    if name not in ("default_exp", "export"):
        raise ValueError(f"`#| {name}` is unknown: use default_exp or export")
    if name == "default_exp" and default:
        raise ValueError("a second `#| default_exp`: keep one a notebook")
    module = argument or (default if name == "export" else None)
    if not module:
        raise ValueError(f"`#| {name}` has no module: write `#| default_exp core.rope` here or above")
    parts = module.split(".")
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts) or "__init__" in parts:
        raise ValueError(f"`{module}` is not a dotted module name: write it like core.rope")
    if parts[0] == graph.PACKAGE:
        raise ValueError(f"`{module}` already lies in {graph.PACKAGE}: leave that prefix out")
    if (root / graph.PACKAGE).joinpath(*parts).is_dir():
        raise ValueError(f"`{module}` is a folder: choose a module in it, like {module}.rope")
    return module
