"""Write the package's modules from the lessons, so that they read as if written by hand.

    python -m tutorial_lib.nb.export [--check]

On top of a code cell, nbdev's directives: `#| default_exp core.rope` names the notebook's module, `#| export`
sends the cell there, `#| export core.masks` to another. An exported cell holds imports and definitions only;
the first one for a module begins with the module's docstring. A comment glued to an import moves with it.

Everything is composed and judged before the first byte is written: one error, and nothing changes.
"""

from __future__ import annotations

import argparse
import ast
import json
import keyword
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from tutorial_lib.nb import graph
from tutorial_lib.nb.normalise import notebooks, read_notebook

_DIRECTIVE = re.compile(r"#\s*\|\s*(?P<name>[\w-]+)(?P<colon>:)?\s*(?P<argument>.*?)\s*$")
_LINE_LENGTH = 110


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
    return f"{graph.PACKAGE}/{module.replace('.', '/')}.py"


# ── From notebooks to exported cells ─────────────────────────────────────────────────────────────────────


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
    return found, "\n".join(lines)


def collect(root: Path, problems: list[str]) -> dict[str, list[Cell]]:
    """The exported cells of every lesson, by module; what is wrong goes to `problems`."""
    modules: dict[str, list[Cell]] = {}
    owner: dict[str, str] = {}
    for file in notebooks(root, [root / "chapters"]):
        notebook = file.relative_to(root).as_posix()
        default = None
        for number, cell in enumerate(read_notebook(file).cells, 1):
            if cell.cell_type != "code":
                continue
            here = f"{notebook}, cell {number}"
            found, source = directives(cell.source)
            if re.search(r"^#\s*\|\s*(export|default_exp)\b", source, re.MULTILINE):
                problems.append(f"{here}: a directive stands below code: move it to the top of the cell.")
            # default_exp first: it may stand below `#| export` in the same cell.
            for name, argument in sorted(found, key=lambda one: one[0] != "default_exp"):
                try:
                    module = _target(name, argument, default, root)
                    default = module if name == "default_exp" else default
                    if (first := owner.setdefault(module, notebook)) != notebook:
                        problems.append(
                            f"{path_of(module)} is claimed by both {first} and {notebook}: keep its exports "
                            "in one of them."
                        )
                    elif name == "export":
                        exported = Cell(notebook, number, source, ast.parse(source))
                        modules.setdefault(module, []).append(exported)
                        if not graph.lesson_of(notebook):
                            problems.append(f"{notebook}: name it part_lesson_title, like 3_2_rope.ipynb.")
                except SyntaxError as error:
                    problems.append(
                        f"{here}, line {error.lineno}: an exported cell must be plain Python ({error.msg}): "
                        "mend it, or take `#| export` away."
                    )
                except ValueError as error:
                    problems.append(f"{here}: {error}.")
    problems[:] = dict.fromkeys(problems)
    return modules


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


# ── From exported cells to a module ──────────────────────────────────────────────────────────────────────


def _defined(stmt: ast.stmt) -> list[str]:
    """The names that a definition defines; [] for any other statement."""
    if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [stmt.name]
    if isinstance(stmt, ast.Assign):
        leaves = [leaf for t in stmt.targets for leaf in (t.elts if isinstance(t, ast.Tuple) else [t])]
    else:  # a bare `x: int` binds nothing
        leaves = [stmt.target] if isinstance(stmt, ast.AnnAssign) and stmt.value else []
    return [leaf.id for leaf in leaves] if all(isinstance(leaf, ast.Name) for leaf in leaves) else []


def _public(stmt: ast.stmt) -> list[str]:
    """What goes into `__all__`: functions, classes, annotated and ALL-CAPS constants."""
    every = not isinstance(stmt, ast.Assign)
    return [name for name in _defined(stmt) if not name.startswith("_") and (every or name.isupper())]


def _is_string(stmt: ast.stmt) -> bool:
    return isinstance(stmt, ast.Expr) and isinstance(getattr(stmt.value, "value", None), str)


