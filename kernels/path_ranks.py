"""How large and how deep each verified tree was, and which sibling the walk took at every depth.

For the metrics, which count on the host: these few numbers are all that it needs to know of a tree.

    nodes  = rows that were verified, the root not counted, be there a tree or not
    depth  = depth of the deepest row that was verified, 0 without a tree
    rank_i = 1 + number of siblings in rows before the accepted node at depth i, 0 past the path

Siblings stand in falling order of score in the rows (see ``tree_order``), so rank 1 is the draft's
best child, and the path is on the spine as long as all its ranks are 1.

Shape letters: B requests of the batch, S request slots, N drafted nodes.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched


def path_ranks_reference(
    # [B, max_path] int32
    path: torch.Tensor,
    # [B + 1] int32
    cu_num_logits: torch.Tensor,
    # [B] int64
    idx_mapping: torch.Tensor,
    # [S, 1 + N] int32
    parents: torch.Tensor,
    # [S, 1 + N] int32
    depths: torch.Tensor,
    # [S] int32
    num_nodes: torch.Tensor,
) -> torch.Tensor:
    """Nodes and depth of each request's verified tree, then the ranks of its accepted nodes.

    Args:
        path: Accepted rows as `walk_tree` gives them, the root first, 0 past the path.
        cu_num_logits: Where each request's rows begin; a tree is verified as far as it has rows.
        idx_mapping: Slot of each request.
        parents, depths: Trees by slot.
        num_nodes: Valid nodes of the slot's tree, 0 = none.

    Returns:
        [B, 1 + max_path] int64: the nodes, the depth, then at 1 + i the rank at depth i.
    """
    slots = idx_mapping.long()
    rows = torch.arange(1, parents.shape[1], device=path.device)
    verified = rows < (cu_num_logits[1:] - cu_num_logits[:-1]).unsqueeze(1)
    verified &= (num_nodes[slots] > 0).unsqueeze(1)
    depth = torch.where(verified, depths[slots, 1:], 0).amax(1, keepdim=True)
    node, parent = path[:, 1:, None], path[:, :-1, None]
    siblings = (parents[slots, 1:].unsqueeze(1) == parent) & (rows <= node)
    nodes = cu_num_logits[1:] - cu_num_logits[:-1] - 1
    return torch.cat([nodes.unsqueeze(1).long(), depth.long(), siblings.sum(2)], dim=1)


@triton.jit
def _path_ranks_kernel(
    # [B, max_path]
    path_ptr,
    # [B + 1]
    cu_num_logits_ptr,
    # [B]
    idx_mapping_ptr,
    # [S, 1 + N]
    parents_ptr,
    depths_ptr,
    # [S]
    num_nodes_ptr,
    # [B, 1 + max_path]
    out_ptr,
    parents_stride,
    depths_stride,
    max_path,
    BLOCK: tl.constexpr,
):
    """One program a request."""
    request = tl.program_id(0)
    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    num_rows = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
    out = out_ptr + request * (1 + max_path)
    tl.store(out, num_rows - 1)
    num_rows = tl.where(tl.load(num_nodes_ptr + slot) > 0, num_rows, 0)
    row = 1 + tl.arange(0, BLOCK)
    verified = row < num_rows
    depth = tl.load(depths_ptr + slot * depths_stride + row, mask=verified, other=0)
    parent = tl.load(parents_ptr + slot * parents_stride + row, mask=verified, other=-1)

    tl.store(out + 1, tl.max(depth, axis=0))
    here = tl.load(path_ptr + request * max_path)
    for step in range(1, max_path):
        node = tl.load(path_ptr + request * max_path + step)
        siblings = (parent == here) & (row <= node)
        tl.store(out + 1 + step, tl.sum(siblings.to(tl.int32), axis=0))
        here = node


def path_ranks_triton(
    # [B, max_path] int32
    path: torch.Tensor,
    # [B + 1] int32
    cu_num_logits: torch.Tensor,
    # [B] int64
    idx_mapping: torch.Tensor,
    # [S, 1 + N] int32
    parents: torch.Tensor,
    # [S, 1 + N] int32
    depths: torch.Tensor,
    # [S] int32
    num_nodes: torch.Tensor,
) -> torch.Tensor:
    """`path_ranks` in one launch."""
    batch, max_path = path.shape
    out = path.new_empty(batch, 1 + max_path, dtype=torch.int64)
    if batch > 0:
        _path_ranks_kernel[(batch,)](
            path, cu_num_logits, idx_mapping, parents, depths, num_nodes, out,
            parents.stride(0), depths.stride(0), max_path,
            BLOCK=triton.next_power_of_2(parents.shape[1] - 1),
        )  # fmt: skip
    return out


path_ranks = dispatched(path_ranks_reference, path_ranks_triton)
