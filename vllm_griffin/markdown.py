"""Pieces of the Markdown pages that commands write: lists of lines."""

from collections.abc import Mapping
from typing import Any


def code_block(command: Any) -> list[str]:
    """What was typed; nothing for None."""
    return ["```", str(command), "```", ""] if command else []


def figure(value: Any, digits: int = 3) -> str:
    """A number in a table; a dash for what is not one."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def table(entries: Mapping[str, Any]) -> list[str]:
    """Two columns without a heading; None and empty lists are left out, nested entries listed."""
    lines = ["| | |", "|---|---|"]
    lines += [
        f"| {key} | {cell(value)} |"
        for key, value in entries.items()
        if value not in (None, [], {})
    ]
    return [*lines, ""]


def cell(value: Any) -> str:
    """A value of a JSON record, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(cell(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "\\|").replace("\n", " ")
