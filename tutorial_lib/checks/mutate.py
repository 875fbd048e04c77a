"""Mutants: a solution with one small thing changed. A good set of probes rejects every one of them.

The grader is tested harder than the learner: a probe that lets `+` become `-` would let a learner's slip
through, too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Mutant", "mutants"]

_BINARY: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_BOOLEAN: dict[type, type] = {ast.And: ast.Or, ast.Or: ast.And}
_COMPARE: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True)
class Mutant:
    """A changed program, and what was changed: "`a - b` became `a + b`"."""

    description: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a definition: operators, constants, dropped statements and arguments, swaps.

    Docstrings, annotations and the text of errors are left alone: nobody computes with them.
    """
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}  # swapping two equal arguments changes nothing
    for owner, name, index, node in list(_places(tree)):
        before = ast.unparse(node)
        for new in _MUTATIONS.get(type(node), _no_mutation)(node):
            _put(owner, name, index, new)
            text = ast.unparse(tree)
            _put(owner, name, index, node)
            if text not in seen:
                seen.add(text)
                yield Mutant(f"`{_first_line(before)}` became `{_first_line(ast.unparse(new))}`", text)


def _put(owner: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(owner, name, node)
    else:
        getattr(owner, name)[index] = node


def _first_line(text: str) -> str:
    first, *rest = text.splitlines()
    return first + (" …" if rest else "")


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node with its place in the tree, except those that nobody computes with."""
    for owner in _walk(tree):
        for name, value in ast.iter_fields(owner):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, node in items:
                if isinstance(node, ast.AST) and not _is_text(node) and not isinstance(node, ast.Raise):
                    yield owner, name, index, node


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                if not _is_text(child):
                    yield from _walk(child)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


# --- what may become of a node: a list, by its type -------------------------------------------------------------


def _no_mutation(node: ast.AST) -> list[ast.AST]:
    return []


def _operation(node: ast.BinOp) -> list[ast.AST]:
    options: list[ast.AST] = []
    if type(node.op) in _BINARY:
        options.append(ast.BinOp(node.left, _BINARY[type(node.op)](), node.right))
    if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult, ast.Pow)):
        options.append(ast.BinOp(node.right, node.op, node.left))
    return options


def _comparison(node: ast.Compare) -> list[ast.AST]:
    first, *others = node.ops
    if type(first) not in _COMPARE:
        return []
    return [ast.Compare(node.left, [_COMPARE[type(first)](), *others], node.comparators)]


def _constant(node: ast.Constant) -> list[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        return [ast.Constant(not value)]
    if isinstance(value, int):
        return [ast.Constant(value + 1)]
    if isinstance(value, float):
        return [ast.Constant(value * 2 + (value == 0))]
    return []


def _call(node: ast.Call) -> list[ast.AST]:
    options: list[ast.AST] = []
    if node.keywords:
        options.append(ast.Call(node.func, node.args, node.keywords[:-1]))
    if len(node.args) >= 2:
        options.append(ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords))
    elif isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        options.append(node.func.value)  # x.sqrt() becomes x
    return options


def _dropped(node: ast.stmt) -> list[ast.AST]:
    return [ast.Pass()]


_MUTATIONS: dict[type, Callable[[Any], list[ast.AST]]] = {
    ast.BinOp: _operation,
    ast.Compare: _comparison,
    ast.BoolOp: lambda node: [ast.BoolOp(_BOOLEAN[type(node.op)](), node.values)],
    ast.UnaryOp: lambda node: [node.operand],
    ast.Constant: _constant,
    ast.IfExp: lambda node: [node.body, node.orelse],
    ast.If: lambda node: [ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)],
    ast.Call: _call,
    ast.Assign: _dropped,
    ast.AugAssign: _dropped,
    ast.Expr: _dropped,
}
