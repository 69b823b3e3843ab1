"""Choosing the N best nodes of a grown draft tree and ordering them for verification.

    chosen = the N best of the pool by (score descending, pool index ascending)
    rows   = root, spine, the other chosen nodes in that same order

The spine runs from the root always to the best-scored chosen child. The score of a node is the
cumulative log-probability of its path, so it never exceeds its parent's; NaN counts as -inf. With
parents before children in the pool, a parent's row then precedes its child's even when their scores
are equal, and every prefix of the rows is a tree: the engine may trim it anywhere. Spine first,
because what can only be verified as a chain is verified on a prefix of the rows. A request that needs
no spine may have its rows by score alone: then every prefix is the best tree of its size.

The choice is EAGLE-2's (arXiv 2406.16858, section 4.2).

Shape letters: B requests, P candidates in the pool, N drafted nodes (root not counted), W 64-bit
words for 1 + N bits.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN201, ANN202

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched
from vllm_griffin.kernels.packed_bits import num_words, one_hot_bits


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
    # [B] int32: rows 1 .. spine_len are the spine; 0 where the rows are by score alone
    spine_len: torch.Tensor


def nan_to_minus_inf(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), float("-inf"), x)


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
    # [B] bool
    spine_first: torch.Tensor | None = None,
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
        spine_first: Requests whose rows begin with the spine, None = all; the rows of the others are
            by score alone.
    """
    batch, pool_size = pool_scores.shape
    scores = nan_to_minus_inf(pool_scores)
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :num_nodes]
    parents = pool_parents.long().gather(1, chosen)
    spine_rank, spine_len = _spine(chosen, parents, max_depth, spine_first)
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
    # [B] bool, None: all
    spine_first: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort keys ``[B, N]`` that put the spine first, and the spine's length ``[B]``.

    ``chosen`` is sorted, so the first child of a node found in it is its best.
    """
    batch, num_nodes = chosen.shape
    places = torch.arange(num_nodes, device=chosen.device)
    keys = (num_nodes + places).repeat(batch, 1)
    length = chosen.new_zeros(batch)
    tip = chosen.new_full((batch, 1), -1)
    if spine_first is not None:
        tip = torch.where(spine_first.unsqueeze(1), tip, -2)
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
    own = one_hot_bits(rows, words)
    ancestor = rows.expand_as(parent_rows)
    bits = own[ancestor]
    for _ in range(max_depth):
        ancestor = parent_rows.gather(1, ancestor)
        bits |= own[ancestor]
    return bits


@triton.jit
def load_scores(scores_ptr, index, valid):
    """Scores with NaN as -inf; -inf too where not ``valid``, so that padding never ranks."""
    scores = tl.load(scores_ptr + index, mask=valid, other=float("-inf"))
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit
def count_better(scores, index, other_scores, other_index):
    """How many of the others rank before each entry, by (score descending, index ascending)."""
    higher = other_scores[None, :] > scores[:, None]
    earlier = (other_scores[None, :] == scores[:, None]) & (other_index[None, :] < index[:, None])
    return tl.sum((higher | earlier).to(tl.int32), axis=1)


@triton.jit
def _choose_kernel(
    # [B, P]
    scores_ptr,
    # [B, N] int32: pool indices by falling score
    chosen_ptr,
    pool_size,
    num_nodes,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Scatter each candidate to its rank: ranks are a permutation, so no sort is needed."""
    request = tl.program_id(0)
    scores_ptr += request * pool_size
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scores = load_scores(scores_ptr, index, index < pool_size)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pool_size, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        other_scores = load_scores(scores_ptr, others, others < pool_size)
        rank += count_better(scores, index, other_scores, others)
    chosen = (index < pool_size) & (rank < num_nodes)
    tl.store(chosen_ptr + request * num_nodes + rank, index, mask=chosen)


