"""Clean-up: what goes and what stays, why, in which order."""

from __future__ import annotations

import builtins
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutorial_lib.data.clean import (
    DEFAULT_STEPS,
    ExactDuplicates,
    NearDuplicates,
    QualityFilter,
    ScrubPII,
    clean,
    normalize,
    shingles,
)
from tutorial_lib.data.pii import KINDS, scrub
from tutorial_lib.data.quality import (
    C4,
    GOPHER_QUALITY,
    GOPHER_REPETITION,
    first_broken,
    repeated_ngrams,
    terminal_lines,
    top_ngram,
)
from tutorial_lib.data.tar_shards import write_tar_shards
from tutorial_lib.data.tar_stream import stream_batches
from tutorial_lib.data.tokenize import ByteTokenizer

WORDS = (
    "sun moon star wind rain stone river tree leaf bird fish king queen sword crown night day fire".split()
)


def prose(seed: int, n: int = 120) -> str:
    rng = random.Random(seed)
    glue = ["the", "of", "and", "to", "that", "with"]
    words = [
        rng.choice(glue) if i % 3 == 0 else f"{rng.choice(WORDS)}{rng.randrange(900)}x" for i in range(n)
    ]
    return " ".join(words) + "."


def run(documents, *steps):
    kept, report = clean(documents, steps or None)
    return list(kept), report


# --- the pipeline -------------------------------------------------------------------------------------------


def test_it_streams_and_the_report_adds_up():
    read = []

    def documents():
        for i in range(6):
            read.append(i)
            yield prose(i % 4)

    kept, report = clean(documents())
    assert read == [] and next(kept) == prose(0) and read == [0]
    assert list(kept) == [prose(1), prose(2), prose(3)]
    assert (report.seen, report.kept) == (6, 4) and report.removed_by() == {4, 5}
    assert report.removed_by("exact duplicate") == {4, 5} and report.removed_by("quality") == set()
    assert "6  documents read" in str(report) and "-2  exact duplicate" in str(report)


def test_steps_forget_between_runs_and_inputs_stay():
    documents = [prose(0), prose(0)]
    for _ in range(2):
        kept, report = run(documents, *DEFAULT_STEPS)
        assert len(kept) == 1 and documents == [prose(0), prose(0)]


def test_no_steps_and_no_documents():
    assert run(["a", "a"], lambda stream, report: stream)[0] == ["a", "a"]
    kept, report = clean(["a", "a"], [])
    assert list(kept) == ["a", "a"] and report.removed == []
    assert run([])[0] == []


# --- duplicates ---------------------------------------------------------------------------------------------


def test_exact_is_after_normalizing():
    texts = ["To be,  or\nnot", "to be, or not", "To be or not", "ﬁnd", "find", ""]
    kept, report = run(texts, ExactDuplicates())
    assert kept == ["To be,  or\nnot", "To be or not", "ﬁnd", ""]
    assert [r.reason for r in report.removed] == ["the same as document 0", "the same as document 3"]


@given(st.text(max_size=60))
def test_normalizing_twice_is_once_and_shingles_never_fail(text):
    assert normalize(normalize(text)) == normalize(text) or normalize(text).isascii() is False
    assert len(shingles(text)) >= 1


def test_shingles_by_hand():
    assert shingles("A b c  D", 3) == {"a b c", "b c d"} and shingles("a b", 3) == {"a b"}


def edited(text: str, share: float, seed: int) -> str:
    rng = random.Random(seed)
    words = text.split()
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def test_near_copies_go_and_strangers_stay():
    texts = [prose(i, 400) for i in range(30)]
    copies = [edited(text, 0.005, i) for i, text in enumerate(texts)]  # true Jaccard about 0.95
    strangers = [edited(text, 0.25, i) for i, text in enumerate(texts)]  # about 0.13
    kept, report = run(texts + copies + strangers, NearDuplicates())
    assert kept == texts + strangers and report.removed_by() == set(range(30, 60))
    assert all(f"document {r.index - 30}" in r.reason for r in report.removed)


