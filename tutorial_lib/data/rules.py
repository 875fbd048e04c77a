"""What a stranger's `tokenizer.json` may ask for. It is looked at before the library that does all it is told.

Hugging Face's library allocates a row for every id up to the largest, grows a text as often as a normalizer says,
and gives up on a regular expression with a panic: what no sentence can be made of must not reach it.

Not defended against: a pattern that is slow only on texts of a certain kind. It takes its time, and where the library
gives up on it, `encode` says so.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["check_pattern", "check_rules", "check_speed"]

LONGEST_NAME = 256
"""Characters of an added token, or of what is put before and after words."""

LONGEST_NAMES = 1 << 18
"""Characters of all added tokens. Gemma's 6,000 have 75,000."""

LONGEST_RULES = 1 << 16
"""Characters of all that is neither vocabulary nor merges. Llama 3 has 3,000."""

MOST_GROWTH = 1 << 10
"""How many characters may be made of one, at the very worst."""

GROWTH = {
    **dict.fromkeys(["NFKC", "NFKD", "BertNormalizer"], 18),  # ﷺ
    **dict.fromkeys(["NFC", "NFD", "Lowercase", "ByteLevel"], 4),
    **dict.fromkeys(["Metaspace"], 2),
    **dict.fromkeys(["Nmt", "Strip", "StripAccents"], 1),
    **dict.fromkeys(["BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation"], 1),
    **dict.fromkeys(["Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"], 1),
}
"""The steps that are known, and how many characters each can make of one; `Prepend` and `Replace` say it themselves."""

PROBES = ("a", "a ", " ", "1", "To be, or not to be: naïve 人生 12345…\n\n  it's ")
LONGEST_PROBE, SLOWEST = 1 << 12, 0.2
"""Characters, and seconds of a processor's time. Those that people use take a hundredth of it."""


