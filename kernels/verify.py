"""Verification of draft trees: follow the target's draws from the root.

The target draws one token at every row of the tree. From the root, walk to the child that equals
the draw at the current node, until no child does; the last draw is the bonus token. The result has
exactly the target's distribution, for any tree, because the draws never depend on the tree.

Shape letters: L rows with logits, B requests of the batch, S request slots, N drafted nodes.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched


class Walk(NamedTuple):
    """Accepted path of each request. Entries past its length are 0."""

    # [B, max_path] int32: rows of the tree, the root (row 0) first
    path: torch.Tensor
    # [B, max_path] int64: the target's draw at each of those rows; the last is the bonus token
    tokens: torch.Tensor
    # [B] int32: length of the path, root included = number of new tokens
    num_accepted: torch.Tensor


def walk_tree_reference(
    # [L] int64
    sampled: torch.Tensor,
    # [B + 1] int32
    cu_num_logits: torch.Tensor,
    # [B] int64
    idx_mapping: torch.Tensor,
    # [S, N] int64
    tokens: torch.Tensor,
    # [S, 1 + N] int32
    parents: torch.Tensor,
    # [S] int32
    num_nodes: torch.Tensor,
    # [S] int32
    spine_len: torch.Tensor,
    # [S] bool
    spine_only: torch.Tensor,
    # [L] bool
    invalid: torch.Tensor | None,
    max_path: int,
) -> Walk:
    """Walk every request's tree along the target's draws.

    Args:
        sampled: The target's draw at every row with logits.
        cu_num_logits: Where each request's rows begin; the first is the root's, and there may be
            fewer than ``1 + N`` (the scheduler trims trees). One row: no tree.
        idx_mapping: Slot of each request.
        tokens, parents: Trees by slot; row ``c`` has token ``tokens[slot, c - 1]``.
        num_nodes: Valid nodes of the slot's tree, 0 = none.
        spine_len, spine_only: Rows ``1 .. spine_len`` are the spine; a ``spine_only`` request
            accepts no other row.
        invalid: Rows that must not be accepted.
        max_path: Longest path, root included.
    """
    slots = idx_mapping.long()
    first = cu_num_logits[:-1].long()
    num_rows = cu_num_logits[1:].long() - first
    rows = torch.arange(1, parents.shape[1], device=sampled.device)
    limit = torch.minimum(num_rows - 1, num_nodes[slots].long())
    limit = torch.where(spine_only[slots], torch.minimum(limit, spine_len[slots].long()), limit)
    open_ = rows <= limit.unsqueeze(1)
    last = len(sampled) - 1
    if invalid is not None:
        open_ &= ~invalid[(first.unsqueeze(1) + rows).clamp(max=last)]
    node_tokens, node_parents = tokens[slots], parents[slots, 1:]

    here = torch.zeros_like(first)
    alive = num_rows > 0
    here_at: list[torch.Tensor] = []
    drawn: list[torch.Tensor] = []
    for _ in range(max_path):
        draw = torch.where(alive, sampled[(first + here).clamp(max=last)], 0)
        here_at.append(here)
        drawn.append(draw)
        matching = open_ & (node_parents == here.unsqueeze(1)) & (node_tokens == draw.unsqueeze(1))
        alive &= matching.any(1)
        here = torch.where(alive, matching.int().argmax(1) + 1, 0)
    path = torch.stack(here_at, dim=1).int()
    return Walk(path, torch.stack(drawn, dim=1), (num_rows > 0).int() + (path > 0).sum(1).int())


@triton.jit
def _walk_kernel(
    # [L]
    sampled_ptr,
    # [B + 1]
    cu_num_logits_ptr,
    # [B]
    idx_mapping_ptr,
    # [S, N]
    tokens_ptr,
    # [S, 1 + N]
    parents_ptr,
    # [S]
    num_nodes_ptr,
    spine_len_ptr,
    spine_only_ptr,
    # [L], not read unless HAS_INVALID
    invalid_ptr,
    # [B, max_path]
    path_ptr,
    out_tokens_ptr,
    # [B]
    num_accepted_ptr,
    tokens_stride,
    parents_stride,
    max_path,
    HAS_INVALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: all rows look at once whether they are the next node of the path."""
    request = tl.program_id(0)
    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    first = tl.load(cu_num_logits_ptr + request)
    num_rows = tl.load(cu_num_logits_ptr + request + 1) - first
    limit = tl.minimum(num_rows - 1, tl.load(num_nodes_ptr + slot))
    spine_only = tl.load(spine_only_ptr + slot) != 0
    limit = tl.where(spine_only, tl.minimum(limit, tl.load(spine_len_ptr + slot)), limit)

    row = 1 + tl.arange(0, BLOCK)
    open_rows = row <= limit
    token = tl.load(tokens_ptr + slot * tokens_stride + row - 1, mask=open_rows, other=-1)
    parent = tl.load(parents_ptr + slot * parents_stride + row, mask=open_rows, other=-1)
    if HAS_INVALID:
        open_rows &= tl.load(invalid_ptr + first + row, mask=open_rows, other=1) == 0

    here = tl.min(row, axis=0) - 1
    alive = num_rows > 0
    length = here
    for step in range(max_path):
        draw = tl.load(sampled_ptr + first + here, mask=alive, other=0)
        tl.store(path_ptr + request * max_path + step, here)
        tl.store(out_tokens_ptr + request * max_path + step, draw)
        length += alive.to(tl.int32)
        matching = open_rows & (parent == here) & (token == draw)
        child = tl.min(tl.where(matching, row, BLOCK + 1), axis=0)
        alive = alive & (child <= BLOCK)
        here = tl.where(alive, child, 0)
    tl.store(num_accepted_ptr + request, length)


def walk_tree_triton(
    # [L] int64
    sampled: torch.Tensor,
    # [B + 1] int32
    cu_num_logits: torch.Tensor,
    # [B] int64
    idx_mapping: torch.Tensor,
    # [S, N] int64
    tokens: torch.Tensor,
    # [S, 1 + N] int32
    parents: torch.Tensor,
    # [S] int32
    num_nodes: torch.Tensor,
    # [S] int32
    spine_len: torch.Tensor,
    # [S] bool
    spine_only: torch.Tensor,
    # [L] bool
    invalid: torch.Tensor | None,
    max_path: int,
) -> Walk:
    """`walk_tree` in one launch."""
    batch = len(cu_num_logits) - 1
    walk = Walk(
        path=cu_num_logits.new_empty(batch, max_path, dtype=torch.int32),
        tokens=sampled.new_empty(batch, max_path),
        num_accepted=cu_num_logits.new_empty(batch, dtype=torch.int32),
    )
    if batch > 0:
        _walk_kernel[(batch,)](
            sampled, cu_num_logits, idx_mapping, tokens, parents, num_nodes, spine_len, spine_only,
            spine_only if invalid is None else invalid, *walk,
            tokens.stride(0), parents.stride(0), max_path,
            HAS_INVALID=invalid is not None, BLOCK=triton.next_power_of_2(tokens.shape[1]),
        )  # fmt: skip
    return walk


walk_tree = dispatched(walk_tree_reference, walk_tree_triton)
