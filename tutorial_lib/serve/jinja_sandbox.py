"""Where the templates of strangers run: they build a text from what they are given, and do nothing else.

Jinja's own sandbox keeps a template from the machine's files and programs. It does not keep it from `"a" * 10**12`,
from a text that doubles in every round, or from a loop in a loop in a loop. So here whatever a template makes is
counted, and the clock is looked at.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["LONGEST", "Sandbox", "TemplateProblem", "one_line"]

LONGEST = 1 << 20
"""Characters of the longest text that a template may make; a list of so many things is as long."""

MOST = 16 * LONGEST
"""All that it may make, one thing after the other."""

SECONDS = 2.0
"""Of a processor's time that it may take. A chat takes thousandths."""

FILTERS = """capitalize count d default dictsort first float int items join last length list lower map max min reject
rejectattr replace reverse safe select selectattr sort string title tojson trim unique upper""".split()

METHODS = """capitalize count endswith find get index isalnum isalpha isdigit islower isspace isupper items join keys
lower lstrip partition removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith
strip title upper values""".split()
"""Of texts, numbers, lists and dicts."""


class TemplateProblem(ValueError):
    """A template that does not work, or does not take these messages. The message is one sentence."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which nothing takes for ever or grows without end, either."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=self._say
        )
        ours = {"join": self._join, "replace": self._replace, "tojson": self._tojson, "trim": self._trim}
        known = {name: self._watched(function) for name, function in (self.filters | ours).items()}
        self.filters = {name: known[name] for name in FILTERS}
        self.filters |= {"(concat)": self.concat, "(rounds)": self._rounds, "(watch)": self.watch}
        self.tests = {name: self._watched(function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"namespace": _Names, "raise_exception": _complain, "strftime_now": _now}
        self.begin()

    def begin(self) -> None:
        """Count from nothing."""
        self.made, self.looks, self.end = 0, 0, time.process_time() + SECONDS

    def watch(self, value: Any) -> Any:
        """What a template has made goes through here."""
        self.made += (size := _size(value))
        self.looks += 1
        # To look at the clock costs more than most of what is watched: every 16th time, and whenever much was made.
        late = (self.looks % 16 == 0 or size > 1024) and time.process_time() > self.end
        if self.made > MOST or late:
            raise TemplateProblem("the chat template takes more time or memory than a chat needs")
        return value

    def concat(self, parts: Iterable[Any]) -> str:
        """One text of many; Jinja calls it for blocks and macros."""
        texts, length = [], 0
        for part in parts:
            texts.append(str(part))
            length += len(texts[-1])
            _check(length)
        return self.watch("".join(texts))

    # ── What Jinja asks ──────────────────────────────────────────────────────────────────────────────────

    def _parse(self, *source: Any) -> nodes.Template:
        return _Watchful().visit(super()._parse(*source))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use it."""
        plain = isinstance(obj, (str, bytes, int, float, list, tuple, dict, range))
        return super().is_safe_attribute(obj, attr, value) and (not plain or attr in METHODS)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is not among the methods."""
        return None

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A macro, a method, a function."""
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(text, str):
            if name == "join":
                return self._join(*args, text)
            if name == "replace":
                return self._replace(text, *args, **kwargs)
            _short_enough(*args)
        return self.watch(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Texts and lists can only be added, and numbers must be small."""
        small = all(isinstance(value, (int, float)) and abs(value) < 1 << 32 for value in (left, right))
        if not small and operator != "+" or operator == "**" and abs(right) > 8:
            raise SecurityError(f"{operator} between these is not needed to write a chat down")
        return self.watch(super().call_binop(context, operator, left, right))

    # ── Filters ──────────────────────────────────────────────────────────────────────────────────────────

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # with the mark that says whether Jinja hands it its context
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self.watch(function(*args, **kwargs))

        return watched

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.watch(None)
            yield value

    def _say(self, value: Any) -> str:
        return self.watch(str(value))

    def _join(self, values: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
        def parts() -> Iterator[Any]:
            for i, value in enumerate(values):
                if i:
                    yield between
                yield value if attribute is None else self.getitem(value, attribute)

        return self.concat(parts())

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        _check(len(text) + text.count(old) * len(new))
        return self.watch(text.replace(old, new, -1 if count is None else count))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if (indent or 0) > 16:
            raise SecurityError(f"an indent of {indent} is not needed to write a chat down")
        _short_enough(*(separators or ()))
        how = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        return self.concat(json.JSONEncoder(sort_keys=sort_keys, **how).iterencode(value))

    def _trim(self, text: Any, characters: str | None = None) -> str:
        _short_enough(characters or "")
        return str(text).strip(characters)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, Hugging Face's marks around what is to be learned. Read past here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Watchful(NodeTransformer):
    """Puts a watch on all that makes a value, or goes round."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("a loop that calls itself is not needed to write a chat down")
        self.generic_visit(node)
        node.iter = _through("(rounds)", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("(concat)", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        target = getattr(node, "ctx", "load") != "load"
        return node if target else _through("(watch)", node)

    visit_List = visit_Tuple = visit_Dict = visit_Compare = _made

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("(watch)", node) if isinstance(node.arg, nodes.Slice) else node


class _Names(Namespace):
    __repr__ = object.__repr__  # Jinja's writes down all that is in it, and in what is in it


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    """How long it is when all that is in it is counted, as often as it is in it."""
    todo, size = [value], 0
    while todo:
        value = todo.pop()
        size += 1 + (len(value) if isinstance(value, (str, range)) else 0)
        _check(size)
        if isinstance(value, dict):
            todo += value.keys()
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
    return size


def _check(length: int) -> None:
    if length > LONGEST:
        raise TemplateProblem(f"the chat template makes more than {LONGEST:,} characters")


def _short_enough(*arguments: Any) -> None:
    # Looking for each of a million characters among another million takes minutes.
    if any(isinstance(argument, str) and len(argument) > 4096 for argument in arguments):
        raise SecurityError("so long an argument is not needed to write a chat down")


def _complain(sentence: str) -> None:
    raise TemplateProblem(one_line(sentence))


def _now(form: str) -> str:
    if not re.fullmatch(r"(%-?[A-Za-z%]|[^%]){,99}", form):  # C's has widths, too: %1000000000d
        raise SecurityError("strftime_now takes a short form, such as '%d %b %Y'")
    return datetime.now().strftime(form)


def one_line(said: object) -> str:
    """The beginning of what somebody else's program says."""
    return " ".join(str(said).split())[:160]