@triton.jit
def _arrange_kernel(
    # [B, N] int32
    chosen_ptr,
    # [B, P] int32
    parents_ptr,
    # [B], not read unless SOME_BY_SCORE
    spine_first_ptr,
    # [B, N] int32: pool index of rows 1 .. N
    node_of_row_ptr,
    # [B, P] int32: row of the chosen pool entries
    row_of_node_ptr,
    # [B] int32
    spine_len_ptr,
    pool_size,
    num_nodes,
    max_spine,
    SOME_BY_SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walk the spine in registers, then number the rest in order."""
    request = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    valid = place < num_nodes
    node = tl.load(chosen_ptr + request * num_nodes + place, mask=valid, other=0)
    parent = tl.load(parents_ptr + request * pool_size + node, mask=valid, other=-3)
    row = tl.zeros([BLOCK], tl.int32)
    # Pool index of the spine's tip; -1 is the root, and -2 nobody's parent: the spine has ended.
    tip = tl.min(row, axis=0) - 1
    length = tip + 1
    if SOME_BY_SCORE:
        tip = tl.where(tl.load(spine_first_ptr + request) != 0, tip, -2)
    for _ in range(max_spine):
        best = tl.min(tl.where(parent == tip, place, BLOCK), axis=0)
        found = best < BLOCK
        length += found.to(tl.int32)
        row = tl.where(place == best, length, row)
        tip = tl.where(found, tl.sum(tl.where(place == best, node, 0), axis=0), -2)
    rest = valid & (row == 0)
    row = tl.where(rest, length + tl.cumsum(rest.to(tl.int32), axis=0), row)
    tl.store(spine_len_ptr + request, length)
    tl.store(node_of_row_ptr + request * num_nodes + row - 1, node, mask=valid)
    tl.store(row_of_node_ptr + request * pool_size + node, row, mask=valid)


@triton.jit
def _emit_kernel(
    # [B, P]
    pool_tokens_ptr,
    pool_scores_ptr,
    pool_parents_ptr,
    # [P]
    pool_depths_ptr,
    # [B, N] int32
    node_of_row_ptr,
    # [B, P] int32
    row_of_node_ptr,
    # [B, N]
    tokens_ptr,
    # [B, 1 + N]
    parents_ptr,
    depths_ptr,
    scores_ptr,
    # [B, 1 + N, W]
    bits_ptr,
    pool_size,
    num_nodes,
    num_words,
    max_depth,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write the rows of the tree; ancestors are found by climbing the pool from each node."""
    request = tl.program_id(0)
    pool_tokens_ptr += request * pool_size
    pool_scores_ptr += request * pool_size
    pool_parents_ptr += request * pool_size
    row_of_node_ptr += request * pool_size
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = row <= num_nodes
    is_node = is_row & (row > 0)
    node = tl.load(node_of_row_ptr + request * num_nodes + row - 1, mask=is_node, other=-1)

    token = tl.load(pool_tokens_ptr + node, mask=is_node, other=0)
    tl.store(tokens_ptr + request * num_nodes + row - 1, token, mask=is_node)
    out = request * (num_nodes + 1) + row
    score = tl.where(is_node, load_scores(pool_scores_ptr, node, is_node), 0.0)
    tl.store(scores_ptr + out, score, mask=is_row)
    depth = tl.load(pool_depths_ptr + node, mask=is_node, other=0)
    tl.store(depths_ptr + out, depth, mask=is_row)
    parent = tl.load(pool_parents_ptr + node, mask=is_node, other=-1)
    parent_row = tl.load(row_of_node_ptr + parent, mask=parent >= 0, other=0)
    tl.store(parents_ptr + out, tl.where(is_node, parent_row, -1), mask=is_row)

    word = tl.arange(0, WORDS)
    one = tl.full([BLOCK, WORDS], 1, tl.int64)
    bits = tl.zeros([BLOCK, WORDS], tl.int64)
    ancestor = row
    for _ in range(max_depth + 1):
        bit = one << (ancestor % 64)[:, None].to(tl.int64)
        bits |= tl.where(word[None, :] == (ancestor // 64)[:, None], bit, 0)
        # Past a child of the root, and for the root itself, this stays at row 0.
        node = tl.load(pool_parents_ptr + node, mask=node >= 0, other=-1)
        ancestor = tl.load(row_of_node_ptr + node, mask=node >= 0, other=0)
    bits_out = bits_ptr + out[:, None].to(tl.int64) * num_words + word[None, :]
    tl.store(bits_out, bits, mask=is_row[:, None] & (word < num_words)[None, :])


def order_tree_triton(
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
    # [B] bool
    spine_first: torch.Tensor | None = None,
) -> OrderedTree:
    """`order_tree` in three launches: what one writes for all rows, the next may read."""
    batch, pool_size = pool_scores.shape
    rows, words = 1 + num_nodes, num_words(1 + num_nodes)
    pool_tokens, pool_scores = pool_tokens.contiguous(), pool_scores.contiguous()
    pool_parents = pool_parents.contiguous()
    new_int = pool_parents.new_empty
    chosen, node_of_row = new_int(batch, num_nodes), new_int(batch, num_nodes)
    row_of_node = new_int(batch, pool_size)
    tree = OrderedTree(
        tokens=pool_tokens.new_empty(batch, num_nodes),
        parents=new_int(batch, rows),
        depths=new_int(batch, rows),
        scores=pool_scores.new_empty(batch, rows),
        bits=pool_tokens.new_empty(batch, rows, words),
        spine_len=new_int(batch),
    )
    _choose_kernel[(batch, triton.cdiv(pool_size, 64))](
        pool_scores, chosen, pool_size, num_nodes, BLOCK=64, BLOCK_OTHERS=128
    )
    _arrange_kernel[(batch,)](
        chosen, pool_parents, chosen if spine_first is None else spine_first,
        node_of_row, row_of_node, tree.spine_len, pool_size, num_nodes, min(max_depth, num_nodes),
        SOME_BY_SCORE=spine_first is not None, BLOCK=triton.next_power_of_2(num_nodes),
    )  # fmt: skip
    _emit_kernel[(batch, triton.cdiv(rows, 64))](
        pool_tokens, pool_scores, pool_parents, pool_depths, node_of_row, row_of_node,
        tree.tokens, tree.parents, tree.depths, tree.scores, tree.bits,
        pool_size, num_nodes, words, max_depth,
        BLOCK=64, WORDS=triton.next_power_of_2(words),
    )  # fmt: skip
    return tree


order_tree = dispatched(order_tree_reference, order_tree_triton)
