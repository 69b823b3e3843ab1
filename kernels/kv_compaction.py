"""Moves the keys and values of an accepted path to the front of its tree's slots, in place.

    KV[slots[row_start + j]] = KV[slots[row_start + path[j]]]     for 1 <= j < num_accepted

A path is strictly increasing, so ``path[j] >= j``: in ascending order no row is read after it was
overwritten.

Shape letters: T tokens of the batch, B requests, H_kv key heads, D head size.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import use_triton


def compact_kv_reference(
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    # [T] int64
    slots: torch.Tensor,
    # [B] int32
    row_start: torch.Tensor,
    # [B, max_path] int32
    path: torch.Tensor,
    # [B] int32
    num_accepted: torch.Tensor,
) -> None:
    """`compact_kv` with torch: gather all, then scatter."""
    block_size = k_cache.shape[2]
    places = torch.arange(path.shape[1], device=path.device)
    accepted = places < num_accepted.unsqueeze(1)
    root = row_start.long().unsqueeze(1)
    # Shapes must not depend on values: what is not accepted copies the root onto itself, which no
    # accepted row overwrites.
    source = slots[root + torch.where(accepted, path, 0)].flatten()
    target = slots[root + torch.where(accepted, places, 0)].flatten()
    for cache in (k_cache, v_cache):
        rows = cache[source // block_size, :, source % block_size]
        cache[target // block_size, :, target % block_size] = rows


@triton.jit
def _compact_kernel(
    # [num_blocks, H_kv, block_size, D]
    k_cache_ptr,
    v_cache_ptr,
    # [T]
    slots_ptr,
    # [B]
    row_start_ptr,
    # [B, max_path]
    path_ptr,
    # [B]
    num_accepted_ptr,
    path_stride,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    k_dim_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    v_dim_stride,
    block_size,
    head_dim,
    BLOCK_D: tl.constexpr,
):
    """One program a request and key head: rows move one after the other, in ascending order.

    A thread holds the same elements of every row, so no barrier is needed between the rows.
    """
    request = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    mask = dim < head_dim
    k_ptr = k_cache_ptr + head * k_head_stride + dim * k_dim_stride
    v_ptr = v_cache_ptr + head * v_head_stride + dim * v_dim_stride
    row_start = tl.load(row_start_ptr + request)
    num_accepted = tl.load(num_accepted_ptr + request)
    for j in range(1, num_accepted):
        row = tl.load(path_ptr + request * path_stride + j)
        source = tl.load(slots_ptr + row_start + row)
        target = tl.load(slots_ptr + row_start + j)
        source_block, source_token = source // block_size, source % block_size
        target_block, target_token = target // block_size, target % block_size
        k = tl.load(
            k_ptr + source_block * k_block_stride + source_token * k_token_stride, mask=mask
        )
        v = tl.load(
            v_ptr + source_block * v_block_stride + source_token * v_token_stride, mask=mask
        )
        tl.store(
            k_ptr + target_block * k_block_stride + target_token * k_token_stride, k, mask=mask
        )
        tl.store(
            v_ptr + target_block * v_block_stride + target_token * v_token_stride, v, mask=mask
        )


def compact_kv_triton(
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    # [T] int64
    slots: torch.Tensor,
    # [B] int32
    row_start: torch.Tensor,
    # [B, max_path] int32
    path: torch.Tensor,
    # [B] int32
    num_accepted: torch.Tensor,
) -> None:
    """`compact_kv` in one launch."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    if len(path) == 0:
        return
    _compact_kernel[(len(path), num_kv_heads)](
        k_cache, v_cache, slots, row_start, path, num_accepted, path.stride(0),
        *k_cache.stride(), *v_cache.stride(), block_size, head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip


def compact_kv(
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    # [T] int64
    slots: torch.Tensor,
    # [B] int32
    row_start: torch.Tensor,
    # [B, max_path] int32
    path: torch.Tensor,
    # [B] int32
    num_accepted: torch.Tensor,
) -> None:
    """Move the accepted path of every request to the front of its rows.

    Args:
        k_cache, v_cache: One layer's paged cache, any dtype.
        slots: ``block * block_size + offset`` of every row of the batch.
        row_start: Index into ``slots`` of each request's root row.
        path: Accepted rows of the tree, strictly increasing from 0.
        num_accepted: Length of the path, root included; 0 or 1 moves nothing.
    """
    op = compact_kv_triton if use_triton(k_cache.device) else compact_kv_reference
    op(k_cache, v_cache, slots, row_start, path, num_accepted)
