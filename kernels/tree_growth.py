"""Growing a draft tree by one level, and choosing and ordering its nodes for verification.

Both ops know tokens, parents and scores only. The score of a node is the cumulative
log-probability of its path, so it never exceeds its parent's; NaN counts as -inf. All choices are
by (score descending, index ascending), which puts a parent before its child even when their
scores are equal.

The method is EAGLE-2's (arXiv 2406.16858): a frontier of the best nodes is expanded level by level,
then the N best of all candidates are verified.

Shape letters: B requests, F nodes of the frontier, K children per node, W 64-bit words of bits,
P candidates in the pool, N drafted nodes, root not counted.
"""

from typing import NamedTuple

import torch


class AdvancedFrontier(NamedTuple):
    """All candidates of a level, and the best of them as the next frontier."""

    # [B, F * K] float32: score of every candidate, child k of frontier node f at f * K + k
    scores: torch.Tensor
    # [B, width] int64
    tokens: torch.Tensor
    # [B, width] float32, descending
    next_scores: torch.Tensor
    # [B, width] int32: index into the old frontier
    parents: torch.Tensor
    # [B, width] int32: index into the F * K candidates
    picks: torch.Tensor
    # [B, width, W] int64: ancestors and the node itself, as places in the scratch buffer
    bits: torch.Tensor


class OrderedTree(NamedTuple):
    """The verified tree. Row 0 is the root; every prefix of the rows is a tree too."""

    # [B, N] int64: token of rows 1 .. N
    tokens: torch.Tensor
    # [B, 1 + N] int32: parent's row, -1 for the root
    parents: torch.Tensor
    # [B, 1 + N] int32: 0 for the root
    depths: torch.Tensor
    # [B, 1 + N] float32: 0 for the root
    scores: torch.Tensor
    # [B, 1 + N, ceil((1 + N) / 64)] int64: bit j of row i = row j is an ancestor of row i, or i
    bits: torch.Tensor
    # [B] int32: rows 1 .. spine_len are the spine
    spine_len: torch.Tensor


