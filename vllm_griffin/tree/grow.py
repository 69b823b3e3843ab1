"""EAGLE-2's dynamic tree (arXiv 2406.16858): expand the best, then keep the N best of all.

Level 1 holds the root's K best tokens. Each further level expands a frontier of the K best nodes of
the level before by K children each. The pool of all K + (D - 1) * K * K candidates is ranked by
cumulative log-probability, and the N best are verified.

Shapes: B requests, K top_k, D levels, N nodes, W words of scratch bits.
"""

from dataclasses import dataclass

import torch

from vllm_griffin.kernels.packed_bits import num_words
from vllm_griffin.kernels.tree_growth import advance_frontier
from vllm_griffin.kernels.tree_order import OrderedTree, order_tree


@dataclass
class Frontier:
    """The nodes that the drafter expands next."""

    # [B, K] int64
    tokens: torch.Tensor
    # [B, K] int32: which node of the frontier before is the parent (0 on level 1)
    parents: torch.Tensor
    # [B, K, W] int64: which places of the draft's scratch buffer each node sees, itself included
    bits: torch.Tensor
    # [B, K] float32: cumulative log-probability
    scores: torch.Tensor
    # [B, K] int32: the nodes' places in the pool
    pool_index: torch.Tensor


class TreeGrower:
    """Grows the trees of one batch. All shapes follow from (N, D, K); nothing leaves the device."""

    def __init__(self, levels: int, top_k: int, device: torch.device) -> None:
        self.levels = levels
        self.top_k = top_k
        # The last level is not expanded, so its nodes need no place in the scratch buffer.
        self.scratch_size = max(levels - 1, 1) * top_k
        self.words = num_words(self.scratch_size)
        depths = [1] * top_k + [d for d in range(2, levels + 1) for _ in range(top_k * top_k)]
        self.pool_depths = torch.tensor(depths, dtype=torch.int32, device=device)

    def begin(self, child_logprobs: torch.Tensor, child_tokens: torch.Tensor) -> Frontier:
        """Level 1 from the root's best tokens; both arguments are [B, K]."""
        batch = child_tokens.shape[0]
        device = child_tokens.device
        self._tokens: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._level = 0
        self._pool_size = 0
        root = Frontier(
            tokens=child_tokens.new_zeros(batch, 1),
            parents=torch.zeros(batch, 1, dtype=torch.int32, device=device),
            bits=torch.zeros(batch, 1, self.words, dtype=torch.int64, device=device),
            scores=torch.zeros(batch, 1, dtype=torch.float32, device=device),
            pool_index=torch.full((batch, 1), -1, dtype=torch.int32, device=device),
        )
        return self.advance(root, child_logprobs.unsqueeze(1), child_tokens.unsqueeze(1))

    def advance(
        self, frontier: Frontier, child_logprobs: torch.Tensor, child_tokens: torch.Tensor
    ) -> Frontier:
        """The next frontier from the children [B, F, K] of this one's F nodes."""
        best = advance_frontier(
            child_logprobs.contiguous(),
            child_tokens.contiguous(),
            frontier.scores,
            frontier.bits,
            # Past the last expanded level the bits are never read.
            first_bit=min(self._level * self.top_k, self.scratch_size - self.top_k),
            width=self.top_k,
        )
        self._tokens.append(child_tokens.flatten(1))
        self._scores.append(best.scores)
        self._parents.append(
            frontier.pool_index.repeat_interleave(
                self.top_k, dim=1, output_size=best.scores.shape[1]
            )
        )
        grown = Frontier(
            tokens=best.tokens,
            parents=best.parents,
            bits=best.bits,
            scores=best.next_scores,
            pool_index=best.picks + self._pool_size,
        )
        self._level += 1
        self._pool_size += best.scores.shape[1]
        return grown

    def finish(self, num_nodes: int, spine_first: torch.Tensor | None = None) -> OrderedTree:
        """The best nodes of the pool so far, in the order of ``order_tree``; ``spine_first`` [B] bool."""
        return order_tree(
            torch.cat(self._tokens, dim=1),
            torch.cat(self._scores, dim=1),
            torch.cat(self._parents, dim=1),
            self.pool_depths[: self._pool_size],
            num_nodes,
            self._level,
            spine_first,
        )
