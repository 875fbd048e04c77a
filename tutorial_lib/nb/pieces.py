"""An exported cell, taken apart: what each of its statements is to the module."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from tutorial_lib.nb.cells import Cell

__all__ = ["Piece", "take_apart", "what_stays"]

_MOVES_UP = ("docstring", "import", "import for type checkers")


@dataclass(frozen=True)
class Piece:
    """A statement of an exported cell: what it is to the module, and its lines."""

    cell: Cell
    stmt: ast.stmt
    kind: str
    first: int
    last: int

    @property
    def text(self) -> str:
        return "\n".join(self.cell.source.split("\n")[self.first - 1 : self.last])

    @property
    def place(self) -> str:
        return self.cell.at(self.first)

    @property
    def names(self) -> list[str]:
        return _defined(self.stmt)

    @property
    def public(self) -> list[str]:
        """What goes into `__all__`: functions, classes, annotated and ALL-CAPS constants."""
        every = not isinstance(self.stmt, ast.Assign)
        return [name for name in self.names if not name.startswith("_") and (every or name.isupper())]

    @property
    def is_overload(self) -> bool:
        """typing.overload: the definition proper is still to come."""
        return any("overload" in ast.unparse(decorator) for decorator in _decorators(self.stmt))


def take_apart(cells: list[Cell]) -> list[Piece]:
    """The pieces of a module, in order."""
    pieces = []
    for cell in cells:
        lines = cell.source.split("\n")
        previous, ended = None, 0
        for stmt in cell.tree.body:
            first = min([stmt.lineno, *(decorator.lineno for decorator in _decorators(stmt))])
            opens = previous is None and cell is cells[0]
            kind = "one of two on a line" if first <= ended else _kind(stmt, previous, opens)
            while kind.startswith("import") and first - 1 > ended and lines[first - 2].startswith("#"):
                first -= 1  # a comment glued to an import moves with it
            pieces.append(Piece(cell, stmt, kind, first, stmt.end_lineno))
            previous, ended = stmt, stmt.end_lineno
    return pieces


def _kind(stmt: ast.stmt, previous: ast.stmt | None, opens: bool) -> str:
    """What a statement is to the module; `opens`: it is the first of all."""
    if isinstance(stmt, (ast.Import, ast.ImportFrom)):
        return "import"
    if _is_type_checking(stmt):
        return "import for type checkers"
    is_string = isinstance(stmt, ast.Expr) and isinstance(getattr(stmt.value, "value", None), str)
    if is_string and opens:
        return "docstring"
    if is_string and isinstance(previous, (ast.Assign, ast.AnnAssign)):
        return "docstring of a constant"
    if "__all__" in (names := _defined(stmt)):
        return "__all__"
    return "definition" if names else "something else"


def what_stays(cell: Cell, pieces: list[Piece]) -> str:
    """The cell without what has its place further up."""
    lines = cell.source.split("\n")
    for piece in pieces:
        if piece.cell is cell and piece.kind in _MOVES_UP:
            lines[piece.first - 1 : piece.last] = [""] * (piece.last - piece.first + 1)
    return "\n".join(lines).strip()


def _decorators(stmt: ast.stmt) -> list[ast.expr]:
    return getattr(stmt, "decorator_list", [])


def _defined(stmt: ast.stmt) -> list[str]:
    """The names that a definition defines; [] for any other statement."""
    if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [stmt.name]
    if isinstance(stmt, ast.Assign):
        leaves = [leaf for t in stmt.targets for leaf in (t.elts if isinstance(t, ast.Tuple) else [t])]
    else:  # a bare `x: int` binds nothing
        leaves = [stmt.target] if isinstance(stmt, ast.AnnAssign) and stmt.value else []
    return [leaf.id for leaf in leaves] if all(isinstance(leaf, ast.Name) for leaf in leaves) else []


def _is_type_checking(stmt: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` with nothing but imports in it."""
    return (
        isinstance(stmt, ast.If)
        and ast.unparse(stmt.test).split(".")[-1] == "TYPE_CHECKING"
        and not stmt.orelse
        and all(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in stmt.body)
    )
