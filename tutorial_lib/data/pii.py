"""Personal data in text: found by shape, believed only when it is valid, replaced by a placeholder.

    >>> scrub("Mail ann@example.org, card 4111 1111 1111 1111, order 4111 1111 1111 1112.")[0]
    'Mail <EMAIL>, card <CARD>, order 4111 1111 1111 1112.'

A shape alone is not enough, since any sixteen digits look like a card number. Card numbers must fit an issuer and
Luhn's checksum, bank accounts (IBAN) theirs, phone numbers a real numbering plan, IP addresses must be public.
Names, postal addresses, and what the context gives away are not found: nothing here reads.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator

__all__ = ["KINDS", "scrub"]

Span = tuple[int, int]

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
)
_DIGITS = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?!\w|[.-]\d)")
_ISSUER = re.compile(
    r"4(\d{12}|\d{15}|\d{18})|(5[1-5]|2[2-7])\d{14}|3[47]\d{13}|(6011|65\d\d|35\d\d)\d{12}|3[068]\d{12}"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?=[0-9a-fA-F]{0,4}:)[0-9a-fA-F:]{2,39})(?![\w:]|\.\d)"
)


def _need(package: str, error: ImportError) -> ImportError:
    return ImportError(f"scrubbing needs the package {package}: pip install {package}")


def emails(text: str, region: str) -> Iterator[Span]:
    """Addresses with a domain of at least two parts."""
    yield from (found.span() for found in _EMAIL.finditer(text))


def ibans(text: str, region: str) -> Iterator[Span]:
    """Bank accounts whose country, length and checksum are right."""
    try:
        from stdnum import iban
    except ImportError as error:
        raise _need("python-stdnum", error) from error
    for found in _IBAN.finditer(text):
        start = found.start()
        # A capitalised word may follow: the longest beginning that is valid counts.
        for end in range(found.end(), start + 14, -1):
            if (
                not text[end - 1].isspace()
                and not text[end : end + 1].isalnum()
                and iban.is_valid(text[start:end])
            ):
                yield start, end
                break


def cards(text: str, region: str) -> Iterator[Span]:
    """Card numbers: the beginning and length of a known issuer, and Luhn's checksum."""
    try:
        from stdnum import luhn
    except ImportError as error:
        raise _need("python-stdnum", error) from error
    for found in _DIGITS.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if _ISSUER.fullmatch(digits) and luhn.is_valid(digits):
            yield found.span()


def phones(text: str, region: str) -> Iterator[Span]:
    """Numbers that exist in the plan of their country: `+44 …` anywhere, without a prefix those of `region`."""
    try:
        import phonenumbers
    except ImportError as error:
        raise _need("phonenumbers", error) from error
    for found in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID):
        yield found.start, found.end


def ips(text: str, region: str) -> Iterator[Span]:
    """IPv4 and IPv6 addresses of the public network; 127.0.0.1 and 192.168.… belong to nobody, and stay."""
    for found in _IP.finditer(text):
        try:
            if ipaddress.ip_address(found[0]).is_global:
                yield found.span()
        except ValueError:
            pass


KINDS: dict[str, Callable[[str, str], Iterator[Span]]] = {
    "EMAIL": emails,
    "IBAN": ibans,
    "CARD": cards,
    "IP": ips,
    "PHONE": phones,
}
"""Each kind's finder, in the order in which they are asked: what one has replaced, the next does not see."""


def scrub(text: str, kinds: tuple[str, ...] = tuple(KINDS), region: str = "US") -> tuple[str, Counter[str]]:
    """Replace personal data by `<EMAIL>`, `<IBAN>`, `<CARD>`, `<IP>`, `<PHONE>`.

    Args:
        kinds: Which of `KINDS` to look for.
        region: The country (ISO code) of phone numbers without a country code.

    Returns:
        The text, and how many of each kind were replaced.

    Raises:
        ValueError: if a kind is unknown.
        ImportError: if a package of the extra `data` is missing; the message names it.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind of personal data {unknown[0]!r}: known are {', '.join(KINDS)}")
    counts: Counter[str] = Counter()
    for kind in kinds:
        pieces, end = [], 0
        for start, stop in KINDS[kind](text, region):
            pieces += [text[end:start], f"<{kind}>"]
            end = stop
            counts[kind] += 1
        text = "".join([*pieces, text[end:]])
    return text, counts
