"""One level of draft trees, as the draft's attention layer sees it."""

from dataclasses import dataclass

from torch import Tensor

from vllm_griffin.kernels.tree_attention import TreeContext


@dataclass
class TreeLevel:
    """Where the K nodes per request of one tree level read and write keys and values.

    Each request sees its whole prefix in the paged cache, and of its tail (the tree nodes so far,
    in the scratch buffers) those whose bit is set. M is the most nodes that a tree expands.
    """

    # Tail keys are those of the scratch buffers; a request has K rows, from row b * K on.
    context: TreeContext
    # [num_reqs * M, num_kv_heads (of this rank), head_dim], written here, read by all later levels
    k_scratch: Tensor
    v_scratch: Tensor
    # [num_reqs * K] int64, scratch row of each of this level's keys
    write_rows: Tensor