def test_near_is_deterministic_and_the_threshold_counts():
    texts = [prose(0, 400), edited(prose(0, 400), 0.05, 1)]
    jaccard = len(shingles(texts[0]) & shingles(texts[1])) / len(shingles(texts[0]) | shingles(texts[1]))
    assert 0.5 < jaccard < 0.75
    for _ in range(2):
        assert len(run(texts, NearDuplicates(threshold=0.35))[0]) == 1
        assert len(run(texts, NearDuplicates(threshold=0.95))[0]) == 2


def test_short_and_empty_texts_are_no_copies_of_each_other():
    texts = ["yes", "no", "", "yes, my lord"]
    assert run(texts, NearDuplicates())[0] == texts


# --- quality ------------------------------------------------------------------------------------------------

GOOD = prose(3)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("too short", "word count"),
        ("a b c d e f g h i j " * 10, "mean word length"),
        ("x" * 30 + " " + "y" * 30 + " " + "abcdefghijklmnop " * 60, "mean word length"),
        (GOOD + " #" * 20, "symbols for each word"),
        (GOOD + " 1234" * 60, "share of words with a letter"),
        ("leaf bird fish crown " * 20, "number of different stop words"),
        ("\n".join(f"- {line}" for line in [GOOD] * 3), "share of bullet lines"),
        ("\n".join(f"{prose(i, 20)} ..." for i in range(6)), "share of lines ending in an ellipsis"),
    ],
)
def test_each_quality_rule_has_its_victim(text, rule):
    kept, report = run([GOOD, text], QualityFilter(GOPHER_QUALITY))
    assert kept == [GOOD] and report.removed[0].rule == rule, str(report)
    assert rule in report.removed[0].reason


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("\n".join([GOOD, "ho"] + ["hey"] * 9), "share of repeated lines"),
        ("\n\n".join([prose(1) + "\n" + prose(2)] + ["hey\nho"] * 4), "share of repeated lines"),
        ("\n".join([prose(i, 10) for i in range(3)] + [prose(8, 60)] * 2), "characters in repeated lines"),
        (GOOD + " never" * 300, "characters in the top 2-gram"),
    ],
)
def test_each_repetition_rule_catches_its_case(text, rule):
    assert first_broken(GOOD, GOPHER_REPETITION) is None
    assert first_broken(text, GOPHER_REPETITION)[0].name == rule


def test_ngrams_by_hand():
    assert top_ngram("ab cd ab cd ab", 2) == pytest.approx(8 / 10)  # "ab cd" twice, 4 characters
    assert top_ngram("ab cd ef", 2) == 0 == repeated_ngrams("ab cd ef", 2)
    assert repeated_ngrams("a b c x a b c", 3) == pytest.approx(3 / 7)
    assert repeated_ngrams("a b a b a b", 2) == pytest.approx(4 / 6), "overlaps count once"
    assert top_ngram("", 2) == repeated_ngrams("", 5) == 0


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_repeated_ngrams_equal_a_slow_reference(words, n):
    covered, seen = set(), set()
    for i in range(len(words) - n + 1):
        if (run := tuple(words[i : i + n])) in seen:
            covered |= set(range(i, i + n))
        seen.add(run)
    assert repeated_ngrams(" ".join(words), n) == pytest.approx(len(covered) / max(1, len(words)))


def test_pages_without_prose_break_the_rules_of_c4():
    good = "One is here. Two is there. Three!"
    assert first_broken(good, C4) is None
    for bad in ("One. Two.", good + " if (x) { y; }", good + " Lorem ipsum dolor."):
        assert first_broken(bad, C4) is not None
    assert terminal_lines("Home\nThis line is long enough.\nThis line has no end\nShort.") == (
        "This line is long enough."
    )


