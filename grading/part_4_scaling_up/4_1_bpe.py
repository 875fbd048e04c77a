"""Exercises of lesson 4.1, byte-pair encoding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tutorial_lib.checks.probes import equals, outcome
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

Pair = tuple[int, int]
Ranks = dict[bytes, int]

# ── 4.1.a  What a merge changes ──────────────────────────────────────────────────────────────────────────


def _merged(word: list[int], pair: Pair, new: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        merged.append(new if found else word[i])
        i += 1 + found
    return merged


def _changes(old: list[int], new: list[int], zeros: bool = False) -> dict[Pair, int]:
    changes = Counter(zip(new, new[1:], strict=False))
    changes.subtract(zip(old, old[1:], strict=False))
    return {pair: change for pair, change in changes.items() if change or zeros}


def _merge_word(word: list[int], pair: Pair, new: int) -> Any:
    merged = _merged(word, pair, new)
    return merged, _changes(word, merged)


def only_the_merged_pair_counted(word: list[int], pair: Pair, new: int) -> Any:
    """Only the merged pair's count changed; but its two ids stood beside others as well, and those pairs are
    gone, with new ones in their place."""
    merged = _merged(word, pair, new)
    return merged, {pair: len(merged) - len(word)} if len(merged) < len(word) else {}


def nothing_taken_from_the_neighbors(word: list[int], pair: Pair, new: int) -> Any:
    """The new pairs are counted, but the pairs that the two old ids made with their neighbors are not taken
    away."""
    merged = _merged(word, pair, new)
    after = Counter(zip(merged, merged[1:], strict=False))
    gained = {p: n for p, n in after.items() if new in p}
    return merged, {**gained, **({pair: len(merged) - len(word)} if len(merged) < len(word) else {})}


def overlapping_merges(word: list[int], pair: Pair, new: int) -> Any:
    """In [7, 7, 7] the middle 7 was used twice: after a merge, go on behind both of its ids."""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(new)
            i += 1 if tuple(word[i + 1 : i + 3]) == pair else 2
        else:
            merged.append(word[i])
            i += 1
    return merged, _changes(word, merged)


def only_the_first_place(word: list[int], pair: Pair, new: int) -> Any:
    """The pair may stand in a word several times, and only the first was merged."""
    for i in range(len(word) - 1):
        if (word[i], word[i + 1]) == pair:
            merged = [*word[:i], new, *word[i + 2 :]]
            return merged, _changes(word, merged)
    return list(word), {}


def from_right_to_left(word: list[int], pair: Pair, new: int) -> Any:
    """The merges run from the right, so of [7, 7, 7] the last two were joined; the order is from left to
    right."""
    merged = _merged(word[::-1], pair[::-1], new)[::-1]
    return merged, _changes(word, merged)


def the_neighbors_as_they_were(word: list[int], pair: Pair, new: int) -> Any:
    """Where two merges touch, the neighbor has just become the new id, and you count the id that it was
    before: in [1, 2, 1, 2] the new pair is (9, 9)."""
    changes: Counter[Pair] = Counter()
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) != pair:
            i += 1
            continue
        changes[pair] -= 1
        if i > 0:
            changes[word[i - 1], word[i]] -= 1
            changes[word[i - 1], new] += 1
        if i + 2 < len(word):
            changes[word[i + 1], word[i + 2]] -= 1
            changes[new, word[i + 2]] += 1
        i += 2
    return _merged(word, pair, new), {p: n for p, n in changes.items() if n}


def zeros_kept(word: list[int], pair: Pair, new: int) -> Any:
    """A pair that is lost in one place and won in another has not changed; leave the zeros out."""
    merged = _merged(word, pair, new)
    return merged, _changes(word, merged, zeros=True)


def the_word_changed_in_place(word: list[int], pair: Pair, new: int) -> Any:
    """Your function wrote into the list that it was given; whoever still holds that list finds another word
    in it: make a new one."""
    before = list(word)
    word[:] = _merged(word, pair, new)
    return word, _changes(before, word)


def _plain(result: Any) -> Any:
    """The word and the changes, sorted, with their types' own quirks taken off."""
    word, changes = result
    return list(word), sorted((tuple(pair), change) for pair, change in dict(changes).items())


