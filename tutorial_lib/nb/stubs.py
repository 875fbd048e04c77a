"""From a solution to the stub that a learner starts from.

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
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from tutorial_lib.nb.digests import DEFINITIONS, syntax_digest, tags_of

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["STUB", "ExerciseError", "make_stub"]

STUB = "raise NotImplementedError  # your code here"
MARKERS = [f"### {edge} {region}" for region in ("SOLUTION", "GIVEN") for edge in ("BEGIN", "END")]
BEGIN_SOLUTION, END_SOLUTION, BEGIN_GIVEN, END_GIVEN = MARKERS
# Anything that looks like a marker must be one: `## END SOLUTION` would hand the solution to the learner.
LOOKS_LIKE_MARKER = re.compile(r"#+\s*(BEGIN|END)[\s_-]+(SOLUTION|GIVEN)S?\b", re.IGNORECASE)


class ExerciseError(ValueError):
    """A notebook no exercise can be made from. The message is one sentence with the place and the mend."""


def make_stub(nb: NotebookNode) -> dict[str, str]:
    """Turn a solutions notebook into its exercise, in place; return the digest of every stub by its name."""
    kept, stubs, cleared = [], {}, 0
    for number, cell in enumerate(nb.cells, 1):
        if "solution-only" in tags_of(cell):
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
        else:
            lines.append(line if indent is None else _uncommented(line, indent))
    return "\n".join(lines)


def _uncommented(line: str, indent: str) -> str:
    if not (mark := line.strip()):
        return ""
    commented = re.fullmatch(re.escape(indent) + r"#(?: (.*)|(?!#))", line)
    if not commented:
        raise ExerciseError(f"the GIVEN line {mark!r} does not start with '# ' below its marker")
    return (indent + (commented[1] or "")).rstrip()


def _definitions(source: str) -> dict[str, str]:
    """The digest of every function and class at the top level of a cell."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        try:  # lines of IPython's own
            tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))
        except SyntaxError as error:
            raise ExerciseError(f"its stub would not parse ({error.msg}, line {error.lineno})") from error
    return {node.name: syntax_digest(node) for node in tree.body if isinstance(node, DEFINITIONS)}
