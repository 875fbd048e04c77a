"""Chat templates: how a conversation is written down for a model that was taught one way of writing it down.

A model's own template is a program in the language Jinja, as Hugging Face's and llama.cpp's files carry it. It runs
in a sandbox: it can build a text from the messages, and reach nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import regex
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from tutorial_lib.data.protocol import Tokenizer

__all__ = ["PLAIN", "ROLES", "ChatTemplate", "Message", "TemplateProblem"]

Message = dict[str, str]
"""`{"role": "user", "content": "Hello"}`"""

ROLES = ("system", "user", "assistant")

PLAIN = """
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ message['content'] }}

{% endfor -%}
{%- if add_generation_prompt -%}
Assistant:
{%- endif -%}
"""
"""For a model that was never taught to chat, a script with names: it may go on with the other's lines, too."""

LONGEST = 1 << 22
"""Characters that a template may write."""

MARK = "\ufdd0"
"""No text has this character (Unicode keeps it free for such uses). It breaks up what only looks like a special."""


class TemplateProblem(ValueError):
    """A template that does not work, or does not take these messages. The message is one sentence."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which nothing grows without end, either."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, (int, float)) and abs(value) < 1 << 32 for value in (left, right))
        if not numbers or (operator == "**" and abs(right) > 8):
            raise SecurityError(f"{operator} between these is not needed to write a chat down")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A template, ready to be filled in.

    Args:
        source: In Jinja's language.
        specials: Names that it may ask for: `{"bos_token": "<s>"}`.

    Raises:
        TemplateProblem: if it is not in Jinja's language.
    """

    def __init__(self, source: str, specials: Mapping[str, str] | None = None) -> None:
        self.source, self.specials = source, dict(specials or {})
        self._template = self._read()

    def _read(self) -> Any:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _complain
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except (TemplateError, RecursionError) as error:
            raise TemplateProblem(f"the chat template cannot be read: {_short(error)}") from None

    def write(self, messages: Sequence[Message], answer_next: bool = True) -> str:
        """The conversation as one text.

        Args:
            messages: Who said what, in turns.
            answer_next: End with what announces the assistant's answer.

        Raises:
            TemplateProblem: if the template refuses these messages, or fails.
        """
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise TemplateProblem(
                    f"a message has a role ({', '.join(ROLES)}) and a content: {message!r:.80}"
                )
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=answer_next, **self.specials
            ):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST:
                    raise TemplateProblem(f"the chat template writes more than {LONGEST:,} characters")
        except TemplateProblem:
            raise
        except Exception as error:  # a program of somebody else's: anything can go wrong in it
            raise TemplateProblem(
                f"the chat template does not take this conversation: {_short(error)}"
            ) from None
        return "".join(pieces)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], answer_next: bool = True
    ) -> list[int]:
        """The conversation as ids. The template's specials become tokens; the same names in a message stay text.

        Without this care, whoever writes `<|im_end|>` into a message could end it and speak as somebody else.
        """
        names = sorted(tokenizer.specials, key=len, reverse=True)
        special = regex.compile("|".join(map(regex.escape, names))) if names else None
        if special is not None:
            messages = [
                {
                    **m,
                    "content": special.sub(
                        lambda found: found[0][0] + MARK + found[0][1:], _clean(m["content"])
                    ),
                }
                for m in messages
            ]
        text = self.write(messages, answer_next)
        if special is None:
            return tokenizer.encode(text)
        ids: list[int] = []
        at = 0
        for found in special.finditer(text):
            ids += tokenizer.encode(_clean(text[at : found.start()]))
            ids.append(tokenizer.specials[found[0]])
            at = found.end()
        return ids + tokenizer.encode(_clean(text[at:]))


def _clean(text: str) -> str:
    return text.replace(MARK, "")


def _complain(sentence: str) -> None:
    raise TemplateProblem(str(sentence)[:200])


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split())[:160]
    return said or type(error).__name__