def check_rules(rules: dict[str, Any]) -> None:
    """Whether a `tokenizer.json` asks for no more than a tokenizer needs.

    Raises:
        ValueError: if it does; the sentence goes on from the file's name.
    """
    model, added = rules.get("model"), rules.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or model.get("type") not in (None, "BPE"):  # the oldest files do not say
        raise ValueError("it is no BPE, the one kind that is read here")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("its added tokens are no list")
    ids = [*vocab.values(), *(token.get("id") for token in added)]
    most = 2 * len(ids) + 1024  # there may be gaps
    if bad := [i for i in ids if not isinstance(i, int) or not 0 <= i < most]:
        raise ValueError(f"it has the id {bad[0]!r:.40}, but only {len(ids):,} tokens")
    names = [model.get(key) for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")]
    for name in [*names, *(token.get("content") for token in added)]:
        if isinstance(name, str) and len(name) > LONGEST_NAME:
            raise ValueError(
                f"the name {name[:20]!r}… has {len(name):,} characters, not {LONGEST_NAME} at most"
            )
    if (length := sum(len(str(token.get("content"))) for token in added)) > LONGEST_NAMES:
        raise ValueError(f"its added tokens have {length:,} characters, not {LONGEST_NAMES:,} at most")
    steps = [rules.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    if (length := len(json.dumps(steps))) > LONGEST_RULES:
        raise ValueError(f"its rules have {length:,} characters, and such rules at most {LONGEST_RULES:,}")
    growth = math.prod(_growth(step) for part in steps[:2] for step in _steps(part))
    if growth > MOST_GROWTH:
        raise ValueError(f"its rules can make {growth:,.0f} characters of one, not {MOST_GROWTH:,} at most")
    for step in _steps(steps[2]):
        for template in (step.get("single"), step.get("pair")):
            texts = [json.dumps(piece.get("Sequence")) for piece in _dicts(template) if "Sequence" in piece]
            if len(texts) > 2 or (template is step.get("single") and len(texts) > 1):
                raise ValueError("its post-processor repeats the text")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part, those in a sequence one after the other. (A sequence need not say that it is one.)"""
    for step in _dicts([part]):
        inside = [step[key] for key in ("normalizers", "pretokenizers", "processors") if key in step]
        for one in [one for steps in inside for one in _dicts(steps)]:
            yield from _steps(one)
        if not inside:
            yield step


def _dicts(found: Any) -> list[dict[str, Any]]:
    """What the library can take for steps; it says itself what is wrong with the rest."""
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _growth(step: dict[str, Any]) -> float:
    """How many characters the step makes of one, at most."""
    kind, pattern = step.get("type"), step.get("pattern")
    if isinstance(pattern, dict) and isinstance(expression := pattern.get("Regex"), str):
        check_pattern(expression)
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    if kind == "Replace":
        if pattern == {"String": ""}:
            raise ValueError("it replaces what is not there")
        new, old = len(str(step.get("content"))), pattern.get("String") if isinstance(pattern, dict) else None
        return max(1.0, new / len(old)) if isinstance(old, str) and old else 1 + new
    if kind not in GROWTH:
        raise ValueError(f"its step {kind!r:.40} is not known")
    return GROWTH[kind]


# ── Regular expressions ──────────────────────────────────────────────────────────────────────────────────────

_PIECE = re.compile(
    r"""(?P<open>\((?:\?(?:[imsu]*:|=|!|<=|<!|>))?(?!\?))
    | (?P<close>\))
    | (?P<either>\|)
    | (?P<times>[*+?][?+]?|\{\d*,?\d*\}\??)
    | (?P<one>\\[pP]\{\^?\w+\}|\\x\{[0-9a-fA-F]+\}|\\[^a-zA-Z0-9]|\\[dDwWsShHnrtfvaebBAzZxu]|[^\\\[(])
    | (?P<set>\[\^?(?=[^\]]))""",
    re.VERBOSE,
)


def check_pattern(pattern: str) -> None:
    """Whether a regular expression has no group that is repeated and can itself be matched in several ways.

    `(a+)+$` and `(a|a)+$` try all ways to cut a text up, and there are 2ⁿ of them. No tokenizer needs such a group.
    What is in this house's dialect alone, or cannot be followed (references, recursion, comments), is refused as well.

    Raises:
        ValueError: if it has.
    """
    for nested in (
        True,
        False,
    ):  # to some libraries, `[` in a set begins another; to others it is a character
        _follow(pattern, nested)


def _follow(pattern: str, nested: bool) -> None:
    varies = [False]  # whether what has been read of each open group can be matched in several ways
    at, before = 0, ""
    closed = False  # the group before can
    while at < len(pattern):
        found = _PIECE.match(pattern, at)
        kind = found.lastgroup if found else None
        if kind is None or (kind == "times" and before == "times"):
            raise ValueError(
                f"its pattern {pattern!r:.60} cannot be followed from {pattern[at : at + 12]!r} on"
            )
        at = found.end() if kind != "set" else _end_of_set(pattern, found.end(), nested)
        if kind == "open":
            varies.append(False)
        elif kind == "close" and len(varies) > 1:
            closed = varies.pop()
            varies[-1] |= closed
        elif kind == "either":
            varies[-1] = True
        elif kind == "times":
            if (
                before == "close"
                and closed
                and found[0][0] != "?"
                and found[0] not in ("{1}", "{0,1}", "{,1}")
            ):
                raise ValueError(
                    f"its pattern {pattern!r:.60} repeats a group that can be matched in several ways, "
                    "which can take for ever"
                )
            varies[-1] |= not re.fullmatch(r"\{\d+\}", found[0])
        before = kind


def _end_of_set(pattern: str, at: int, nested: bool) -> int:
    """Where the set of characters ends that was opened before `at`."""
    depth = 1
    while depth and at < len(pattern):
        depth += {"[": int(nested), "]": -1}.get(pattern[at], 0)
        at += 2 if pattern[at] == "\\" else 1
    return at


def check_speed(encode: Callable[[str], object]) -> None:
    """Whether texts of some length are encoded at all, and in a time that grows as they do.

    Raises:
        ValueError: if not.
    """
    length = 64
    while length <= LONGEST_PROBE:
        for probe in PROBES:
            text = (probe * length)[:length]
            start = time.process_time()
            encode(text)
            if (seconds := time.process_time() - start) > SLOWEST:
                raise ValueError(
                    f"it takes {seconds:.1f} s for {length:,} characters, which no pattern needs"
                )
        length *= 2
