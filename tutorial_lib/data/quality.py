"""Rules of thumb that tell prose from page furniture: Gopher's and C4's, each a measure with its threshold.

A rule is a number about a text and the range in which it has to lie. Nothing here understands the text: lists,
verse, code and short answers fall foul of rules that were tuned on English web pages. Lesson 4.8 counts that.

Sources: Rae et al. 2021, *Scaling Language Models (Gopher)*, appendix A.1, table A1; Raffel et al. 2020, *Exploring
the Limits of Transfer Learning (T5)*, section 2.2 (C4).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

__all__ = ["C4", "GOPHER_QUALITY", "GOPHER_REPETITION", "Rule", "first_broken", "terminal_lines"]

STOP_WORDS = frozenset("the be to of and that have with".split())


@dataclass(frozen=True)
class Rule:
    """A text passes if `low <= measure(text) <= high`."""

    name: str
    measure: Callable[[str], float]
    low: float = -math.inf
    high: float = math.inf

    def broken(self, text: str) -> str | None:
        """None, or the reason in words: `"mean word length is 1.4, below 3"`."""
        value = self.measure(text)
        if self.low <= value <= self.high:
            return None
        side, bound = ("below", self.low) if value < self.low else ("above", self.high)
        return f"{self.name} is {value:.3g}, {side} {bound:g}"


def first_broken(text: str, rules: Sequence[Rule]) -> tuple[Rule, str] | None:
    """The first rule that a text breaks, and the reason; None if it keeps them all."""
    return next(((rule, reason) for rule in rules if (reason := rule.broken(text))), None)


# --- measures -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)  # a dozen rules look at one text in turn
def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@lru_cache(maxsize=4)
def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in (line.strip() for line in text.splitlines()) if line)


@lru_cache(maxsize=4)
def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(piece for piece in (piece.strip() for piece in re.split(r"\n\s*\n", text)) if piece)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def word_count(text: str) -> float:
    """Words, as white space separates them."""
    return len(_words(text))


def mean_word_length(text: str) -> float:
    """Characters a word, marks included."""
    return _share(sum(map(len, _words(text))), len(_words(text)))


def symbol_ratio(text: str) -> float:
    """Hash marks and ellipses for each word."""
    return _share(len(re.findall(r"#|\.\.\.|…", text)), len(_words(text)))


def alphabetic_share(text: str) -> float:
    """The share of the words with at least one letter in them."""
    return _share(sum(any(map(str.isalpha, word)) for word in _words(text)), len(_words(text)))


def stop_words(text: str) -> float:
    """How many of *the, be, to, of, and, that, have, with* occur."""
    return len(STOP_WORDS & {word.strip(".,;:!?'\"()[]*_").lower() for word in _words(text)})


def bullet_lines(text: str) -> float:
    """The share of the lines that begin with a bullet."""
    return _share(sum(line.startswith(("•", "-", "*", "‣", "●")) for line in _lines(text)), len(_lines(text)))


def ellipsis_lines(text: str) -> float:
    """The share of the lines that end with an ellipsis."""
    return _share(sum(line.endswith(("...", "…")) for line in _lines(text)), len(_lines(text)))


def _repeated(pieces: Sequence[str], weight: Callable[[str], int]) -> float:
    """The share (by weight) of pieces that occurred before."""
    seen: set[str] = set()
    again = 0
    for piece in pieces:
        again += weight(piece) if piece in seen else 0
        seen.add(piece)
    return _share(again, sum(map(weight, pieces)))


def repeated_lines(text: str, by_characters: bool = False) -> float:
    """The share of the lines that are repetitions of an earlier one."""
    return _repeated(_lines(text), len if by_characters else lambda _: 1)


def repeated_paragraphs(text: str, by_characters: bool = False) -> float:
    """The share of the paragraphs that are repetitions of an earlier one."""
    return _repeated(_paragraphs(text), len if by_characters else lambda _: 1)


def top_ngram(text: str, n: int) -> float:
    """The share of the characters (spaces aside) in the commonest run of `n` words; 0 if none comes twice."""
    words = _words(text)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    most = max((count * sum(map(len, run)) for run, count in counts.items() if count > 1), default=0)
    return _share(most, sum(map(len, words)))


def repeated_ngrams(text: str, n: int) -> float:
    """The share of the characters that lie in runs of `n` words which occurred before; each counts once."""
    words = _words(text)
    seen: set[tuple[str, ...]] = set()
    covered, end = 0, 0  # words before `end` are counted
    for i in range(len(words) - n + 1):
        run = words[i : i + n]
        if run in seen:
            covered += sum(map(len, words[max(i, end) : i + n]))
            end = i + n
        seen.add(run)
    return _share(covered, sum(map(len, words)))


def sentences(text: str) -> float:
    """Ends of sentences, told by their marks."""
    return len(re.findall(r"[.!?][\"'”’)]*(?=\s|$)", text))


def curly_brackets(text: str) -> float:
    """How many `{` there are: prose has none, and code has many."""
    return text.count("{")


def lorem_ipsum(text: str) -> float:
    """How often printers' filler occurs."""
    return text.lower().count("lorem ipsum")


# --- the two lists ------------------------------------------------------------------------------------------

GOPHER_QUALITY = (
    Rule("word count", word_count, 50, 100_000),
    Rule("mean word length", mean_word_length, 3, 10),
    Rule("symbols for each word", symbol_ratio, high=0.1),
    Rule("share of bullet lines", bullet_lines, high=0.9),
    Rule("share of lines ending in an ellipsis", ellipsis_lines, high=0.3),
    Rule("share of words with a letter", alphabetic_share, 0.8),
    Rule("number of different stop words", stop_words, 2),
)
"""Gopher's quality rules, for English."""

GOPHER_REPETITION = (
    Rule("share of repeated lines", repeated_lines, high=0.30),
    Rule("share of repeated paragraphs", repeated_paragraphs, high=0.30),
    Rule("characters in repeated lines", partial(repeated_lines, by_characters=True), high=0.20),
    Rule("characters in repeated paragraphs", partial(repeated_paragraphs, by_characters=True), high=0.20),
    *(
        Rule(f"characters in the top {n}-gram", partial(top_ngram, n=n), high=high)
        for n, high in ((2, 0.20), (3, 0.18), (4, 0.16))
    ),
    *(
        Rule(f"characters in repeated {n}-grams", partial(repeated_ngrams, n=n), high=high)
        for n, high in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    ),
)
"""Gopher's repetition rules, table A1."""

C4 = (
    Rule("number of sentences", sentences, 3),
    Rule("curly brackets", curly_brackets, high=0),
    Rule("lorem ipsum", lorem_ipsum, high=0),
)
"""C4's rules for whole pages (its list of bad words is left out). Its rule for lines is `terminal_lines`."""


def terminal_lines(text: str, min_words: int = 5) -> str:
    """C4's rule for lines: keep those of `min_words` words or more that end in a mark of punctuation.

    It removes menus and buttons from web pages; from verse it removes most of the verse.
    """
    ends = re.compile(r"[.!?\"”]\s*$")
    kept = (line for line in text.splitlines() if ends.search(line) and len(line.split()) >= min_words)
    return "\n".join(kept)
