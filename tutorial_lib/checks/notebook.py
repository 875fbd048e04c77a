"""Reading an exercise notebook: its statements and the learner's definitions. Nothing runs here."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tutorial_lib.files import read_json

__all__ = [
    "Cell",
    "Statement",
    "code_cells",
    "course_imports",
    "definitions",
    "find_home",
    "notebook_of",
    "statements",
]

MOST_BYTES = 50 * 2**20
"""Of a notebook's file, pictures included."""
MOST_TEXT = 500_000
"""Characters in all cells of a notebook."""

HEADING = re.compile(r"^## (\d+\.\d+\.[a-z])\s+(.+)$", re.MULTILINE)
KIND = re.compile(r"\*\*(build|debug|extend)\*\* · (★+)☆* · (\d+) min · (.+)")
HINT = re.compile(r"<details>\s*<summary>\s*Hint \d\s*</summary>(.*?)</details>", re.DOTALL)


@dataclass(frozen=True)
class Statement:
    """What an exercise's text says of it."""

    id: str
    title: str
    kind: str
    stars: int
    minutes: int
    importance: str
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A code cell: its number in the notebook, counted from 1 over all cells, and its source."""

    number: int
    source: str

    @property
    def filename(self) -> str:
        """What tracebacks call it."""
        return f"<cell {self.number}>"


def find_home(start: Path | None = None) -> Path | None:
    """The course's folder: the nearest one upwards with exercises and solutions in it, else the package's."""
    here = (start or Path.cwd()).resolve()
    package = Path(__file__).resolve().parents[2]
    for folder in (here, *here.parents, package):
        if (folder / "solutions").is_dir() and (folder / "tutorial_lib").is_dir():
            return folder
    return None


def notebook_of(lesson: str, tree: Path) -> Path | None:
    """The notebook of lesson "1.4" in a tree such as `exercises/`; None if it is not there."""
    part, number = lesson.split(".")
    return next(iter(sorted(tree.glob(f"part_{part}_*/{part}_{number}_*.ipynb"))), None)


def _cells(path: Path) -> list[tuple[int, str, str]]:
    if path.exists() and not path.is_file():  # a pipe or a device, and what comes out of it may have no end
        raise ValueError(f"{path} is no file")
    try:
        cells = read_json(path, MOST_BYTES)["cells"]
        found = [(n, c["cell_type"], "".join(c["source"])) for n, c in enumerate(cells, 1)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a notebook that can be read: {error}") from None
    if (length := sum(len(source) for _, _, source in found)) > MOST_TEXT:
        raise ValueError(
            f"{path} has {length:,} characters in its cells, and a notebook at most {MOST_TEXT:,}"
        )
    return found


def code_cells(path: Path) -> list[Cell]:
    """The code cells of a notebook."""
    return [Cell(n, source) for n, kind, source in _cells(path) if kind == "code"]


@cache
def _statements(path: Path) -> dict[str, Statement]:
    found: dict[str, Statement] = {}
    for number, kind, source in _cells(path):
        if kind != "markdown" or not (heading := HEADING.search(source)):
            continue
        line = KIND.search(source)
        if line is None:
            raise ValueError(
                f"{path}, cell {number}: below `## {heading[1]}` belongs a line such as "
                "`**build** · ★★☆ · 10 min · importance: …`"
            )
        hints = tuple(hint.strip() for hint in HINT.findall(source))
        found[heading[1]] = Statement(
            heading[1], heading[2].strip(), line[1], len(line[2]), int(line[3]), line[4].strip(), hints
        )
    return found


def statements(path: Path) -> dict[str, Statement]:
    """The exercises that a notebook states, by id."""
    return _statements(path)


def _without_magics(source: str) -> str:
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


def definitions(cell: Cell) -> list[ast.stmt]:
    """A cell's imports, functions, classes and plain assignments; nothing that would start work.

    Raises:
        SyntaxError: if the cell is not Python.
    """
    try:
        cell.source.encode()
        try:
            tree = ast.parse(cell.source, cell.filename)
        except SyntaxError:
            tree = ast.parse(_without_magics(cell.source), cell.filename)
    except UnicodeEncodeError as error:
        line = cell.source[: error.start].count("\n")
        text = cell.source.split("\n")[line]
        raise SyntaxError("half a character stands in it", (cell.filename, line + 1, 0, text)) from None
    except (
        ValueError,
        RecursionError,
        MemoryError,
    ) as error:  # a character 0; brackets in brackets without end
        raise SyntaxError(str(error) or "it is nested too deeply", (cell.filename, 1, 0, "")) from None
    return [statement for statement in tree.body if _defines(statement)]


def _defines(statement: ast.stmt) -> bool:
    if isinstance(
        statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    ):
        return True
    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
        # A constant or a lambda is a definition; an assignment that calls something (training!) is work.
        return isinstance(statement.value, ast.Lambda) or not any(
            isinstance(node, (ast.Call, ast.Await, ast.NamedExpr)) for node in ast.walk(statement.value)
        )
    return False


def course_imports(cells: list[Cell]) -> set[tuple[str, str]]:
    """What cells import from the course, anywhere in them: `("tutorial_lib.core.rope", "apply_rope")`.

    Of a module that is imported whole, the second is "". The checker itself does not count.
    """
    found = set()
    for cell in cells:
        try:
            statements = definitions(cell)
        except SyntaxError:
            continue
        for node in (node for statement in statements for node in ast.walk(statement)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
    return {pair for pair in found if pair[0].split(".")[0] == "tutorial_lib"} - {
        ("tutorial_lib.checks", "check")
    }
