"""What a step's tree rows look like to the attention layers of the target."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_griffin.kernels.tree_attention import TreeContext


@dataclass(frozen=True)
class TreeRows:
    """The tree rows of one batch: the last ``num_rows[b]`` query rows of request ``b``.

    A request without a tree in this step (a prefill chunk, a plain decode) has 0 rows and keeps
    vLLM's causal attention. The tensors are made once and then written to: a captured CUDA graph
    reads them where they lie.

    Shapes: B requests, R rows of the largest tree, W 64-bit words for R bits.
    """

    # [B] int32: first tree row (the root) among the batch's query rows
    q_start: torch.Tensor
    # [B] int32
    num_rows: torch.Tensor
    # [B] int32: cached keys before the root, which every row of the tree sees; 0 without a tree
    prefix_lens: torch.Tensor
    # [B, R, W] int64: bit j of row i = row j is row i or an ancestor of it
    bits: torch.Tensor

    @classmethod
    def empty(cls, max_num_reqs: int, bits: torch.Tensor) -> "TreeRows":
        """Rows of no tree; ``bits`` [.., R, W] are those of the trees to come."""
        q_start, num_rows, prefix_lens = bits.new_zeros(3, max_num_reqs, dtype=torch.int32)
        return cls(q_start, num_rows, prefix_lens, bits.new_zeros(max_num_reqs, *bits.shape[1:]))

    def of(self, num_reqs: int, max_rows: int) -> "TreeRows":
        """The first requests, which have so many rows at most."""
        return TreeRows(
            self.q_start[:num_reqs],
            self.num_rows[:num_reqs],
            self.prefix_lens[:num_reqs],
            self.bits[:num_reqs, :max_rows],
        )

    def context(self, block_table: torch.Tensor) -> TreeContext:
        """What the rows attend to: the cache before their root, and each other."""
        return TreeContext(
            block_table,
            self.prefix_lens,
            self.q_start,
            self.num_rows,
            self.q_start,
            self.bits,
            tail_cached=True,
        )


@dataclass(frozen=True)
class TreeMetadata:
    """A layer's metadata where there are tree rows alone and no builder of vLLM's had a part."""

    tree: TreeContext
    only_tree: bool = True


def attach_tree(attn_metadata: dict[str, Any], tree: TreeRows | None, alone: bool) -> None:
    """Hands the tree to every layer's metadata; layers of one group share theirs.

    ``alone``: the batch has no other rows, which the host knows from what was scheduled.
    """
    for metadata in {id(shared): shared for shared in attn_metadata.values()}.values():
        metadata.tree = None if tree is None else tree.context(metadata.block_table)
        metadata.only_tree = alone


def attached_tree(attn_metadata: Any) -> TreeContext | None:
    """The tree of a layer's metadata; None in passes that have none, as the draft's first one."""
    return getattr(attn_metadata, "tree", None)


def only_tree(attn_metadata: Any) -> bool:
    """Whether a layer's metadata speaks of tree rows alone, so that no causal row is left to attend."""
    return getattr(attn_metadata, "only_tree", False)
