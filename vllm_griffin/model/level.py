"""One level of draft trees, as the draft's attention layer sees it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TreeLevel:
    """Where the K nodes per request of one tree level read and write keys and values.

    Each request sees its whole prefix in the paged cache, and of its tail (the tree nodes so far,
    in the scratch buffers) those whose bit is set. M is the most tree nodes a slot can hold, W the
    number of 64-bit words for M bits.
    """

    # [num_reqs, max_blocks] int32, the paged cache
    block_table: Tensor
    # [num_reqs] int32, draft keys in the paged cache
    prefix_lens: Tensor
    # [num_reqs] int32, first row of the request in this level (b * K)
    q_start: Tensor
    # [num_reqs] int32, rows of the request in this level (K)
    num_rows: Tensor
    # [num_slots * M, num_kv_heads (of this rank), head_dim], written here, read by all later levels
    k_scratch: Tensor
    v_scratch: Tensor
    # [num_reqs * K] int64, scratch row of each of this level's keys
    write_rows: Tensor
    # [num_reqs] int64, first scratch row of the request
    tail_start: Tensor
    # [num_reqs, K, W] int64, bit j of row r: this row sees tail node j (itself included)
    tail_bits: Tensor