def _is_type_checking(stmt: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` with nothing but imports in it."""
    return (
        isinstance(stmt, ast.If)
        and ast.unparse(stmt.test).split(".")[-1] == "TYPE_CHECKING"
        and not stmt.orelse
        and all(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in stmt.body)
    )


def compose(module: str, cells: list[Cell], problems: list[str]) -> str:
    """The module's text, before ruff sorts the imports and formats it."""
    docstring, imports, guarded, bodies, public = "", [], [], [], []
    seen: dict[str, str] = {}
    name_in_full = f"{graph.PACKAGE}.{module}"
    for cell in cells:
        for name, line in graph.imported_names(cell.tree, name_in_full, is_package=False):
            if f"{name}.".startswith(f"{name_in_full}."):
                problems.append(
                    f"{cell.at(line)}: imports {name_in_full}, the module that it is exported to: use the "
                    "name as it is, or move this import to a cell without `#| export`."
                )
        lines = cell.source.split("\n")
        previous, ended = None, 0
        for stmt in cell.tree.body:
            decorators = getattr(stmt, "decorator_list", [])
            first, last = min([stmt.lineno, *(d.lineno for d in decorators)]), stmt.end_lineno
            names = _defined(stmt)
            if first <= ended:
                problems.append(f"{cell.at(first)}: two statements on one line: give each its own.")
            elif isinstance(stmt, (ast.Import, ast.ImportFrom)) or _is_type_checking(stmt):
                while first - 1 > ended and lines[first - 2].startswith("#"):
                    first -= 1
                (guarded if isinstance(stmt, ast.If) else imports).append(_cut(lines, first, last))
            elif _is_string(stmt) and cell is cells[0] and previous is None:
                docstring = _cut(lines, first, last)
            elif "__all__" in names:
                problems.append(f"{cell.at(first)}: `__all__` is written for you: take this line away.")
            elif names:
                public += _public(stmt)
                if any("overload" in ast.unparse(d) for d in decorators):
                    names = []  # typing.overload: the definition proper is still to come
                for name in names:
                    if name in seen and name != "_":  # `def _` is singledispatch's idiom
                        problems.append(
                            f"`{name}` is defined twice in {path_of(module)}, by {seen[name]} and by "
                            f"{cell.at(first)}: export only the final version."
                        )
                    seen[name] = cell.at(first)
            # A string below a constant documents it, as a docstring does a function.
            elif not (_is_string(stmt) and isinstance(previous, (ast.Assign, ast.AnnAssign))):
                problems.append(
                    f"{cell.at(first)}: an exported cell may hold only imports and definitions: move "
                    f"`{ast.unparse(stmt).splitlines()[0][:40]}` to a cell without `#| export`."
                )
            previous, ended = stmt, last
        bodies.append("\n".join(lines).strip())
    notebook = cells[0].notebook
    if not docstring:
        problems.append(
            f"{notebook}, cell {cells[0].number}: the first cell exported to {path_of(module)} must begin "
            "with the module's docstring: add it there."
        )
    header = f"# Exported from {notebook}. Edit the lesson, then run: make export"
    if len(header) > _LINE_LENGTH:
        header = header.replace(". Edit", ".\n# Edit")
    all_names = ", ".join(f'"{name}"' for name in dict.fromkeys(public))
    top = [f"{header}\n{docstring}", "\n".join(imports), "\n\n".join(guarded), f"__all__ = [{all_names}]"]
    return "\n\n".join(filter(None, top)) + "\n\n\n" + "\n\n\n".join(filter(None, bodies)) + "\n"


def _cut(lines: list[str], first: int, last: int) -> str:
    """Take lines first..last (from 1) out, leaving blank ones so that later line numbers hold."""
    taken = lines[first - 1 : last]
    lines[first - 1 : last] = [""] * len(taken)
    return "\n".join(taken)


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


# ── The whole package ────────────────────────────────────────────────────────────────────────────────────


def plan(root: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(what the lessons export, what the package holds, what is wrong): two `{path: text}` and sentences."""
    root = root.resolve()
    problems: list[str] = []
    package = graph.read_package(root)
    modules = collect(root, problems)
    texts = {path_of(module): compose(module, cells, problems) for module, cells in modules.items()}
    if problems:
        return {}, package, problems
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