def _word(word: list[int], pair: Pair = (1, 2), new: int = 9) -> Callable[[Any], Any]:
    return lambda f: outcome(lambda: _plain(f(list(word), pair, new)))


def _many_words(f: Any) -> Any:
    generator = random.Random(0)
    words = [[generator.randrange(4) for _ in range(generator.randrange(14))] for _ in range(60)]
    return [outcome(lambda w=w, p=p: _plain(f(list(w), p, 9))) for w in words for p in ((1, 2), (3, 3))]


def _input_stays(f: Any) -> Any:
    word = [1, 2, 3]
    returned = outcome(lambda: _plain(f(word, (1, 2), 9)))
    other = [2, 1, 3]
    return word, returned, outcome(lambda: f(other, (1, 2), 9)[0] is other)


MERGE = Exercise(
    id="4.1.a",
    symbol="merge_word",
    reference=_merge_word,
    look_again="Counting only what changed",
    probes=[
        Probe("a word and the changes, by hand", _word([1, 2, 3]), equals(), given="[1, 2, 3], (1, 2), 9"),
        Probe("a neighbor on the left", _word([5, 1, 2]), equals(), given="[5, 1, 2], (1, 2), 9"),
        Probe("the pair is not there", _word([2, 1, 3]), equals(), given="[2, 1, 3], (1, 2), 9"),
        Probe("twice in a word", _word([1, 2, 5, 1, 2]), equals(), given="[1, 2, 5, 1, 2], (1, 2), 9"),
        Probe("side by side", _word([1, 2, 1, 2]), equals(), given="[1, 2, 1, 2], (1, 2), 9"),
        Probe("a pair of equals", _word([7, 7, 7], (7, 7)), equals(), given="[7, 7, 7], (7, 7), 9"),
        Probe(
            "`word` stays as it is",
            _input_stays,
            equals(),
            given="word = [1, 2, 3], and [2, 1, 3]; is the list that is returned `word` itself?",
        ),
        Probe("equals the reference", _many_words, equals()),
        Probe(
            "nothing, and one id",
            lambda f: (_word([])(f), _word([1])(f), _word([1, 2])(f)),
            equals(),
            given="[], [1] and [1, 2], with (1, 2) -> 9",
        ),
    ],
    misconceptions=[
        only_the_merged_pair_counted,
        nothing_taken_from_the_neighbors,
        overlapping_merges,
        only_the_first_place,
        from_right_to_left,
        the_neighbors_as_they_were,
        zeros_kept,
        the_word_changed_in_place,
    ],
)

# ── 4.1.b  The encoder that reads from left to right ─────────────────────────────────────────────────────

BYTES: Ranks = {bytes([b]): b for b in range(256)}


def _ranks(*tokens: bytes) -> Ranks:
    return {**BYTES, **{token: 256 + i for i, token in enumerate(tokens)}}


ABC = _ranks(b"bc", b"ab", b"abc")
UNUSUAL: Ranks = {**{bytes([b]): 255 - b for b in range(256)}, b"bc": 256}
# As learned from words of a and b: 256 tokens would do as well, these are enough to make every mistake.
LEARNED = _ranks(b"aa", b"ab", b"ba", b"aab", b"bb", b"aaa", b"abba", b"bba", b"aabaa", b"baab", b"aaaa")


def _candidates(parts: list[bytes], ranks: Ranks) -> Iterator[tuple[int, int]]:
    for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False)):
        if left + right in ranks:
            yield ranks[left + right], i


def _encoder(choose: Callable[[list[tuple[int, int]]], tuple[int, int]]) -> Callable[[bytes, Ranks], Any]:
    def encode(data: bytes, ranks: Ranks) -> Any:
        parts = [data[i : i + 1] for i in range(len(data))]
        while found := list(_candidates(parts, ranks)):
            _, i = choose(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in parts]

    return encode


