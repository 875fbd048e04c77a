"""`llm-scratch tokenize`: train a BPE on a text, and write the text as token shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tutorial_lib.cli.common import run_alone, sentences, speak
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.corpora import files_of
from tutorial_lib.data.documents import Documents, Piece, part_of_document, some_documents
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.data.new_folder import new_folder
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.data.shards import ShardWriter
from tutorial_lib.interop.tokenizers import encode_bytes, load_tokenizer

__all__ = ["tokenize"]

EOS = "<|eos|>"

LONGEST_TO_CLEAN = 1 << 23
"""Bytes. To be judged, a document is read as a whole, and all its runs of words are held beside it."""

Part = Callable[[], Iterator[Piece]]
"""One part of the text: goes through it from the beginning."""


def tokenize(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A new folder for the shards.", show_default=False)
    ],
    dataset: Annotated[str, typer.Option(help="A corpus, or a pattern of text files.")] = "shakespeare",
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", "--vocab_size", help="Tokens of the BPE, <|eos|> included.")
    ] = 8192,
    tokenizer: Annotated[
        str | None, typer.Option(help="Take this one (byte, gpt2, a file) and train none.")
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option("--val-fraction", "--val_fraction", help="The end of the documents, to validate on."),
    ] = 0.1,
    separator: Annotated[
        str | None, typer.Option(help=r"Cut files into documents here (\n for a new line).")
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", "--shard_tokens", help="Tokens in a file.")
    ] = 1 << 25,
    clean: Annotated[
        bool, typer.Option("--clean", help="First leave out duplicates and junk, and personal data.")
    ] = False,
) -> None:
    """Make token shards: llm-scratch tokenize --dataset "data/*.txt" --vocab-size 8192 --out data/mine

    The BPE is trained on what is not held out for validation. Then train on the folder: data.dataset=data/mine
    """
    with sentences():
        with new_folder(out) as place:
            cut = (separator or "").encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
            documents = Documents(files_of(dataset), cut or None)
            if clean:
                documents = cleaned(documents, place / "clean")
            parts = split(documents, val_fraction, dataset, clean)
            known = load_tokenizer(tokenizer) if tokenizer else train_bpe(parts["train"](), vocab_size)
            name = tokenizer if tokenizer in ("byte", "gpt2") else "tokenizer.json"
            for part, pieces in parts.items():
                size, total = write(place / part, known, name, pieces(), shard_tokens)
                speak(f"{part}: {size:,} bytes are {total:,} tokens")
            if name == "tokenizer.json":
                known.save(place / name)
            (place / "clean").unlink(missing_ok=True)
        print(out)


def split(documents: Documents, val_fraction: float, dataset: str, clean: bool) -> dict[str, Part]:
    """What is trained on and what is held out: the last documents; of a single one, its end."""
    number, size = documents.measure()
    if number == 0 and clean:
        raise ValueError("cleaning left no document: cut the text into documents with --separator")
    if number == 0:
        raise ValueError(f"there is no text in {dataset}")
    if number == 1:
        train, _ = split_train_val(range(size), val_fraction)
        cut, end, of = len(train), size, part_of_document
    else:
        cut, end, of = number - max(1, round(number * val_fraction)), number, some_documents
        if not 0 < cut < number:
            raise ValueError(f"--val-fraction {val_fraction} leaves nothing of {number} documents")
    return {"train": partial(of, documents, 0, cut), "val": partial(of, documents, cut, end)}


def train_bpe(pieces: Iterable[Piece], vocab_size: int) -> BPETokenizer:
    """A vocabulary with `<|eos|>` as its last id."""
    speak(f"training a BPE of {vocab_size:,} tokens …")
    known = BPETokenizer.train((piece.decode("utf-8", "replace") for piece, _ in pieces), vocab_size, [EOS])
    if known.vocab_size < vocab_size:
        speak(f"the text ran out of pairs: {known.vocab_size:,} tokens")
    return known


def write(
    folder: Path, known: Tokenizer, name: str, pieces: Iterable[Piece], shard_tokens: int
) -> tuple[int, int]:
    """One part as shards, `<|eos|>` after each document if the tokenizer has one: how many bytes, and tokens."""
    size = 0
    with ShardWriter(folder, known.vocab_size, name, shard_tokens) as writer:
        for piece, ends in pieces:
            size += len(piece)
            writer.add(encode_bytes(known, piece))
            if ends and known.eos_id is not None:
                writer.add([known.eos_id])
    return size, writer.total


def cleaned(documents: Documents, place: Path) -> Documents:
    """Without duplicates, junk and personal data, in a file for as long as they are needed; says what went."""
    from tutorial_lib.data.clean import clean as clean_up

    kept, report = clean_up(_whole(documents))
    mark = b"\xff"  # no text has this byte
    with place.open("wb") as file:
        for text in kept:
            file.write(text.encode("utf-8", "replace") + mark)
    speak(str(report))
    return Documents([place], mark)


def _whole(documents: Documents) -> Iterator[str]:
    held = b""
    for piece, ends in documents:
        held += piece
        if len(held) > LONGEST_TO_CLEAN:
            raise ValueError(
                f"a document has more than the {LONGEST_TO_CLEAN:,} bytes that --clean can look at: "
                "cut the text into documents with --separator"
            )
        if ends:
            yield held.decode("utf-8", "replace")
            held = b""


if __name__ == "__main__":
    run_alone(tokenize)
