"""Acceptance length by tree, kept in a draft's `config.json` for engines that choose the tree themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_griffin.model.config import read_json
from vllm_griffin.whole_file import write_json


def pooled_lengths(draft: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tree -> acceptance length over all verify steps of `draft`, of all prompt sets and temperatures."""
    accepted: dict[str, int] = {}
    steps: dict[str, int] = {}
    for row in rows:
        if row["draft"] == draft:
            tree = row["tree"]
            accepted[tree] = accepted.get(tree, 0) + row["accepted"]
            steps[tree] = steps.get(tree, 0) + row["steps"]
    return {tree: round(1 + accepted[tree] / steps[tree], 3) for tree in steps}


def write_trees(folder: Path, lengths: Mapping[str, float]) -> None:
    """Replace `tree_acceptance` in the `config.json` of a draft's folder.

    Raises:
        CheckpointError: The file is missing or malformed.
        OSError: It cannot be written.
    """
    file = folder / "config.json"
    config = read_json(file) | {"tree_acceptance": dict(lengths)}
    write_json(file, config)
