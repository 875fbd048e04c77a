"""`llm-scratch tokenize`: train a BPE on a text, and write the text as token shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from tutorial_lib.cli.common import run_alone, sentences, speak
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.corpora import CORPORA, load_text
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.data.shards import ShardWriter
from tutorial_lib.interop.tokenizers import encode_bytes, load_tokenizer

__all__ = ["tokenize"]

EOS = "<|eos|>"


def documents_of(dataset: str, separator: str | None) -> Iterator[bytes]:
    """The documents of a text: a corpus is one, each file of a pattern is one, or what a separator cuts out."""
    if dataset in CORPORA:
        texts: Iterable[bytes] = [load_text(dataset)]
    else:
        import glob

        paths = sorted(glob.glob(str(Path(dataset).expanduser()), recursive=True))
        texts = (
            (Path(path).read_bytes() for path in paths if Path(path).is_file())
            if paths
            else [load_text(dataset)]
        )
    for text in texts:
        pieces = text.split(separator.encode()) if separator else [text]
        yield from (piece for piece in pieces if piece.strip())


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
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: choose another folder")
        documents: list[bytes] = list(
            documents_of(
                dataset,
                separator and separator.encode("latin-1", "backslashreplace").decode("unicode_escape"),
            )
        )
        if clean:
            documents = cleaned(documents)
        if not documents and clean:
            raise ValueError("cleaning left no document: cut the text into documents with --separator")
        if not documents:
            raise ValueError(f"there is no text in {dataset}")
        if len(documents) == 1:  # one long text: its end
            import numpy as np

            halves = split_train_val(np.frombuffer(documents[0], np.uint8), val_fraction)
            parts = {name: [half.tobytes()] for name, half in zip(("train", "val"), halves, strict=True)}
        else:
            cut = len(documents) - max(1, round(len(documents) * val_fraction))
            if not 0 < cut < len(documents):
                raise ValueError(
                    f"--val-fraction {val_fraction} leaves nothing of {len(documents)} documents"
                )
            parts = {"train": documents[:cut], "val": documents[cut:]}
        known = load_tokenizer(tokenizer) if tokenizer else train_bpe(parts["train"], vocab_size)
        try:
            name = tokenizer if tokenizer in ("byte", "gpt2") else "tokenizer.json"
            for part, texts in parts.items():
                total = write(out / part, known, name, texts, shard_tokens)
                speak(f"{part}: {sum(map(len, texts)):,} bytes are {total:,} tokens")
            if isinstance(known, BPETokenizer) and name == "tokenizer.json":
                known.save(out / name)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)  # it was empty: nothing half-written stays
            raise
        print(out)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """A vocabulary with `<|eos|>` as its last id."""
    speak(f"training a BPE of {vocab_size:,} tokens …")
    known = BPETokenizer.train((text.decode("utf-8", "replace") for text in texts), vocab_size, [EOS])
    if known.vocab_size < vocab_size:
        speak(f"the text ran out of pairs: {known.vocab_size:,} tokens")
    return known


def write(folder: Path, known: Tokenizer, name: str, texts: Iterable[bytes], shard_tokens: int) -> int:
    """One part as shards, `<|eos|>` after each document if the tokenizer has one."""
    with ShardWriter(folder, known.vocab_size, name, shard_tokens) as writer:
        for text in texts:
            writer.add(encode_bytes(known, text))
            if known.eos_id is not None:
                writer.add([known.eos_id])
    return writer.total


def cleaned(documents: list[bytes]) -> list[bytes]:
    """Without duplicates, junk and personal data; says what went."""
    from tutorial_lib.data.clean import clean as clean_up

    kept, report = clean_up(document.decode("utf-8", "replace") for document in documents)
    result = [text.encode() for text in kept]
    speak(str(report))
    return result


if __name__ == "__main__":
    run_alone(tokenize)
