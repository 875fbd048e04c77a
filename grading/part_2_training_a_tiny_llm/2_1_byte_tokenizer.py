"""Exercises of lesson 2.1, the byte tokenizer."""

from __future__ import annotations

import codecs
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from tutorial_lib.checks.probes import equals, outcome
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.data.tokenize import ByteTokenizer

ONE_OF_EACH = "aé€\N{SLIGHTLY SMILING FACE}"  # characters of one, two, three and four bytes


def _texts() -> list[str]:
    """Strings of random code points, from every script; the same ones each time."""
    generator = random.Random(1)
    limits = (0x80, 0x800, 0xD800, 0x110000)
    texts = [
        "".join(chr(generator.randrange(generator.choice(limits))) for _ in range(12)) for _ in range(20)
    ]
    return ["".join(c for c in text if not 0xD800 <= ord(c) < 0xE000) for text in texts]


def _noise(n: int) -> list[int]:
    generator = random.Random(2)
    return [generator.choice((97, 195, 169, 226, 128, 148, 240, 159, 255)) for _ in range(n)]


# ── 2.1.a  There and back ────────────────────────────────────────────────────────────────────────────────


class _Codec:
    def encode(self, text: str) -> Any:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class CodePointsInsteadOfBytes(_Codec):
    """These are code points, from ord(); they run to 1,114,111, while UTF-8 writes each as one to four bytes
    from 0 to 255."""

    def encode(self, text: str) -> Any:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


class ABytesObject(_Codec):
    """The numbers are right, but encode returned a bytes object; the model's code wants a list of
    integers."""

    def encode(self, text: str) -> Any:
        return text.encode("utf-8")


