"""A character for each scheme of a plan, by which it is told from the others without colour."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping

from dtmsearch.core.schemes import parse_scheme

# The character of a component that a plan leaves out.
UNQUANTIZED = "."


def scheme_characters(schemes: Iterable[str]) -> Mapping[str, str]:
    """Scheme -> character, from few bits to many: the digit of its bits where no other of the schemes has these, else a
    letter."""
    bits = {scheme: _bits(scheme) for scheme in dict.fromkeys(schemes)}
    shared = Counter(bits.values())
    letters = iter(string.ascii_lowercase + string.ascii_uppercase)
    return {
        scheme: str(bits[scheme]) if bits[scheme] is not None and shared[bits[scheme]] == 1 else next(letters, "?")
        for scheme in sorted(bits, key=lambda scheme: (bits[scheme] or 0, scheme))
    }


def _bits(scheme: str) -> int | None:
    """The digit of a scheme that rounds to fewer than ten bits; None of others, and of one of a package that is not
    installed here."""
    try:
        bits = parse_scheme(scheme).bits
    except ValueError:
        return None
    return bits if 0 < bits < 10 else None
