"""Clean a corpus: duplicates out, junk out, personal data replaced, and a report of what went and why.

    kept, report = clean(documents)          # kept is an iterator: nothing happens until it is read
    for text in kept:
        writer.add(tokenizer.encode(text))
    print(report)

A step takes a stream of documents and gives a stream of documents, so steps compose and none holds the corpus (the
duplicate steps remember a digest and a signature of each document kept, a few KB). Their order matters:

1. `ExactDuplicates` first: it is nearly free, and every later step has less to read.
2. `QualityFilter` before `NearDuplicates`: junk is often alike, and a hash is dearer than a word count.
3. `NearDuplicates` on what is left. The first of a group of copies stays.
4. `ScrubPII` last: it reads most slowly, so it should read least. (Copies that differ only in an address are near
   duplicates all the same.)
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tutorial_lib.data.pii import KINDS, scrub
from tutorial_lib.data.quality import GOPHER_QUALITY, GOPHER_REPETITION, Rule, first_broken

__all__ = [
    "DEFAULT_STEPS",
    "Document",
    "ExactDuplicates",
    "NearDuplicates",
    "QualityFilter",
    "Removal",
    "Report",
    "ScrubPII",
    "Step",
    "clean",
    "normalize",
    "shingles",
]


@dataclass(frozen=True)
class Document:
    """A text and its number in the stream that came in, 0, 1, 2, …"""

    index: int
    text: str


@dataclass(frozen=True)
class Removal:
    """Which document went, at which step, by which rule, and why in words."""

    index: int
    step: str
    rule: str
    reason: str


@dataclass
class Report:
    """What a clean-up did; complete when its stream has been read to the end."""

    seen: int = 0
    kept: int = 0
    removed: list[Removal] = field(default_factory=list)
    replaced: Counter[str] = field(default_factory=Counter)
    """How many pieces of personal data of each kind."""

    def removed_by(self, step: str | None = None) -> set[int]:
        """The numbers of the documents that a step removed (None: all steps)."""
        return {r.index for r in self.removed if step in (None, r.step)}

    def __str__(self) -> str:
        counts = Counter((r.step, r.rule) for r in self.removed)
        rows = [f"{self.seen:>9,}  documents read"]
        rows += [f"{-count:>9,}  {step}: {rule}" for (step, rule), count in counts.items()]
        rows += [f"{self.kept:>9,}  documents kept"]
        rows += [f"{count:>9,}  <{kind}> replaced" for kind, count in sorted(self.replaced.items())]
        return "\n".join(rows)


Step = Callable[[Iterator[Document], Report], Iterator[Document]]
"""Takes a stream of documents, gives a stream, and writes what it removes into the report."""


def clean(documents: Iterable[str], steps: Sequence[Step] | None = None) -> tuple[Iterator[str], Report]:
    """Send documents through the steps, one after the other, one document at a time.

    Returns:
        The kept texts as an iterator, and the report, which fills while the iterator is read.
    """
    report = Report()

    def numbered() -> Iterator[Document]:
        for index, text in enumerate(documents):
            report.seen += 1
            yield Document(index, text)

    stream: Iterator[Document] = numbered()
    for step in DEFAULT_STEPS if steps is None else steps:
        stream = step(stream, report)

    def texts() -> Iterator[str]:
        for document in stream:
            report.kept += 1
            yield document.text

    return texts(), report


def normalize(text: str) -> str:
    """A text without what seldom matters: case, the amount of white space, ways to write one character (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str, n: int = 5) -> set[str]:
    """All runs of `n` words of the normalized text; of a shorter text, the whole of it."""
    words = normalize(text).split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


# --- the steps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactDuplicates:
    """Remove every text whose normalized form came before. Remembers a digest of each, not the text."""

    name = "exact duplicate"

    def __call__(self, documents: Iterator[Document], report: Report) -> Iterator[Document]:
        first: dict[bytes, int] = {}
        for document in documents:
            raw = normalize(document.text).encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            original = first.setdefault(digest, document.index)
            if original == document.index:
                yield document
            else:
                why = f"the same as document {original}"
                report.removed.append(Removal(document.index, self.name, "same normalized text", why))


@dataclass(frozen=True)
class NearDuplicates:
    """Remove texts that share most of their word shingles with one kept before, by MinHash and LSH (datasketch).

    Bands find candidates, and the two signatures' own estimate decides. With 128 permutations its standard error
    is at most 0.044, so pairs that close to the threshold may fall either way. Broder 1997; Leskovec, Rajaraman,
    Ullman, *Mining of Massive Datasets*, chapter 3.

    Args:
        threshold: Jaccard similarity from which a text counts as a copy.
        num_perm: Length of a signature; each number takes at most 8 bytes of memory for a kept document.
        shingle: Words in a shingle.
        seed: Of the hash functions: the same seed, the same decisions.

    Raises:
        ImportError: if datasketch is missing, when the first document is read.
    """

    threshold: float = 0.8
    num_perm: int = 128
    shingle: int = 5
    seed: int = 1
    name = "near duplicate"

    def __call__(self, documents: Iterator[Document], report: Report) -> Iterator[Document]:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ImportError(
                "near-duplicates need the package datasketch: pip install datasketch"
            ) from error
        # Every candidate is compared, so a false alarm costs a moment and a miss is for good: mind the misses.
        table = MinHashLSH(self.threshold, self.num_perm, weights=(0.1, 0.9))
        signatures: dict[int, MinHash] = {}
        for document in documents:
            signature = MinHash(self.num_perm, self.seed)
            pieces = shingles(document.text, self.shingle)
            signature.update_batch([piece.encode("utf-8", "surrogatepass") for piece in sorted(pieces)])
            similar = {i: signature.jaccard(signatures[i]) for i in sorted(table.query(signature))}
            nearest = max(similar, key=similar.__getitem__, default=None)
            if nearest is None or similar[nearest] < self.threshold:
                table.insert(document.index, signature)
                signatures[document.index] = signature
                yield document
            else:
                why = f"about {similar[nearest]:.0%} of its shingles are those of document {nearest}"
                report.removed.append(
                    Removal(document.index, self.name, f"MinHash ≥ {self.threshold:g}", why)
                )


@dataclass(frozen=True)
class QualityFilter:
    """Remove texts that break a rule (see `data.quality`); the report names the first one broken."""

    rules: tuple[Rule, ...] = GOPHER_QUALITY + GOPHER_REPETITION
    name = "quality"

    def __call__(self, documents: Iterator[Document], report: Report) -> Iterator[Document]:
        for document in documents:
            if broken := first_broken(document.text, self.rules):
                report.removed.append(Removal(document.index, self.name, broken[0].name, broken[1]))
            else:
                yield document


@dataclass(frozen=True)
class ScrubPII:
    """Replace personal data by placeholders (see `data.pii`). Removes no document."""

    kinds: tuple[str, ...] = tuple(KINDS)
    region: str = "US"
    name = "personal data"

    def __call__(self, documents: Iterator[Document], report: Report) -> Iterator[Document]:
        for document in documents:
            text, counts = scrub(document.text, self.kinds, self.region)
            report.replaced.update(counts)
            yield Document(document.index, text)


DEFAULT_STEPS: tuple[Step, ...] = (ExactDuplicates(), QualityFilter(), NearDuplicates(), ScrubPII())
"""All of it, in the order that the top of this module explains."""
