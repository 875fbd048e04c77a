"""Conversations from files: both shapes, and every bad line by its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutorial_lib.data.conversations import load_conversations
from tutorial_lib.data.corpora import CorpusError

GOOD = {"prompt": "Reverse: lord", "completion": "drol"}
AS_MESSAGES = [{"role": "user", "content": "Reverse: lord"}, {"role": "assistant", "content": "drol"}]


def write(path: Path, *lines: object) -> Path:
    text = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in text) + b"\n")
    return path


def test_both_shapes_are_one(tmp_path):
    lists = {"prompt": AS_MESSAGES[:1], "completion": AS_MESSAGES[1:]}
    more = {"messages": [{"role": "system", "content": "s", "name": "x"}, *AS_MESSAGES], "source": "mine"}
    path = write(tmp_path / "a.jsonl", GOOD, "", {"messages": AS_MESSAGES}, lists, more)
    assert load_conversations(str(path)) == [
        AS_MESSAGES,
        AS_MESSAGES,
        AS_MESSAGES,
        [{"role": "system", "content": "s"}, *AS_MESSAGES],
    ]


def test_a_pattern_names_many_files(tmp_path):
    write(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "b.jsonl", GOOD, GOOD)
    assert len(load_conversations(str(tmp_path / "*.jsonl"))) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is no JSON"),
        ("[" * 5000, "it is no JSON"),
        (b"\xff", "it is not UTF-8 text"),
        ("[1]", "it is a list, but must be an object"),
        ("3", "it is the number 3, but must be an object"),
        (
            {"question": "a", "answer": "b"},
            "it has answer, question, but must have messages, or prompt and completion",
        ),
        ({"prompt": "a"}, "it has prompt, but must have"),
        ({"prompt": "a", "completion": 7}, "completion is the number 7, but must be a text"),
        ({"prompt": None, "completion": "b"}, "prompt is null, but must be a text"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": "hello"}, "messages is a text"),
        ({"messages": [{"role": "user"}]}, "message 1 must be an object with a role and a content"),
        (
            {"messages": [{"role": "human", "content": "a"}]},
            "message 1 has the role 'human', but must have one of",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1: its content is a list"),
        ({"messages": AS_MESSAGES[:1]}, "the user has the last word"),
        ('{"prompt": "a", "completion": "\\ud800"}', "half a surrogate pair stands in its content"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: ") as caught:
        load_conversations(str(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_in_it(tmp_path):
    with pytest.raises(ValueError, match="there is no conversation in .*empty"):
        load_conversations(str(write(tmp_path / "a.jsonl", "", "")))
    with pytest.raises(CorpusError, match="No file matches"):
        load_conversations(str(tmp_path / "none.jsonl"))


def test_the_courses_own_world():
    mine = load_conversations("problems", 30, "train", seed=1)
    assert len(mine) == 30 and mine != load_conversations("problems", 30, "held_out", seed=1)
    assert [message["role"] for message in mine[0]] == ["user", "assistant"]
