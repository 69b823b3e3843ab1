"""What is wrong with a speculative config, in one sentence each."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

SCHEDULE = "num_speculative_tokens_per_batch_size"


def unknown_field(name: str, known: Sequence[str]) -> str:
    """A field that does not exist, with the nearest one that does."""
    return f"speculative_config['{name}'] is not a field of method 'griffin': {advice(name, known)}"


def advice(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """The nearest of the known names, if its likeness is above the cutoff, or all of them."""
    near = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"leave it out (known: {', '.join(known)})"


def sentence(error: ValidationError) -> tuple[str, Any, str]:
    """The first complaint of pydantic: (field, its value, the sentence); no field: the config as a whole."""
    first = error.errors()[0]
    if not first["loc"]:
        return "", None, first_line(error)
    field, *inner = first["loc"]
    if field == SCHEDULE:
        # Between field and place stands which of the field's types was tried.
        inner = [key for key in inner if isinstance(key, int)]
    place = f"speculative_config['{field}']" + "".join(f"[{key!r}]" for key in inner)
    reason = first["msg"].replace("Input should be", "it must be")
    if field == SCHEDULE:
        reason = (
            "it must be 'auto' or like [[1, 4, 59], [5, 16, 10]] (first and last batch size, nodes)"
        )
    return str(field), first["input"], f"{place}={first['input']!r}: {reason}"


def first_line(error: Exception) -> str:
    """An error's message without pydantic's frame and without further lines."""
    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors()[0]["msg"].removeprefix("Value error, ")
    lines = text.strip().splitlines() or [type(error).__name__]
    # A heading says nothing without what follows.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