_by_rank = _encoder(min)
_leftmost = _encoder(lambda found: found[0])
_highest = _encoder(lambda found: max(found, key=lambda one: (one[0], -one[1])))
_rightmost = _encoder(lambda found: min(found, key=lambda one: (one[0], -one[1])))


def the_longest_token_that_fits(data: bytes, ranks: Ranks) -> Any:
    """You take the longest token from the left, as WordPiece does; BPE replays its merges, and gives other
    ids for the same text."""
    ids = []
    while data:
        n = next(n for n in range(len(data), 0, -1) if data[:n] in ranks)
        ids.append(ranks[data[:n]])
        data = data[n:]
    return ids


def the_longest_merge_first(data: bytes, ranks: Ranks) -> Any:
    """Of several candidates you take the longest; length plays no part, the rank decides."""
    parts = [data[i : i + 1] for i in range(len(data))]
    while found := list(_candidates(parts, ranks)):
        _, i = min(found, key=lambda one: (-len(parts[one[1]] + parts[one[1] + 1]), one))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def candidates_listed_once(data: bytes, ranks: Ranks) -> Any:
    """The candidates were listed once, at the beginning; a merge makes a new neighbor, so list them again
    after each."""
    n = len(data)
    used: set[int] = set()
    joined: set[int] = set()
    for _, i in sorted(_candidates([data[i : i + 1] for i in range(n)], ranks)):
        if not {i, i + 1} & used:
            used |= {i, i + 1}
            joined.add(i)
    parts, i = [], 0
    while i < n:
        step = 2 if i in joined else 1
        parts.append(data[i : i + step])
        i += step
    return [ranks[part] for part in parts]


def each_merge_in_one_place_only(data: bytes, ranks: Ranks) -> Any:
    """A merge is done in its first place and then never again; the same pair may stand in a chunk several
    times."""
    parts = [data[i : i + 1] for i in range(len(data))]
    for _, rank in sorted(ranks.items(), key=lambda item: item[1]):
        for found, i in _candidates(parts, ranks):
            if found == rank:
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
                break
    return [ranks[part] for part in parts]


def bytes_only(data: bytes, ranks: Ranks) -> Any:
    """Nothing was merged, these are the ids of the single bytes."""
    return [ranks[data[i : i + 1]] for i in range(len(data))]


def _encoded(data: bytes, ranks: Ranks = ABC) -> Callable[[Any], Any]:
    return lambda f: outcome(lambda: f(data, dict(ranks)))


def _chunks() -> list[bytes]:
    generator = random.Random(1)
    return [bytes(generator.choices(b"aab", k=generator.randrange(1, 16))) for _ in range(80)]