@given(st.text(max_size=200))
def test_rules_take_any_text(text):
    first_broken(text, GOPHER_QUALITY + GOPHER_REPETITION + C4)
    for rule in GOPHER_REPETITION:
        assert 0 <= rule.measure(text) <= 1


# --- personal data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("ann.lee+x@mail.example.org,", "<EMAIL>,"),
        ("me@localhost", "me@localhost"),
        ("Visa 4111 1111 1111 1111.", "Visa <CARD>."),
        ("4111-1111-1111-1111", "<CARD>"),
        ("378282246310005", "<CARD>"),
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),
        ("0000 0000 0000 0000", "0000 0000 0000 0000"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("DE89 3704 0044 0532 0130 00 IS MINE", "<IBAN> IS MINE"),
        ("GB82WEST12345698765432", "<IBAN>"),
        ("GB83WEST12345698765432", "GB83WEST12345698765432"),
        ("8.8.8.8 and 2606:4700:4700::1111", "<IP> and <IP>"),
        ("127.0.0.1, 192.168.0.7, 999.1.1.1, ::1", "127.0.0.1, 192.168.0.7, 999.1.1.1, ::1"),
        ("at 12:30:45, std::vector, ACT I:: SCENE 2", "at 12:30:45, std::vector, ACT I:: SCENE 2"),
        ("+44 20 7946 0958", "<PHONE>"),
        ("call (650) 253-0000", "call <PHONE>"),
        ("1593-1594, ISBN 0-306-40615-2, 1,234,567", "1593-1594, ISBN 0-306-40615-2, 1,234,567"),
        ("2024-01-05 10:22", "2024-01-05 10:22"),
    ],
)
def test_personal_data_is_replaced_and_what_only_looks_like_it_stays(text, scrubbed):
    got, counts = scrub(text)
    assert got == scrubbed and sum(counts.values()) == scrubbed.count("<")
    assert scrub(scrubbed) == (scrubbed, {}), "what is scrubbed stays as it is"


def test_kinds_and_region_say_what_is_scrubbed():
    assert (
        scrub("020 7946 0958", region="GB")[0] == "<PHONE>" and scrub("020 7946 0958")[0] == "020 7946 0958"
    )
    assert scrub("a@b.org 8.8.8.8", ("IP",)) == ("a@b.org <IP>", {"IP": 1})
    with pytest.raises(ValueError, match="unknown kind of personal data 'FAX'.*EMAIL"):
        scrub("x", ("FAX",))
    kept, report = run(["write a@b.org", "to be"], ScrubPII())
    assert kept == ["write <EMAIL>", "to be"] and report.replaced == {"EMAIL": 1} and not report.removed


@pytest.mark.parametrize(
    "junk", ["a" * 50_000, ":" * 50_000, "1 " * 30_000, "AB12" * 20_000, "a.-+" * 20_000 + "@"]
)
def test_junk_is_no_personal_data_and_catches_no_pattern(junk):
    """A pattern that tries every split of the junk is at it until the suite's time limit."""
    assert scrub(junk, ("EMAIL", "IBAN", "CARD", "IP")) == (junk, {})


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("datasketch", lambda folder: run(["a"], NearDuplicates())),
        ("phonenumbers", lambda folder: scrub("x", ("PHONE",))),
        ("stdnum", lambda folder: scrub("x", ("IBAN",))),
        ("stdnum", lambda folder: scrub("x", ("CARD",))),
        ("webdataset", lambda folder: write_tar_shards(["a"], folder)),
        ("webdataset", lambda folder: stream_batches("x.tar", ByteTokenizer(["<|eos|>"]), 1, 1)),
    ],
)
def test_a_missing_package_is_one_sentence(package, call, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"{package}: pip install (python-)?{package}$"):
        call(tmp_path)


def test_every_kind_has_a_finder():
    assert list(KINDS) == ["EMAIL", "IBAN", "CARD", "IP", "PHONE"]
