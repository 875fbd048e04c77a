"""Write the exercises from their solutions, and never over a learner's work.

    python -m tutorial_lib.nb.exercises [--check] [--root DIR]

In a code cell of solutions/**/X.ipynb, nbgrader's markers say what the learner writes. A second region, which
is ours, holds the wrong code that a "debug" exercise starts from; without it the stub raises.

    def attend(q, k, v):                        def attend(q, k, v):
        ### BEGIN SOLUTION                          scores = q @ k.T
        return right(q, k, v)                       return scores.softmax(0) @ v
        ### END SOLUTION
        ### BEGIN GIVEN                  →
        # scores = q @ k.T
        # return scores.softmax(0) @ v
        ### END GIVEN

Cells tagged `solution-only`, which explain the solution, stay behind.

exercises/manifest.json remembers what was generated. A file whose cells still hash to what it says is an
untouched stub and may be replaced or removed; any other file is somebody's work and is left alone, and said.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutorial_lib.files import write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["ExerciseError", "cells_digest", "make_stub", "regenerate", "stub_digest"]

ROOT = Path(__file__).resolve().parents[2]
STUB = "raise NotImplementedError  # your code here"
MARKERS = [f"### {edge} {region}" for region in ("SOLUTION", "GIVEN") for edge in ("BEGIN", "END")]
BEGIN_SOLUTION, END_SOLUTION, BEGIN_GIVEN, END_GIVEN = MARKERS
# Anything that looks like a marker must be one: `## END SOLUTION` would hand the solution to the learner.
LOOKS_LIKE_MARKER = re.compile(r"#+\s*(BEGIN|END)[\s_-]+(SOLUTION|GIVEN)S?\b", re.IGNORECASE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class ExerciseError(ValueError):
    """A notebook no exercise can be made from. The message is one sentence with the place and the mend."""


# --- what counts as work ------------------------------------------------------------------------------------


def cells_digest(nb: Mapping[str, Any]) -> str:
    """SHA-256 of a notebook's cell sources. `nb` may be plain JSON or nbformat's.

    Outputs, counts, metadata, empty cells, white space at a cell's end, and the lines that `normalise` stamps
    into the setup cell are not work, so they do not change it.
    """
    sources = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])  # on disk a list of lines, or one string
        if "setup" in _tags(cell) and "%pip install" in source:
            source = source.split("%pip install", 1)[1].partition("\n")[2]
        if source.strip():
            sources.append([cell["cell_type"], source.rstrip()])
    return _sha256(sources)


def stub_digest(source_of_def: str) -> str:
    """SHA-256 of the first statement of `source_of_def`, a function or class, as syntax.

    White space, comments and docstrings do not change it. Raises SyntaxError if the text does not parse.
    """
    return _sha256(_shape(ast.parse(source_of_def).body[0]))


def _shape(node: Any) -> Any:
    """Like `ast.dump`, whose text depends on Python: 3.12 adds fields, 3.13 leaves out empty ones."""
    if isinstance(node, list):
        return [_shape(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # early 3.12 ends a format such as {x:{y}} with an empty string
        fields["values"] = [part for part in node.values if getattr(part, "value", None) != ""]
    return [type(node).__name__, {name: _shape(value) for name, value in sorted(fields.items())}]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


# --- from a solution to a stub ------------------------------------------------------------------------------


def make_stub(nb: NotebookNode) -> dict[str, str]:
    """Turn a solutions notebook into its exercise, in place; return the digest of every stub by its name."""
    kept, stubs, cleared = [], {}, 0
    for number, cell in enumerate(nb.cells, 1):
        if "solution-only" in _tags(cell):
            continue
        kept.append(cell)
        try:
            # Only code: prose may talk about markers, and ClearSolutions would clear it as well.
            if cell.cell_type != "code" or not _has_markers(cell.source):
                continue
            _clear_solutions(cell, number)
            cell.source = _place_given(cell.source)
            cleared += 1
            for name, digest in _definitions(cell.source).items():
                if name in stubs:
                    raise ExerciseError(f"defines {name} again: an exercise's name is unique in its notebook")
                stubs[name] = digest
        except ExerciseError as error:
            raise ExerciseError(f"cell {number} ({cell.get('id', 'no id')}): {error}.") from error
    nb.cells = kept
    if not cleared:
        raise ExerciseError(f"it has no `{BEGIN_SOLUTION}`: mark what the learner writes.")
    return stubs


def _has_markers(source: str) -> bool:
    """Whether a cell has solution regions; they must be well-formed, since nbgrader overlooks a lone END."""
    last = ""
    may_follow = {
        "": [BEGIN_SOLUTION],
        BEGIN_SOLUTION: [END_SOLUTION],
        END_SOLUTION: [BEGIN_SOLUTION, BEGIN_GIVEN],
        BEGIN_GIVEN: [END_GIVEN],
        END_GIVEN: [BEGIN_SOLUTION],
    }
    for number, line in enumerate(source.split("\n"), 1):
        if not LOOKS_LIKE_MARKER.search(line):
            continue
        mark = line.strip()
        if mark not in MARKERS:
            raise ExerciseError(f"line {number} looks like a marker, write it as one of {', '.join(MARKERS)}")
        if mark not in may_follow[last]:
            wanted = " or ".join(f"`{marker}`" for marker in may_follow[last])
            raise ExerciseError(f"line {number} is `{mark}` where {wanted} should be")
        last = mark
    if last in (BEGIN_SOLUTION, BEGIN_GIVEN):
        raise ExerciseError(f"`{last}` has no `{may_follow[last][0]}`")
    return bool(last)


def _clear_solutions(cell: NotebookNode, number: int) -> None:
    """nbgrader's own preprocessor, on one cell."""
    from nbgrader.preprocessors import ClearSolutions

    clear = ClearSolutions(
        code_stub={"python": STUB},
        begin_solution_delimeter=BEGIN_SOLUTION,
        end_solution_delimeter=END_SOLUTION,
        enforce_metadata=False,
    )
    clear.preprocess_cell(cell, {"language": "python"}, number - 1)


