"""Values of JSON that strangers wrote: whether they are the numbers they should be, and how a message shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def whole_number(value: Any) -> int | None:
    """Return a whole number (1.0 is one, true is not) that fits into 64 bits, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -(2**63) <= value < 2**63:
        return None
    return int(value) if value == int(value) else None


def all_finite(values: Sequence[Any]) -> bool:
    """Tell whether all are numbers, and none NaN or infinite."""
    if not set(map(type, values)) <= {int, float}:
        return False
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # a whole number of hundreds of digits
        return False


def in_short(value: Any) -> str:
    """Return how a message shows a value: as Python writes it, cut to 60 characters; "missing" for None."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
