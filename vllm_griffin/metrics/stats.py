"""What the scheduler counts of the verified trees, and how that reaches the front end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Self

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_griffin.config import GriffinSpeculativeConfig


@dataclass
class TreeStats(SpecDecodingStats):
    """vLLM's counts of one step, with those of its trees.

    Attributes:
        num_trees: verified trees.
        num_tree_nodes: nodes verified in them, the root not counted.
        num_accepted_beyond_spine: accepted tokens that the trees' spines alone would not have given.
        num_trees_per_pos: ``[D]``, trees with a node at depth 1, 2, ..
        num_accepted_per_rank: ``[K]``, accepted tokens that were their parent's best child, second ..

    """

    num_trees: int = 0
    num_tree_nodes: int = 0
    num_accepted_beyond_spine: int = 0
    num_trees_per_pos: list[int] = field(default_factory=list)
    num_accepted_per_rank: list[int] = field(default_factory=list)

    @classmethod
    def for_config(cls, config: GriffinSpeculativeConfig) -> Self:
        """Zero counts. A position of vLLM's vector is a depth here, so it has D entries."""
        assert config.tree_top_k is not None
        return cls(
            num_spec_tokens=config.num_speculative_tokens,
            num_accepted_tokens_per_pos=[0] * config.tree_levels,
            num_draft_tokens_per_pos=[0] * config.num_speculative_tokens,
            num_trees_per_pos=[0] * config.tree_levels,
            num_accepted_per_rank=[0] * config.tree_top_k,
        )

    def observe_tree(self, path_ranks: Sequence[int]) -> None:
        """Counts one request's verified tree.

        ``path_ranks``: its nodes, its depth and the accepted nodes' sibling ranks, as ``TreeRunnerOutput``
        has them. Depth 0 counts nothing: the scheduler asked for drafts before there was a tree, or a
        budget for all trees left none of it.
        """
        num_nodes, depth, *ranks = path_ranks
        ranks = [rank for rank in ranks if rank]
        if depth == 0:
            return
        self.num_trees += 1
        self.num_tree_nodes += num_nodes
        for position in range(depth):
            self.num_trees_per_pos[position] += 1
        for rank in ranks:
            self.num_accepted_per_rank[rank - 1] += 1
        # The spine takes the best child everywhere, so it ends at the first other one.
        on_spine = sum(1 for _ in takewhile(lambda rank: rank == 1, ranks))
        self.num_accepted_beyond_spine += len(ranks) - on_spine

    def add(self, other: "TreeStats") -> None:
        """Adds the counts that `TreeStatLogger` shows to these."""
        self.num_trees += other.num_trees
        self.num_tree_nodes += other.num_tree_nodes
        self.num_accepted_beyond_spine += other.num_accepted_beyond_spine
        for name in ("num_accepted_tokens_per_pos", "num_trees_per_pos", "num_accepted_per_rank"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip(mine, theirs, strict=True)])


# The front end decodes messages by these types; by vLLM's own it would drop the counts of trees.


@dataclass
class TreeSchedulerStats(SchedulerStats):
    """vLLM's type with the trees' counts named."""

    spec_decoding_stats: TreeStats | None = None


class TreeEngineCoreOutputs(  # type: ignore[misc]
    EngineCoreOutputs, array_like=True, omit_defaults=True, gc=False
):
    """vLLM's type with the trees' counts named; the same fields in the same order."""

    scheduler_stats: TreeSchedulerStats | None = None
