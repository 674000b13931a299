"""Limits on memory, as users write them."""

from __future__ import annotations

import re

from manifold_sde.arguments import integer
from manifold_sde.errors import ArgumentError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{letter}i": 1 << (10 * power) for power, letter in enumerate("kmgt", start=1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def bytes_of(memory: object) -> int:
    """A number of bytes, given as one or as a string.

    Raises:
        ArgumentError: If it is none.

    Example:
        >>> bytes_of("2 GiB"), bytes_of("500 MB"), bytes_of(1024)
        (2147483648, 500000000, 1024)
    """
    value = integer(memory)
    if isinstance(memory, str) and (found := _AMOUNT.fullmatch(memory)):
        value = int(float(found[1]) * _UNITS.get(found[2].lower(), 0))
    if value is None or value < 1:
        raise ArgumentError(
            "memory is not a number of bytes",
            received=repr(memory),
            expected="a positive integer, or a string with a unit",
            remedy='memory="2 GiB", or memory=2 * 2**30',
        )
    return value


def describe_bytes(count: float) -> str:
    """A number of bytes in words, rounded up so that it is enough: ``"1.5 GiB"``."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if count >= _UNITS[u[:2].lower()]), "B")
    size = _UNITS[unit[:-1].lower()]
    return f"{-(-count * 10 // size) / 10:.10g} {unit}"
