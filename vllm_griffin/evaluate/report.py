"""An evaluation for a reader: a table on the terminal."""

import os.path
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def short_names(drafts: Sequence[str]) -> dict[str, str]:
    """Drafts by the last part of their paths, or by their whole paths where that is not unique."""
    names = {draft: os.path.basename(draft.rstrip("/")) for draft in drafts}
    if len(set(names.values())) < len(names):
        return {draft: draft for draft in drafts}
    return names


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One line per draft, prompt set, temperature and tree."""
    names = short_names(list(dict.fromkeys(row["draft"] for row in rows)))
    several = len(names) > 1
    table = Table(
        title="Acceptance length with its 95 % interval over prompts; share of verify steps that accepted at "
        "least d tokens; of misaligned roots per forward; nodes drafted per accepted token",
        box=SIMPLE,
    )
    for column in ("prompts", "T", "tree", "draft"):
        table.add_column(column)
    for column in ("length", "accepted at 1, 2, .., %", "misaligned at 2, 3, .., %"):
        table.add_column(column, no_wrap=True)
    table.add_column("drafted", justify="right")
    if several:
        table.add_column("against the first")
    for row in rows:
        cells = [row["prompts_of"], f"{row['temperature']:g}", row["tree"], names[row["draft"]]]
        cells += [
            f"{_number(row['acceptance_length'])} {_interval(row['acceptance_length_95'])}",
            " ".join(_number(share, 100, 0) for share in row["per_depth"]),
            " ".join(_number(share, 100, 0) for share in row["misaligned"]),
            _number(row["drafted_per_accepted"], 1, 1),
        ]
        if several:
            other = row.get("against_first")
            cells.append(_against(other) if other else "")
        table.add_row(*cells)
    console.print(table)


def print_checks(checks: Sequence[dict[str, Any]], console: Console) -> None:
    """How the replay compares with the engine, a line per draft and tree."""
    for check in checks:
        console.print(
            f"replay against engine, {check['draft']}, tree {check['tree']}: {check['prompts']} answers, "
            f"{check['steps']} verify steps; {check['differing_steps']} steps, "
            f"{check['differing_trees']} trees and {check['differing_answers']} answers differ",
            highlight=False,
        )


def _against(other: dict[str, Any]) -> str:
    low, high = other["ratio_95"]
    if other["ratio"] is None or low is None:
        return "-"
    return f"{100 * (other['ratio'] - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"


def _number(value: float | None, scale: float = 1, digits: int = 2) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _interval(values: Sequence[float | None]) -> str:
    return f"[{_number(values[0])}, {_number(values[1])}]"
