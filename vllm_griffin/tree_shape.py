"""The shape of a draft tree, as it is written on the command line."""

from dataclasses import dataclass
from typing import Any


def max_tree_nodes(depth: int, top_k: int) -> int:
    """Nodes that ``depth`` levels with a frontier of ``top_k`` can make, the root not counted."""
    return top_k + (depth - 1) * top_k**2


@dataclass(frozen=True)
class TreeShape:
    """A tree of `nodes` verified nodes in at most `depth` levels, `top_k` children each; 1 is a chain."""

    nodes: int
    depth: int
    top_k: int

    def __post_init__(self) -> None:
        """Refuse what cannot be drafted.

        Raises:
            ValueError: A number below 1, or more nodes than such a tree can have.
        """
        if min(self.nodes, self.depth, self.top_k) < 1:
            raise ValueError(f"tree {self}: every number must be at least 1")
        if self.nodes > self.pool:
            raise ValueError(
                f"tree {self}: {self.depth} levels with {self.top_k} children make at most "
                f"{self.pool} nodes"
            )

    @property
    def pool(self) -> int:
        """Candidates that are grown; the best `nodes` of them are verified."""
        return max_tree_nodes(self.depth, self.top_k)

    @property
    def levels(self) -> int:
        """Levels that can hold a verified node."""
        return min(self.depth, self.nodes)

    @property
    def width(self) -> int:
        """Nodes of a level, and children of a node, that can be verified; more change nothing."""
        return min(self.top_k, self.nodes)

    def __str__(self) -> str:
        if self.top_k == 1 and self.nodes == self.depth:
            return f"chain:{self.nodes}"
        return f"{self.nodes},{self.depth},{self.top_k}"

    @classmethod
    def parse(cls, text: str) -> "TreeShape":
        """Read ``nodes,depth,top_k`` or ``chain:length``.

        Raises:
            ValueError: It is neither, or no such tree can be drafted.
        """
        try:
            if text.startswith("chain:"):
                length = int(text.removeprefix("chain:"))
                numbers = [length, length, 1]
            else:
                numbers = [int(part) for part in text.split(",")]
            nodes, depth, top_k = numbers
        except ValueError as error:
            raise ValueError(
                f"tree {text!r} is neither nodes,depth,top_k (59,6,10) nor chain:length (chain:6)"
            ) from error
        return cls(nodes, depth, top_k)

    @property
    def fields(self) -> dict[str, int]:
        """The three numbers by their names in a draft's `tree` and in vLLM's `speculative_config`."""
        return {
            "num_speculative_tokens": self.nodes,
            "tree_depth": self.depth,
            "tree_top_k": self.top_k,
        }

    def speculative_config(self, draft: str, draft_vocab_size: int | None = None) -> dict[str, Any]:
        """vLLM's `speculative_config` for this tree and the folder or hub id `draft`."""
        limit = {} if draft_vocab_size is None else {"draft_vocab_size": draft_vocab_size}
        return limit | {"method": "griffin", "model": draft} | self.fields
