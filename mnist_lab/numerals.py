"""Numbers read from text, in the digits 0 to 9 alone."""

from __future__ import annotations

import math
import re


def whole_number(text: str) -> int:
    """Read a whole number in the digits 0 to 9; raises ValueError."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def finite_number(text: str) -> float:
    """Read a number in the digits 0 to 9, such as 0.05 or 5e-2; raises ValueError, also if it is too large."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or math.isinf(float(text)):
        raise ValueError(f"{text!r} is not a finite number")
    return float(text)