def num_words(num_bits: int) -> int:
    """64-bit words that hold ``num_bits`` bits."""
    return -(-num_bits // 64)


def _one_hot_bits(
    # [n] int64
    places: torch.Tensor,
    words: int,
) -> torch.Tensor:
    """``[n, words]`` int64 with bit ``places[i]`` set in row ``i``."""
    bits = places.new_zeros(len(places), words)
    return bits.scatter_(1, (places // 64).unsqueeze(1), (1 << (places % 64)).unsqueeze(1))


def _nan_to_minus_inf(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), float("-inf"), x)


def advance_frontier_reference(
    # [B, F, K] float32
    child_logprobs: torch.Tensor,
    # [B, F, K] int64
    child_tokens: torch.Tensor,
    # [B, F] float32
    frontier_scores: torch.Tensor,
    # [B, F, W] int64
    frontier_bits: torch.Tensor,
    first_bit: int,
    width: int,
) -> AdvancedFrontier:
    """`advance_frontier` with torch."""
    num_children = child_logprobs.shape[2]
    words = frontier_bits.shape[2]
    scores = frontier_scores.unsqueeze(2) + child_logprobs.clamp(max=0.0)
    scores = _nan_to_minus_inf(scores).flatten(1)
    picks = scores.argsort(dim=1, descending=True, stable=True)[:, :width]
    parents = picks // num_children
    own = _one_hot_bits(torch.arange(first_bit, first_bit + width, device=picks.device), words)
    inherited = frontier_bits.gather(1, parents.unsqueeze(2).expand(-1, -1, words))
    return AdvancedFrontier(
        scores=scores,
        tokens=child_tokens.flatten(1).gather(1, picks),
        next_scores=scores.gather(1, picks),
        parents=parents.int(),
        picks=picks.int(),
        bits=inherited | own,
    )


def order_tree_reference(
    # [B, P] int64
    pool_tokens: torch.Tensor,
    # [B, P] float32
    pool_scores: torch.Tensor,
    # [B, P] int32
    pool_parents: torch.Tensor,
    # [P] int32
    pool_depths: torch.Tensor,
    num_nodes: int,
    max_depth: int,
) -> OrderedTree:
    """`order_tree` with torch."""
    batch, pool_size = pool_scores.shape
    scores = _nan_to_minus_inf(pool_scores)
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :num_nodes]
    parents = pool_parents.long().gather(1, chosen)
    spine_rank, spine_len = _spine(chosen, parents, max_depth)
    nodes = chosen.gather(1, spine_rank.argsort(dim=1))

    # Pool index -1 (the root) is entry 0 of the map from pool index to row.
    row_of = chosen.new_zeros(batch, 1 + pool_size)
    rows = torch.arange(1, 1 + num_nodes, device=nodes.device).expand_as(nodes)
    row_of.scatter_(1, nodes + 1, rows)
    parent_rows = row_of.gather(1, pool_parents.long().gather(1, nodes) + 1)
    return OrderedTree(
        tokens=pool_tokens.gather(1, nodes),
        parents=_with_root(parent_rows.int(), -1),
        depths=_with_root(pool_depths.int()[nodes], 0),
        scores=_with_root(scores.gather(1, nodes), 0.0),
        bits=_ancestor_bits(_with_root(parent_rows, 0), max_depth),
        spine_len=spine_len.int(),
    )


def _with_root(x: torch.Tensor, value: float) -> torch.Tensor:
    """``[B, N]`` to ``[B, 1 + N]`` with ``value`` for the root."""
    return torch.nn.functional.pad(x, (1, 0), value=value)


def _spine(
    # [B, N] int64: pool indices by falling score
    chosen: torch.Tensor,
    # [B, N] int64: pool indices of their parents
    parents: torch.Tensor,
    max_depth: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort keys ``[B, N]`` that put the spine first, and the spine's length ``[B]``.

    ``chosen`` is sorted, so the first child of a node found in it is its best.
    """
    batch, num_nodes = chosen.shape
    places = torch.arange(num_nodes, device=chosen.device)
    keys = (num_nodes + places).repeat(batch, 1)
    length = chosen.new_zeros(batch)
    tip = chosen.new_full((batch, 1), -1)
    for step in range(min(max_depth, num_nodes)):
        is_child = parents == tip
        best = is_child.int().argmax(1, keepdim=True)
        found = is_child.any(1, keepdim=True)
        keys = torch.where(found & (places == best), step, keys)
        length += found.squeeze(1)
        # No node has the parent -2: a spine that ended stays ended.
        tip = torch.where(found, chosen.gather(1, best), -2)
    return keys, length


def _ancestor_bits(
    # [B, 1 + N] int64, 0 for the root
    parent_rows: torch.Tensor,
    max_depth: int,
) -> torch.Tensor:
    """``[B, 1 + N, W]`` int64: each row's ancestors and itself."""
    num_rows = parent_rows.shape[1]
    words = num_words(num_rows)
    rows = torch.arange(num_rows, device=parent_rows.device)
    own = _one_hot_bits(rows, words)
    ancestor = rows.expand_as(parent_rows)
    bits = own[ancestor]
    for _ in range(max_depth):
        ancestor = parent_rows.gather(1, ancestor)
        bits |= own[ancestor]
    return bits


def advance_frontier(
    # [B, F, K] float32
    child_logprobs: torch.Tensor,
    # [B, F, K] int64
    child_tokens: torch.Tensor,
    # [B, F] float32
    frontier_scores: torch.Tensor,
    # [B, F, W] int64
    frontier_bits: torch.Tensor,
    first_bit: int,
    width: int,
) -> AdvancedFrontier:
    """Score all children of the frontier and keep the ``width`` best as the next frontier.

    ``score = frontier score + min(log-probability, 0)``, NaN becomes -inf; ties go to the lower
    candidate index. The root's level is a frontier of one node with score 0 and no bits.

    Args:
        child_logprobs: Log-probabilities of each frontier node's candidates.
        child_tokens: Their tokens.
        frontier_scores: Cumulative log-probability of the frontier's nodes.
        frontier_bits: Their own and their ancestors' places in the draft scratch buffer.
        first_bit: Place of the next frontier's first node in that buffer.
        width: Size of the next frontier, at most ``F * K``.
    """
    return advance_frontier_reference(
        child_logprobs, child_tokens, frontier_scores, frontier_bits, first_bit, width
    )


def order_tree(
    # [B, P] int64
    pool_tokens: torch.Tensor,
    # [B, P] float32
    pool_scores: torch.Tensor,
    # [B, P] int32
    pool_parents: torch.Tensor,
    # [P] int32
    pool_depths: torch.Tensor,
    num_nodes: int,
    max_depth: int,
) -> OrderedTree:
    """Choose the ``num_nodes`` best of the pool and order them spine first.

    The spine runs from the root to the best-scored chosen child until there is none. The other
    nodes follow by (score descending, pool index ascending), so a parent's row always precedes
    its child's and every prefix of the rows is a tree.

    Args:
        pool_tokens: Tokens of the candidates.
        pool_scores: Cumulative log-probabilities; a parent's is at least its child's.
        pool_parents: Pool index of the parent, smaller than the child's own; -1 = the root.
        pool_depths: Depth of each candidate, 1 for children of the root.
        num_nodes: N, at most ``P``.
        max_depth: Largest depth in the pool.
    """
    return order_tree_reference(
        pool_tokens, pool_scores, pool_parents, pool_depths, num_nodes, max_depth
    )