ENCODE = Exercise(
    id="4.1.b",
    symbol="encode_chunk",
    reference=_by_rank,
    look_again="From text to ids: replay the merges",
    probes=[
        Probe("a list of ids", _encoded(b"ad"), equals(), given='b"ad"'),
        Probe("one merge", _encoded(b"abd"), equals(), given='b"abd", with ab = 257'),
        Probe(
            "a long token that the merges do not reach",
            _encoded(b"abcdexyz", _ranks(b"bc", b"cd", b"cde", b"bcde", b"abcde", b"xy", b"yz")),
            equals(),
            given='b"abcdexyz", with bc, cd, cde, bcde, abcde, xy, yz = 256 to 262',
        ),
        Probe(
            "two ways, the lower rank first",
            lambda f: (
                _encoded(b"abc", _ranks(b"bc", b"ab"))(f),
                _encoded(b"cba", _ranks(b"ba", b"cb"))(f),
                _encoded(b"abcd", _ranks(b"ab", b"cd", b"abc"))(f),
            ),
            equals(),
            given='b"abc", with bc = 256, ab = 257; b"cba", with ba = 256, cb = 257; b"abcd", with ab, cd, abc = 256 '
            "to 258",
        ),
        Probe(
            "a merge of a merge",
            _encoded(b"abc"),
            equals(),
            given='b"abc", with bc = 256, ab = 257, abc = 258',
        ),
        Probe("twice in a chunk", _encoded(b"abdab"), equals(), given='b"abdab", with ab = 257'),
        Probe(
            "three equal letters", _encoded(b"aaa", _ranks(b"aa")), equals(), given='b"aaa", with aa = 256'
        ),
        Probe(
            "a long token of a high rank",
            _encoded(b"abcde", _ranks(b"ab", b"bc", b"cd", b"de", b"cde")),
            equals(),
            given='b"abcde", with ab = 256, bc = 257, cd = 258, de = 259, cde = 260',
        ),
        Probe(
            "equals the reference",
            lambda f: [_encoded(chunk, LEARNED)(f) for chunk in _chunks()],
            equals(),
        ),
        Probe(
            "nothing, and bytes that are no text",
            lambda f: (_encoded(b"")(f), _encoded(bytes([255, 0, 128]))(f)),
            equals(),
            given='b"" and b"\\xff\\x00\\x80"',
        ),
        Probe(
            "bytes whose rank is another number",
            _encoded(b"abcd", UNUSUAL),
            equals(),
            given='b"abcd", where byte b has the rank 255 - b, as GPT-2 has them in an order of its own; bc = 256',
        ),
    ],
    misconceptions=[
        Misconception(
            "leftmost first",
            _leftmost,
            "The first two neighbors that make a token are joined, whatever its rank; training joined the ones "
            "of lowest rank first.",
        ),
        Misconception(
            "highest rank first",
            _highest,
            "A rank is the place in the order of learning: the lowest was learned first and comes first.",
        ),
        the_longest_token_that_fits,
        the_longest_merge_first,
        candidates_listed_once,
        each_merge_in_one_place_only,
        Misconception(
            "the rightmost of equals",
            _rightmost,
            "Of several places with the same rank you take the last: training merged from left to right, so of "
            "aaa the first two a's are joined.",
        ),
        bytes_only,
    ],
)

# ── 4.1.c  BPE-dropout ───────────────────────────────────────────────────────────────────────────────────


class _Scripted(random.Random):
    """Gives the numbers it was told to give, then 0.5 for ever; counts the draws."""

    def __new__(cls, *numbers: float) -> _Scripted:
        return super().__new__(cls)

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self.numbers = [*numbers]
        self.drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return self.numbers.pop(0) if self.numbers else 0.5


def _dropout(keeps: Callable[[float, float], bool]) -> Callable[..., Any]:
    def encode(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
        parts = [data[i : i + 1] for i in range(len(data))]
        while found := [one for one in _candidates(parts, ranks) if keeps(rng.random(), p)]:
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in parts]

    return encode


_with_dropout = _dropout(lambda drawn, p: drawn >= p)
_keeps_with_p = _dropout(lambda drawn, p: drawn < p)


