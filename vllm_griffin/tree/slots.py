"""The trees that wait for verification, one slot per request.

Shapes: S request slots, N nodes, W 64-bit words for 1 + N bits.
"""

import torch
from torch.nn.functional import pad

from vllm_griffin.kernels.packed_bits import num_words
from vllm_griffin.kernels.tree_order import OrderedTree


class DraftTrees:
    """Device tensors that carry each request's tree from drafting to verification.

    A slot holds a tree if ``num_nodes`` is positive. What an empty or a stale slot contains is still
    well-formed (parents before children, every row sees itself), so that rows which the scheduler
    places before there is a tree give finite numbers that nobody accepts.
    """

    def __init__(self, slots: int, num_nodes: int, device: torch.device) -> None:
        rows = 1 + num_nodes
        words = num_words(rows)
        chain = torch.arange(rows, device=device)
        # [S, N] int64
        self.tokens = torch.zeros(slots, num_nodes, dtype=torch.int64, device=device)
        # [S, 1 + N] int32: row of the parent, -1 for the root
        self.parents = (chain - 1).to(torch.int32).repeat(slots, 1)
        # [S, 1 + N] int32
        self.depths = chain.to(torch.int32).repeat(slots, 1)
        # [S, 1 + N] float32: cumulative log-probability
        self.scores = torch.zeros(slots, rows, dtype=torch.float32, device=device)
        # [S, 1 + N, W] int64: the row itself and its ancestors
        self.bits = torch.zeros(slots, rows, words, dtype=torch.int64, device=device)
        self.bits[:, chain, chain // 64] = torch.ones_like(chain) << (chain % 64)
        # [S] int32: nodes that may be accepted
        self.num_nodes = torch.zeros(slots, dtype=torch.int32, device=device)
        # [S] int32: rows 1 .. spine_len are the spine
        self.spine_len = torch.zeros(slots, dtype=torch.int32, device=device)
        # [S] bool: verify this request on its spine only
        self.spine_only = torch.zeros(slots, dtype=torch.bool, device=device)

    def reset(self, slot: int, spine_only: bool) -> None:
        """A new request takes the slot: what the previous one left there is not its tree."""
        # Assigned to one element, a number would be copied from the host, which waits for the device.
        self.num_nodes[slot : slot + 1].fill_(0)
        self.keep_to_spine(slot, spine_only)

    def keep_to_spine(self, slot: int, spine_only: bool = True) -> None:
        """Whether the slot's request is verified on its spine only."""
        self.spine_only[slot : slot + 1].fill_(spine_only)

    def store(self, slots: torch.Tensor, tree: OrderedTree, valid: torch.Tensor) -> None:
        """Keeps the batch's trees, of N nodes or fewer.

        ``slots`` [B] int64, ``valid`` [B] bool: there is a root. Rows past a smaller tree keep what they had.
        """
        nodes, words = tree.tokens.shape[1], tree.bits.shape[2]
        rows = slice(0, 1 + nodes)
        self.tokens[slots, :nodes] = tree.tokens
        self.parents[slots, rows] = tree.parents
        self.depths[slots, rows] = tree.depths
        self.scores[slots, rows] = tree.scores
        self.bits[slots, rows] = pad(tree.bits, (0, self.bits.shape[2] - words))
        self.spine_len[slots] = tree.spine_len
        self.num_nodes[slots] = valid.to(torch.int32) * nodes

    def worth(self, slots: torch.Tensor) -> torch.Tensor:
        """[B, N] float32: log-probability of each node's path, -inf for what will not be accepted.

        ``slots`` [B] int64.
        """
        rows = torch.arange(1, self.scores.shape[1], device=slots.device)
        nodes, spine = self.num_nodes[slots], self.spine_len[slots]
        limit = torch.where(self.spine_only[slots], torch.minimum(nodes, spine), nodes)
        return self.scores[slots, 1:].where(rows <= limit.unsqueeze(1), float("-inf"))

    def clear(self, slots: torch.Tensor) -> None:
        """The requests of ``slots`` [B] int64 get no tree in this step."""
        self.num_nodes.index_fill_(0, slots, 0)
