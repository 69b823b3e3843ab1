"""Moves the keys and values of an accepted path to the front of its tree's slots, in place.

    KV[slots[row_start + j]] = KV[slots[row_start + path[j]]]     for 1 <= j < num_accepted

A path is strictly increasing, so ``path[j] >= j``: in ascending order no row is read after it was
overwritten.

Shape letters: T tokens of the batch, B requests, H_kv key heads, D head size.
"""

import torch


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
    compact_kv_reference(k_cache, v_cache, slots, row_start, path, num_accepted)