class Latin1_instead_of_UTF8(_Codec):
    """Latin-1 has one byte for each of 256 characters and a question mark for the rest of the world; UTF-8
    can write them all."""

    def encode(self, text: str) -> Any:
        return list(text.encode("latin-1", errors="replace"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


class EachByteTakenForACharacter(_Codec):
    """decode made one character of each byte with chr(), so é became Ã©; the bytes of a character belong
    together."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


class DecodedTokenByToken(_Codec):
    """decode looked at each byte alone, and a part of a character is not valid by itself: put all ids into
    one bytes object first."""

    def decode(self, ids: list[int]) -> str:
        return "".join(bytes([i]).decode("utf-8", errors="replace") for i in ids)


class StrictAboutErrors(_Codec):
    """One bad byte raises UnicodeDecodeError, which would end a whole generation; replace it with U+FFFD."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8")


class ErrorsIgnored(_Codec):
    """Bad bytes vanish without a trace, so nobody sees that something was there; replace them with U+FFFD."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="ignore")


CODEC = Exercise(
    id="2.1.a",
    symbol="ByteCodec",
    reference=_Codec,
    look_again="There and back",
    probes=[
        Probe("a list comes back", lambda cls: type(cls().encode("né")).__name__, equals(), given='"né"'),
        Probe("encode, by hand", lambda cls: cls().encode("né"), equals(), given='"né"'),
        Probe(
            "characters of 1 to 4 bytes", lambda cls: cls().encode(ONE_OF_EACH), equals(), given=ONE_OF_EACH
        ),
        Probe(
            "decode, by hand", lambda cls: cls().decode([110, 195, 169]), equals(), given="[110, 195, 169]"
        ),
        Probe(
            "there and back",
            lambda cls: [outcome(lambda text=text: cls().decode(cls().encode(text))) for text in _texts()],
            equals(),
        ),
        Probe(
            "a character cut in half",
            lambda cls: outcome(lambda: cls().decode([110, 195])),
            equals(),
            given="[110, 195]",
        ),
        Probe("bytes that are not UTF-8", lambda cls: outcome(lambda: cls().decode(_noise(200))), equals()),
        Probe(
            "nothing, and an id too large",
            lambda cls: (cls().encode(""), cls().decode([]), outcome(lambda: cls().decode([256]))),
            equals(),
            given='encode(""), decode([]), decode([256])',
        ),
    ],
    misconceptions=[
        CodePointsInsteadOfBytes,
        ABytesObject,
        Latin1_instead_of_UTF8,
        EachByteTakenForACharacter,
        DecodedTokenByToken,
        StrictAboutErrors,
        ErrorsIgnored,
    ],
)


# ── 2.1.b  The chat that hangs ───────────────────────────────────────────────────────────────────────────

Stream = Callable[[Iterable[int]], Iterator[str]]


def as_it_was_given(ids: Iterable[int]) -> Iterator[str]:
    """The buffer waits for bytes that will make it valid, and whatever is in it at the end is lost."""
    buffer = b""
    for i in ids:
        buffer += bytes([i])
        try:
            text = buffer.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield text
        buffer = b""


def waits_for_ever_after_a_bad_byte(ids: Iterable[int]) -> Iterator[str]:
    """The end is shown now, but after a bad byte the buffer can never become valid, so everything that
    follows waits until the end."""
    buffer = b""
    for i in ids:
        buffer += bytes([i])
        try:
            text = buffer.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield text
        buffer = b""
    if buffer:
        yield buffer.decode("utf-8", errors="replace")


def waits_for_four_bytes(ids: Iterable[int]) -> Iterator[str]:
    """A character has at most four bytes, but a byte that cannot begin one is wrong at once: up to three good
    characters after it are shown late, and damage spreads to what follows."""
    buffer = b""
    for i in ids:
        buffer += bytes([i])
        try:
            text = buffer.decode("utf-8")
        except UnicodeDecodeError:
            if len(buffer) < 4:
                continue
            text = buffer.decode("utf-8", errors="replace")
        yield text
        buffer = b""
    if buffer:
        yield buffer.decode("utf-8", errors="replace")


def token_by_token(ids: Iterable[int]) -> Iterator[str]:
    """Each byte is decoded alone, so every character of more than one byte becomes several �: hold the bytes
    back until the character is complete."""
    for i in ids:
        yield bytes([i]).decode("utf-8", errors="replace")


def everything_at_the_end(ids: Iterable[int]) -> Iterator[str]:
    """The text is right, but it comes in one piece when all ids are there: that is no stream."""
    if text := bytes(ids).decode("utf-8", errors="replace"):
        yield text


def _incremental(errors: str, flush: bool, empties: bool) -> Stream:
    def stream(ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
        for i in ids:
            piece = decoder.decode(bytes([i]))
            if piece or empties:
                yield piece
        tail = decoder.decode(b"", final=True) if flush else ""
        if tail or empties:
            yield tail

    return stream


def _pieces(ids: list[int]) -> Callable[[Stream], Any]:
    return lambda stream: outcome(lambda: list(stream(iter(ids))))


def _joined(ids: list[int]) -> Callable[[Stream], Any]:
    return lambda stream: outcome(lambda: "".join(stream(iter(ids))))


def _on_screen(ids: list[int]) -> Callable[[Stream], Any]:
    """What a reader sees after each id, and at the end."""

    def run(stream: Stream) -> Any:
        screen = [""] * (len(ids) + 1)
        taken = 0

        def feed() -> Iterator[int]:
            nonlocal taken
            for k, i in enumerate(ids):
                taken = k
                yield i
            taken = len(ids)

        def read() -> list[str]:
            for piece in stream(feed()):
                for k in range(taken, len(screen)):
                    screen[k] += piece
            return screen

        return outcome(read)

    return run


STREAM = Exercise(
    id="2.1.b",
    symbol="stream_decode",
    reference=_incremental("replace", flush=True, empties=False),
    look_again="Streaming: hold back the unfinished",
    probes=[
        Probe("pieces, by hand", _pieces([110, 195, 169]), equals(), given="[110, 195, 169]"),
        Probe(
            "characters of 1 to 4 bytes",
            _pieces(list(ONE_OF_EACH.encode())),
            equals(),
            given=str(list(ONE_OF_EACH.encode())),
        ),
        Probe("each as soon as it is complete", _on_screen(list("né — x".encode())), equals()),
        Probe("an unfinished end", _joined([110, 226, 128]), equals(), given="[110, 226, 128]"),
        Probe("a byte that never fits", _joined([110, 255, 105]), equals(), given="[110, 255, 105]"),
        Probe(
            "the text goes on after it",
            _on_screen([110, 255, 105, 106, 107, 108]),
            equals(),
            given="[110, 255, 105, …]: on the screen after each id",
        ),
        Probe(
            "a character broken off by another",
            _joined([226, 128, 226, 128, 148, 240, 159, 97]),
            equals(),
            given="[226, 128, 226, 128, 148, 240, 159, 97]",
        ),
        Probe("joins to what decode gives", _joined(_noise(300)), equals()),
        Probe("nothing", _pieces([]), equals(), given="[]"),
    ],
    misconceptions=[
        as_it_was_given,
        waits_for_ever_after_a_bad_byte,
        waits_for_four_bytes,
        token_by_token,
        everything_at_the_end,
        Misconception(
            "empty pieces",
            _incremental("replace", flush=True, empties=True),
            "An unfinished character yields an empty string; yield a piece only when there is something to show.",
        ),
        Misconception(
            "the end is lost",
            _incremental("replace", flush=False, empties=False),
            "When the ids end inside a character, its bytes stay in the decoder: call it once more with "
            "final=True after the loop.",
        ),
        Misconception(
            "strict about errors",
            _incremental("strict", flush=True, empties=False),
            "One bad byte raises UnicodeDecodeError and ends the stream; a model may write any byte, so replace "
            "it with U+FFFD.",
        ),
    ],
)


# ── 2.1.c  Which specials are allowed here? ──────────────────────────────────────────────────────────────

SPECIALS = {"<|eos|>": 256, "<|user|>": 257}


def _walk(text: str, pattern: str, known: Mapping[str, int]) -> list[int]:
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        ids += [known[piece]] if piece in known else piece.encode("utf-8")
    return ids


def _escaped(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _longest_first(specials: Mapping[str, int]) -> list[str]:
    return sorted(specials, key=len, reverse=True)


def _refuse(text: str, pattern: str, specials: Mapping[str, int], allowed: Collection[str]) -> None:
    for found in re.findall(pattern, text):
        if found in specials and found not in allowed:
            raise ValueError(found)


def _reference(text: str, specials: Mapping[str, int], allowed: Collection[str] = ()) -> list[int]:
    pattern = _escaped(_longest_first(specials))
    _refuse(text, pattern, specials, allowed)
    return _walk(text, pattern, specials)


def everything_is_allowed(text: str, specials: Mapping[str, int], allowed: Collection[str] = ()) -> list[int]:
    """A special became its id although it is not in `allowed`: anyone who can type can write control
    tokens."""
    return _walk(text, _escaped(_longest_first(specials)), specials)


def passed_on_as_text(text: str, specials: Mapping[str, int], allowed: Collection[str] = ()) -> list[int]:
    """A special that is not allowed became plain bytes; that is safe, but the caller wanted to know: raise a
    ValueError."""
    known = {name: i for name, i in specials.items() if name in allowed}
    return _walk(text, _escaped(_longest_first(known)), known)


def specials_are_never_found(
    text: str, specials: Mapping[str, int], allowed: Collection[str] = ()
) -> list[int]:
    """Every name became bytes; split the text at the names first, and encode only what lies between."""
    return ByteTokenizer().encode(text)


def the_pattern_is_not_escaped(
    text: str, specials: Mapping[str, int], allowed: Collection[str] = ()
) -> list[int]:
    """In a regular expression `|` means 'or' and `.` means 'anything', so the pattern does not look for your
    names: use re.escape."""
    pattern = "|".join(_longest_first(specials))
    _refuse(text, pattern, specials, allowed)
    return _walk(text, pattern, specials)


def names_tried_in_the_order_given(
    text: str, specials: Mapping[str, int], allowed: Collection[str] = ()
) -> list[int]:
    """A short name that is the beginning of a longer one took its place; try the longest names first."""
    pattern = _escaped(specials)
    _refuse(text, pattern, specials, allowed)
    return _walk(text, pattern, specials)


def one_name_after_the_other(
    text: str, specials: Mapping[str, int], allowed: Collection[str] = ()
) -> list[int]:
    """You search the whole text for one name, then for the next, so a longer name wins over one that begins
    earlier; search for all of them at once."""
    parts: list[str | int] = [text]
    for name in _longest_first(specials):
        new: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                new.append(part)
                continue
            if name in part and name not in allowed:
                raise ValueError(name)
            for n, rest in enumerate(part.split(name)):
                new += [specials[name], rest] if n else [rest]
        parts = new
    return [i for part in parts for i in ([part] if isinstance(part, int) else part.encode("utf-8"))]


def only_the_first_one(text: str, specials: Mapping[str, int], allowed: Collection[str] = ()) -> list[int]:
    """The first special became an id, and the ones after it stayed text: the search must go on."""
    pattern = _escaped(_longest_first(specials))
    _refuse(text, pattern, specials, allowed)
    before, *rest = re.split(f"({pattern})", text, maxsplit=1)
    if not rest:
        return list(text.encode("utf-8"))
    return [*before.encode("utf-8"), specials[rest[0]], *rest[1].encode("utf-8")]


def ids_counted_anew(text: str, specials: Mapping[str, int], allowed: Collection[str] = ()) -> list[int]:
    """You number the specials from 256 in their order; take each one's id from the dictionary."""
    return _reference(text, {name: 256 + n for n, name in enumerate(specials)}, allowed)


def _encoded(
    text: str, specials: Mapping[str, int], allowed: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    return lambda f: outcome(lambda: f(text, dict(specials), set(allowed)))


def _random_mixtures(f: Callable[..., Any]) -> Any:
    generator = random.Random(3)
    specials = {"<|a|>": 300, "<|a|><|b|>": 301, "<|b|>": 299, "()": 500}
    parts = [*specials, "x", "é ", "<|", "|>", "("]
    texts = ["".join(generator.choice(parts) for _ in range(12)) for _ in range(30)]
    return [outcome(lambda text=text: f(text, dict(specials), set(specials))) for text in texts]


SPECIAL = Exercise(
    id="2.1.c",
    symbol="encode_with_specials",
    reference=_reference,
    look_again="Special tokens, and who may write them",
    probes=[
        Probe(
            "plain text is bytes",
            lambda f: outcome(lambda: f("né <|", dict(SPECIALS))),
            equals(),
            given='"né <|", nothing allowed',
        ),
        Probe(
            "a name that looks like a pattern",
            _encoded("abc a.c", {"a.c": 256}, {"a.c"}),
            equals(),
            given='"abc a.c", where "a.c" is a special',
        ),
        Probe(
            "an allowed special",
            _encoded("a<|eos|>b", SPECIALS, {"<|eos|>"}),
            equals(),
            given='"a<|eos|>b", <|eos|> allowed',
        ),
        Probe(
            "many of them",
            _encoded("<|eos|>é<|user|><|eos|>", SPECIALS, SPECIALS),
            equals(),
            given='"<|eos|>é<|user|><|eos|>", both allowed',
        ),
        Probe(
            "ids as they are given",
            _encoded("<|user|>a", {"<|user|>": 900, "<|eos|>": 800}, {"<|user|>"}),
            equals(),
            given='"<|user|>a", where <|user|> is 900',
        ),
        Probe(
            "a special that is not allowed",
            _encoded("a<|eos|>b", SPECIALS),
            equals(),
            given='"a<|eos|>b", nothing allowed',
        ),
        Probe(
            "one allowed, the other not",
            _encoded("<|eos|><|user|>", SPECIALS, {"<|eos|>"}),
            equals(),
            given='"<|eos|><|user|>", only <|eos|> allowed',
        ),
        Probe(
            "the longer of two names",
            _encoded("<|a|>!x<|a|>", {"<|a|>": 256, "<|a|>!": 257}, {"<|a|>", "<|a|>!"}),
            equals(),
            given='"<|a|>!x<|a|>", with "<|a|>" = 256 and "<|a|>!" = 257',
        ),
        Probe(
            "a shorter name inside an allowed one",
            _encoded("<|a|>!", {"<|a|>": 256, "<|a|>!": 257}, {"<|a|>!"}),
            equals(),
            given='"<|a|>!", with "<|a|>" = 256 and "<|a|>!" = 257, only <|a|>! allowed',
        ),
        Probe(
            "from left to right",
            _encoded("abcd", {"ab": 256, "bcd": 257}, {"ab", "bcd"}),
            equals(),
            given='"abcd", with "ab" = 256 and "bcd" = 257',
        ),
        Probe("equals the reference", _random_mixtures, equals()),
        Probe(
            "no text, no specials",
            lambda f: (outcome(lambda: f("", SPECIALS, ())), outcome(lambda: f("é€", {}))),
            equals(),
            given='"" with specials, and "é€" without',
        ),
    ],
    misconceptions=[
        everything_is_allowed,
        passed_on_as_text,
        specials_are_never_found,
        the_pattern_is_not_escaped,
        names_tried_in_the_order_given,
        one_name_after_the_other,
        only_the_first_one,
        ids_counted_anew,
    ],
)

EXERCISES = [CODEC, STREAM, SPECIAL]
