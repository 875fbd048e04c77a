"""Documents are read a piece at a time, and no id, byte or border between documents depends on where a piece ends."""

from __future__ import annotations

import tracemalloc
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.cli.tokenize import split, write
from tutorial_lib.data import documents as module
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.documents import LINE, WORD, Documents, cut, part_of_document, some_documents
from tutorial_lib.data.tokenize import ByteTokenizer

TEXT = "To be, or not to be,\nthat is the question.\nWhether 'tis nobler\n\nin the mind\r\n  to suffer\n" * 5
BPE = BPETokenizer.train(TEXT, 300, ["<|eos|>"])

small_pieces = st.integers(4, 40).map(lambda size: patch.object(module, "PIECE", size))
texts = st.lists(
    st.sampled_from([*"aé ,.!1\t人🙂", "\n", "\r\n", "the ", "be,\nthat", " the words "]), max_size=60
)


def together(pieces):
    """The documents that pieces are of, whole."""
    found, held = [], b""
    for piece, ends in pieces:
        held += piece
        if ends:
            found.append(held)
            held = b""
    assert not held, "the last piece ends a document"
    return found


@settings(max_examples=300)
@given(texts.map("".join), small_pieces)
def test_pieces_give_the_ids_that_the_whole_gives(text, size):
    data = text.encode()
    with size:
        pieces = list(cut(data))
        assert all(len(piece) <= module.PIECE for piece in pieces)
    assert b"".join(pieces) == data
    assert "".join(piece.decode() for piece in pieces) == text, "no character is cut"
    ends = {found.end() for place in (LINE, WORD) for found in place.finditer(data)}
    at = 0
    for piece in pieces[:-1]:
        at += len(piece)
        if at not in ends:
            return  # neither a line nor a word was in reach
    assert [i for piece in pieces for i in BPE.encode_bytes(piece)] == BPE.encode_bytes(data)


def test_prose_is_cut_between_lines_and_words():
    with patch.object(module, "PIECE", 48):
        pieces = list(cut(TEXT.encode()))
    assert len(pieces) > 9
    assert [i for piece in pieces for i in BPE.encode_bytes(piece)] == BPE.encode_bytes(TEXT.encode())


@settings(max_examples=300)
@given(st.lists(texts.map("".join), min_size=1, max_size=4), st.sampled_from([None, "\n", "be", "\r\n\n", "人"]), small_pieces)  # fmt: skip
def test_documents_are_those_that_a_split_of_the_whole_gives(tmp_path_factory, contents, separator, size):
    folder = tmp_path_factory.mktemp("documents")
    files = [folder / str(i) for i in range(len(contents))]
    for file, text in zip(files, contents, strict=True):
        file.write_bytes(text.encode())
    mark = separator and separator.encode()
    whole = [part for text in contents for part in (text.encode().split(mark) if mark else [text.encode()])]
    wanted = [part for part in whole if part.strip()]
    with size:
        documents = Documents(files, mark)
        found = together(documents)
        assert [text for text in found if text.strip()] == wanted
        assert all(len(text) > module.PIECE for text in found if not text.strip()), "a long emptiness is kept"
        assert together(documents) == found, "as often as one likes"
        assert documents.measure() == (len(found), sum(map(len, found)))
        assert together(some_documents(documents, 1, 3)) == found[1:3]
        if len(found) == 1:
            (text,) = found
            assert together(part_of_document(documents, 2, len(text) - 1)) == [text[2:-1]]


def test_memory_does_not_depend_on_the_length_of_a_document(tmp_path):
    line = b"To be, or not to be, that is the question of 64 characters.\n...\n"
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(line * (1 << 14))  # a MiB
    tokenizer = ByteTokenizer(["<|eos|>"])
    tracemalloc.start()
    try:
        parts = split(Documents([path]), 0.25, "long.txt", False)
        sizes = {
            name: write(tmp_path / name, tokenizer, "byte", part(), 1 << 20) for name, part in parts.items()
        }
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sizes == {"train": (48 << 20, (48 << 20) + 1), "val": (16 << 20, (16 << 20) + 1)}
    assert peak < 24 << 20, f"{peak:,} bytes for a document of {64 << 20:,}"
