"""Mutants: a solution with one small thing changed. A good set of probes rejects every one of them.

The grader is tested harder than the learner: a probe that lets `+` become `-` would let a learner's slip
through, too.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

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
    count = len(list(_places(tree)))
    seen = {ast.unparse(tree)}  # swapping two equal arguments changes nothing
    for i in range(count):
        for variant in range(3):
            changed = copy.deepcopy(tree)
            owner, name, index, node = list(_places(changed))[i]
            before = ast.unparse(node)
            new = _mutate(node, variant)
            if new is None:
                break
            if index is None:
                setattr(owner, name, new)
            else:
                getattr(owner, name)[index] = new
            ast.fix_missing_locations(changed)
            after = ast.unparse(new)
            text = ast.unparse(changed)
            if text not in seen:
                seen.add(text)
                yield Mutant(f"`{_first_line(before)}` became `{_first_line(after)}`", text)


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


def _mutate(node: ast.AST, variant: int) -> ast.AST | None:
    """The node's `variant`-th mutation, or None when it has no more."""
    options: list[ast.AST] = []
    if isinstance(node, ast.BinOp):
        if type(node.op) in _BINARY:
            options.append(ast.BinOp(node.left, _BINARY[type(node.op)](), node.right))
        if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult, ast.Pow)):
            options.append(ast.BinOp(node.right, node.op, node.left))
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        options.append(
            ast.Compare(node.left, [_COMPARE[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        )
    elif isinstance(node, ast.BoolOp):
        options.append(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp):
        options.append(node.operand)
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            options.append(ast.Constant(not value))
        elif isinstance(value, int):
            options.append(ast.Constant(value + 1))
        elif isinstance(value, float):
            options.append(ast.Constant(value * 2 + (value == 0)))
    elif isinstance(node, ast.IfExp):
        options += [node.body, node.orelse]
    elif isinstance(node, ast.If):
        options.append(ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))
    elif isinstance(node, ast.Call):
        if node.keywords:
            options.append(ast.Call(node.func, node.args, node.keywords[:-1]))
        if len(node.args) >= 2:
            options.append(ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords))
        elif isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            options.append(node.func.value)  # x.sqrt() becomes x
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)):
        options.append(ast.Pass())
    return options[variant] if variant < len(options) else None
