"""Conversations from files of JSON lines, in the two shapes that everybody writes, checked line by line.

{"messages": [{"role": "user", "content": "Reverse: lord"}, {"role": "assistant", "content": "drol"}]}
{"prompt": "Reverse: lord", "completion": "drol"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tutorial_lib.data.corpora import files_of
from tutorial_lib.data.problems import draw

__all__ = ["PROBLEMS", "ROLES", "Conversation", "Message", "load_conversations", "parse_conversation"]

Message = dict[str, str]
"""`{"role": "user", "content": "Hello"}`"""

Conversation = list[Message]
"""`[{"role": "user", "content": …}, {"role": "assistant", "content": …}]`"""

ROLES = ("system", "user", "assistant")

PROBLEMS = "problems"
"""The name of the course's own world (`data.problems`) where a data set is named."""

LONGEST_LINE = 1 << 24
"""Characters of a line. A conversation has a thousandth of that."""


def load_conversations(dataset: str, n: int = 0, split: str = "train", seed: int = 0) -> list[Conversation]:
    """All conversations of a data set.

    Args:
        dataset: `problems`, or the path or pattern of files of JSON lines.
        n: How many problems to draw; files have as many as they have.
        split: Of the problems.
        seed: Of the problems.

    Raises:
        ValueError: at the first line that is no conversation; the file and the number of the line are named.
        CorpusError: if no file matches.
    """
    if dataset == PROBLEMS:
        return [problem.messages() for problem in islice(draw(split, seed), n)]
    found = [conversation for path in files_of(dataset) for conversation in _read(path)]
    if not found:
        raise ValueError(f"there is no conversation in {dataset}: its files are empty")
    return found


def _read(path: Path) -> Iterator[Conversation]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: it has more than {LONGEST_LINE:,} bytes")
            if line.strip():
                try:
                    yield parse_conversation(_json(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({str(error).partition(':')[0]})") from None


def parse_conversation(record: Any) -> Conversation:
    """A record's conversation, in one of the two shapes.

    Raises:
        ValueError: if it has neither, or nobody could learn from it: it must end with what the assistant says.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"it is {_kind(record)}, but must be an object with messages, or with prompt and completion"
        )
    if "messages" in record:
        return _messages(record["messages"])
    if not {"prompt", "completion"} <= record.keys():
        names = ", ".join(sorted(map(str, record))) or "nothing"
        raise ValueError(f"it has {names:.80}, but must have messages, or prompt and completion")
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # the shape of messages, in two parts
        return _messages(prompt + completion)
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is {_kind(text)}, but must be a text")
    return _messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])


def _messages(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {_kind(messages)}, but must be a list of messages")
    found: Conversation = []
    for at, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {at} must be an object with a role and a content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(
                f"message {at} has the role {role!r:.40}, but must have one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(f"message {at}: its content is {_kind(content)}, but must be a text")
        found.append({"role": role, "content": content})
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"message {at}: half a surrogate pair stands in its content, which is no text"
            ) from None
    if found[-1]["role"] != "assistant":
        raise ValueError(
            f"the {found[-1]['role']} has the last word, but it is the assistant's that is learned"
        )
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, (list, str)) and not value:
        return f"an empty {names[type(value)].split()[-1]}"
    return names.get(type(value), f"the number {value!r:.20}")