def _place_given(source: str) -> str:
    """Put each GIVEN region, uncommented, in the place of the stub line before it."""
    lines: list[str] = []
    indent: str | None = None  # that of the region we are in
    for line in source.split("\n"):
        mark = line.strip()
        if mark == BEGIN_GIVEN:
            indent = line[: line.index("#")]
            while lines and not lines[-1].strip():
                lines.pop()
            if not lines or lines.pop() != indent + STUB:
                raise ExerciseError(f"`{BEGIN_GIVEN}` must follow `{END_SOLUTION}`, as far indented")
        elif mark == END_GIVEN:
            indent = None
        elif indent is None:
            lines.append(line)
        elif mark:
            commented = re.fullmatch(re.escape(indent) + r"#(?: (.*)|(?!#))", line)
            if not commented:
                raise ExerciseError(f"the GIVEN line {mark!r} does not start with '# ' below its marker")
            lines.append((indent + (commented[1] or "")).rstrip())
        else:
            lines.append("")
    return "\n".join(lines)


def _definitions(source: str) -> dict[str, str]:
    """The digest of every function and class at the top level of a cell."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        try:  # lines of IPython's own
            tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))
        except SyntaxError as error:
            raise ExerciseError(f"its stub would not parse ({error.msg}, line {error.lineno})") from error
    return {node.name: _sha256(_shape(node)) for node in tree.body if isinstance(node, DEFINITIONS)}


# --- the two trees ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run found, a line each; `drift` and `errors` make it fail."""

    written: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def regenerate(root: Path = ROOT, check: bool = False) -> Outcome:
    """Bring exercises/ up to date with solutions/; with `check`, write nothing and list the differences."""
    from tutorial_lib.nb.normalise import dumps, normalise, read_notebook

    solutions, exercises, manifest = root / "solutions", root / "exercises", root / "exercises/manifest.json"
    sources, present = _notebooks(solutions), _notebooks(exercises)
    if present and not solutions.is_dir():
        raise ExerciseError(f"{root} has no solutions/ to make exercises from: restore it, or pass --root.")
    old, new = _read_manifest(manifest), {}
    done = Outcome()
    for name in sorted({*sources, *present}):
        path, was = exercises / name, old.get(name, {})
        shown = f"exercises/{name}"
        text = path.read_text(encoding="utf-8", errors="replace") if name in present else None
        if name not in sources:
            if check:
                done.drift.append(f"{shown} has no solution any more, run: make exercises")
            elif _digest_of(text) == was.get("sha256"):
                path.unlink()
                done.written.append(f"removed {shown}, it has no solution any more")
            else:
                new[name] = was
                done.left.append(f"{shown} has no solution, but holds your work: move it away, or delete it")
            continue
        try:
            nb = read_notebook(solutions / name)
            stubs = make_stub(nb)
            nb = normalise(nb, "exercises", root)
        except ValueError as error:
            place = "" if str(solutions) in str(error) else f"solutions/{name}, "
            done.errors.append(f"{place}{error}")
            new[name] = was
            continue
        entry = {"sha256": cells_digest(nb), "stubs": stubs}
        fresh = dumps(nb)
        new[name] = entry
        if text == fresh:
            continue
        if check:
            state = "is missing" if text is None else "differs from what its solution generates"
            done.drift.append(f"{shown} {state}, run: make exercises")
        elif text is None or _digest_of(text) in (was.get("sha256"), entry["sha256"]):
            write_text(path, fresh)
            done.written.append(f"wrote {shown}")
        else:
            new[name] = was  # the checker compares this file with the stub it grew from
            news = "its stub has not changed" if was == entry else "a newer stub waits"
            done.left.append(
                f"{shown} holds your work ({news}): for a fresh one, move it away and make exercises"
            )
    new = {name: entry for name, entry in new.items() if entry}
    if new != old and check:
        done.drift.append("exercises/manifest.json is not up to date, run: make exercises")
    elif new != old:
        write_text(
            manifest, json.dumps({"notebooks": new}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        )
    return done


def _notebooks(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*.ipynb"))
    return {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}


def _digest_of(text: str) -> str:
    """The cells digest of a notebook file; of something else, a word that no manifest holds."""
    try:
        return cells_digest(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "unreadable"


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        notebooks = json.loads(path.read_text(encoding="utf-8"))["notebooks"]
        if all(isinstance(entry, dict) for entry in notebooks.values()):
            return notebooks
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ExerciseError(
        f"{path} cannot be read: restore it from git (without it, every change is your work)."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_lib.nb.exercises", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    args = parser.parse_args(argv)
    try:
        done = regenerate(args.root.resolve(), args.check)
    except ExerciseError as error:
        print(error, file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"Making exercises takes nbgrader ({error}): pip install 'llm-from-scratch[dev]'", file=sys.stderr
        )
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}. Mend that and try again.", file=sys.stderr)
        return 1
    for line in (*done.written, *(f"left alone: {line}" for line in done.left), *done.drift):
        print(line)
    for line in done.errors:
        print(line, file=sys.stderr)
    return 1 if done.drift or done.errors else 0


if __name__ == "__main__":
    sys.exit(main())
