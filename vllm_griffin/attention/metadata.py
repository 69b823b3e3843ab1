"""What a step's tree rows look like to the attention layers of the target."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_griffin.kernels.tree_attention import TreeContext


@dataclass
class TreeRows:
    """The tree rows of one batch: the last ``num_rows[b]`` query rows of request ``b``.

    A request without a tree in this step (a prefill chunk, a plain decode) has 0 rows and keeps
    vLLM's causal attention.
    """

    # [num_reqs] int32: first tree row (the root) among the batch's query rows
    q_start: torch.Tensor
    # [num_reqs] int32
    num_rows: torch.Tensor
    # [num_reqs] int32: cached keys before the root, which every row of the tree sees; 0 without a tree
    prefix_lens: torch.Tensor
    # [num_reqs, 1 + N, num_words] int64: bit j of row i = row j is row i or an ancestor of it
    bits: torch.Tensor
    # The batch has no other rows, which the host knows from what was scheduled.
    alone: bool

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


def attach_tree(attn_metadata: dict[str, Any], tree: TreeRows | None) -> None:
    """Hands the tree to every layer's metadata; layers of one group share theirs."""
    for metadata in {id(shared): shared for shared in attn_metadata.values()}.values():
        metadata.tree = None if tree is None else tree.context(metadata.block_table)
        metadata.only_tree = tree is not None and tree.alone


def attached_tree(attn_metadata: Any) -> TreeContext | None:
    """The tree of a layer's metadata; None in passes that have none, as the draft's first one."""
    return getattr(attn_metadata, "tree", None)


def only_tree(attn_metadata: Any) -> bool:
    """Whether a layer's metadata speaks of tree rows alone, so that no causal row is left to attend."""
    return getattr(attn_metadata, "only_tree", False)