def no_dropout(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """p changes nothing, these are the usual ids."""
    return _by_rank(data, ranks)


def only_the_best_candidate_is_drawn_for(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """You draw for the best candidate and stop when it is dropped; the others should have had their turn."""
    parts = [data[i : i + 1] for i in range(len(data))]
    while found := list(_candidates(parts, ranks)):
        if rng.random() < p:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def dropped_once_dropped_for_ever(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """A merge that was dropped at one step is never tried again; the paper draws anew at every step."""
    parts = [data[i : i + 1] for i in range(len(data))]
    dropped: set[int] = set()
    while True:
        found = []
        for rank, i in _candidates(parts, ranks):
            if rank in dropped:
                continue
            if rng.random() < p:
                dropped.add(rank)
            else:
                found.append((rank, i))
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def all_or_nothing(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """One draw decides for the whole chunk; each candidate has a draw of its own."""
    return bytes_only(data, ranks) if rng.random() < p else _by_rank(data, ranks)


def tokens_broken_up_afterwards(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """The chunk was encoded as usual and some tokens broken into bytes; dropping merges on the way gives the
    tokens between, such as un and kind, too."""
    ids = []
    token_of = {i: token for token, i in ranks.items()}
    for i in _by_rank(data, ranks):
        ids += [*token_of[i]] if rng.random() < p else [i]
    return ids


def tokens_dropped_instead_of_merges(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """Whole tokens vanished, and with them the text: it is a merge that is dropped, and its two parts
    stay."""
    return [i for i in _by_rank(data, ranks) if rng.random() >= p]


def the_leftmost_of_what_is_left(data: bytes, ranks: Ranks, p: float, rng: random.Random) -> Any:
    """Of the candidates that are left you take the first; the rank still decides."""
    parts = [data[i : i + 1] for i in range(len(data))]
    while found := [one for one in _candidates(parts, ranks) if rng.random() >= p]:
        _, i = found[0]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def _dropped(data: bytes, p: float, *numbers: float, ranks: Ranks = ABC) -> Callable[[Any], Any]:
    return lambda f: outcome(lambda: f(data, dict(ranks), p, _Scripted(*numbers)))


def _draws(f: Any) -> Any:
    rng = _Scripted(0.9, 0.1, 0.1)
    return outcome(lambda: f(b"abcd", dict(ABC), 0.5, rng)), rng.drawn


def _joined(f: Any) -> Any:
    """The bytes of what comes back, for many chunks: nothing may be lost."""
    token_of = {i: token for token, i in LEARNED.items()}
    rng = random.Random(2)
    return [
        outcome(lambda c=chunk: b"".join(token_of[i] for i in f(c, dict(LEARNED), 0.3, rng)).hex())
        for chunk in _chunks()
    ]


DROPOUT = Exercise(
    id="4.1.c",
    symbol="encode_with_dropout",
    reference=_with_dropout,
    look_again="From text to ids: replay the merges",
    probes=[
        Probe(
            "p = 0: the usual ids",
            _dropped(b"abcd", 0.0),
            equals(),
            given='b"abcd", p = 0, bc = 256, ab = 257, abc = 258',
        ),
        Probe("p = 1: single bytes", _dropped(b"abcd", 1.0), equals(), given='b"abcd", p = 1'),
        Probe("no byte is lost", _joined, equals()),
        Probe(
            "one candidate dropped",
            lambda f: (_dropped(b"abcd", 0.5, 0.9, 0.1)(f), _dropped(b"abcd", 0.5, 0.1, 0.9)(f)),
            equals(),
            given='b"abcd", p = 0.5; drawn: 0.9 for ab, 0.1 for bc, or the other way round; then 0.5 for all',
        ),
        Probe(
            "dropped now, merged later",
            _dropped(b"bcab", 0.5, 0.1, 0.9, 0.9),
            equals(),
            given='b"bcab", p = 0.5; drawn: 0.1 for bc, 0.9 for ab, then 0.9 for bc',
        ),
        Probe(
            "one draw for each candidate",
            _draws,
            equals(),
            given="the ids, and how often rng.random() was called",
        ),
        Probe(
            "a number equal to p is kept",
            _dropped(b"ab", 0.5, 0.5),
            equals(),
            given='b"ab", p = 0.5; drawn: 0.5',
        ),
        Probe(
            "equals the reference",
            lambda f: [
                outcome(lambda c=c, p=p: f(c, dict(LEARNED), p, random.Random(7)))
                for c in _chunks()
                for p in (0.1, 0.5)
            ],
            equals(),
        ),
        Probe(
            "nothing, and bytes whose rank is another number",
            lambda f: (_dropped(b"", 0.5)(f), _dropped(b"abcd", 0.5, ranks=UNUSUAL)(f)),
            equals(),
            given='b""; b"abcd", where byte b has the rank 255 - b, and bc = 256',
        ),
    ],
    misconceptions=[
        Misconception(
            "kept with probability p",
            _keeps_with_p,
            "You keep a candidate where you should drop it: p = 0.1 should drop one in ten, not nine.",
        ),
        no_dropout,
        only_the_best_candidate_is_drawn_for,
        dropped_once_dropped_for_ever,
        all_or_nothing,
        tokens_broken_up_afterwards,
        tokens_dropped_instead_of_merges,
        the_leftmost_of_what_is_left,
    ],
)

EXERCISES = [MERGE, ENCODE, DROPOUT]
