"""Chat templates: how a conversation is written down for a model that was taught one way of writing it down.

A model's own template is a program in the language Jinja, as Hugging Face's and llama.cpp's files carry it. It runs
in a sandbox: it can build a text from the messages, and reach nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import regex

from tutorial_lib.data.conversations import ROLES, Message
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.serve.jinja_sandbox import Sandbox, TemplateProblem, one_line

__all__ = ["PLAIN", "ROLES", "ChatTemplate", "Message", "TemplateProblem"]

PLAIN = """
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ message['content'] | trim }}

{% endfor -%}
{%- if add_generation_prompt -%}
Assistant:
{%- endif -%}
"""
"""For a model that was never taught to chat, a script with names: it may go on with the other's lines, too."""

LONGEST_SOURCE = 1 << 16
"""Characters of a template. The longest that are in use have a quarter of that."""

MARK = "\ufdd0"
"""No text has this character (Unicode keeps it free for such uses). It breaks up what only looks like a special."""


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
        if len(self.source) > LONGEST_SOURCE:
            raise TemplateProblem(f"the chat template has more than {LONGEST_SOURCE:,} characters")
        try:
            return Sandbox().from_string(self.source)
        except Exception as error:  # Jinja's errors, and Python's about what Jinja made of it
            raise TemplateProblem(
                f"the chat template cannot be read: {one_line(error) or type(error).__name__}"
            ) from None

    def write(self, messages: Sequence[Message], answer_next: bool = True) -> str:
        """The conversation as one text.

        Args:
            messages: Who said what, in turns.
            answer_next: End with what announces the assistant's answer.

        Raises:
            TemplateProblem: if the template refuses these messages, or fails.
        """
        _check(messages)
        # What Hugging Face hands to a template; there are no tools and documents.
        given = {"messages": list(messages), "tools": None, "documents": None}
        given |= {"add_generation_prompt": answer_next, **self.specials}
        environment = self._template.environment
        environment.begin()
        try:
            return environment.concat(self._template.generate(given))
        except TemplateProblem:
            raise
        except Exception as error:  # a program of somebody else's: anything can go wrong in it
            raise TemplateProblem(
                f"the chat template does not take this conversation: {one_line(error) or type(error).__name__}"
            ) from None

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], answer_next: bool = True
    ) -> list[int]:
        """The conversation as ids. The template's specials become tokens; the same names in a message stay text.

        Without this care, whoever writes `<|im_end|>` into a message could end it and speak as somebody else.
        """
        _check(messages)
        names = sorted(tokenizer.specials, key=len, reverse=True)
        if not names:
            return tokenizer.encode(self.write(messages, answer_next))
        begins = regex.compile("|".join(f"{regex.escape(n[0])}(?={regex.escape(n[1:])})" for n in names))
        apart = [{**m, "content": begins.sub(rf"\g<0>{MARK}", _clean(m["content"]))} for m in messages]
        text = self.write(apart, answer_next)
        if MARK not in text:
            return tokenizer.encode(text, allow_specials=True)
        special = regex.compile("|".join(map(regex.escape, names)))
        ids: list[int] = []
        at = 0
        for found in special.finditer(text):
            ids += tokenizer.encode(_clean(text[at : found.start()]))
            ids.append(tokenizer.specials[found[0]])
            at = found.end()
        return ids + tokenizer.encode(_clean(text[at:]))


def _check(messages: Sequence[Message]) -> None:
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise TemplateProblem(f"a message has a role ({', '.join(ROLES)}) and a content: {message!r:.80}")


def _clean(text: str) -> str:
    return text.replace(MARK, "")
