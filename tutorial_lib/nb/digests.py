"""What counts as a learner's work: digests that white space, outputs and comments do not change."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["DEFINITIONS", "cells_digest", "stub_digest", "syntax_digest", "tags_of"]

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def cells_digest(nb: Mapping[str, Any]) -> str:
    """SHA-256 of a notebook's cell sources. `nb` may be plain JSON or nbformat's.

    Outputs, counts, metadata, empty cells, white space at a cell's end, and what `normalise` stamps (the badge,
    and lines of the setup cell) are not work, so they do not change it.
    """
    sources = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])  # on disk a list of lines, or one string
        if "setup" in tags_of(cell) and "%pip install" in source:
            source = source.split("%pip install", 1)[1].partition("\n")[2]
        if source.strip() and "colab" not in tags_of(cell):
            sources.append([cell["cell_type"], source.rstrip()])
    return _sha256(sources)


def stub_digest(source_of_def: str) -> str:
    """SHA-256 of the first statement of `source_of_def`, a function or class, as syntax.

    White space, comments and docstrings do not change it. Raises SyntaxError if the text does not parse.
    """
    return syntax_digest(ast.parse(source_of_def).body[0])


def syntax_digest(node: ast.AST) -> str:
    """SHA-256 of a piece of syntax."""
    return _sha256(_shape(node))


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


def tags_of(cell: Mapping[str, Any]) -> list[str]:
    """A cell's tags, such as `setup` or `solution-only`."""
    return cell.get("metadata", {}).get("tags", [])
