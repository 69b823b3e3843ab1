"""Moves the keys and values of an accepted path to the front of its tree's slots, in place.

    KV[slots[row_start + j]] = KV[slots[row_start + path[j]]]     for 1 <= j < num_accepted

in every layer. A path is strictly increasing, so ``path[j] >= j``: in ascending order no row is read
after it was overwritten.

Shape letters: L layers, T tokens of the batch, B requests, H_kv key heads, D head size.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched

# Rows are copied, not computed with: only their width matters.
COPIED_AS = {1: tl.int8, 2: tl.int16, 4: tl.int32}


@dataclass(frozen=True)
class PagedCaches:
    """Keys and values of layers with one cache layout, any dtype of 1, 2 or 4 bytes.

    Raises:
        ValueError: The layers' caches differ in shape, strides or dtype.
    """

    # L times [num_blocks, H_kv, block_size, D], any strides
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __post_init__(self) -> None:
        for caches in (self.keys, self.values):
            if len({(c.shape, c.stride(), c.dtype) for c in caches}) > 1:
                raise ValueError("layers of one KV cache group differ in their caches' layout")

    @cached_property
    def addresses(self) -> torch.Tensor:
        """Of every layer's keys and values, [2, L] int64."""
        table = [[cache.data_ptr() for cache in caches] for caches in (self.keys, self.values)]
        device = self.keys[0].device
        # Made in a step, which must not wait: the host's copy is pinned.
        host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)


def compact_kv_reference(
    caches: PagedCaches,
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
        caches: Of the layers that share these slots.
        slots: ``block * block_size + offset`` of every row of the batch.
        row_start: Index into ``slots`` of each request's root row.
        path: Accepted rows of the tree, strictly increasing from 0.
        num_accepted: Length of the path, root included; 0 or 1 moves nothing.
    """
    # All is gathered before it is scattered.
    block_size = caches.keys[0].shape[2]
    places = torch.arange(path.shape[1], device=path.device)
    accepted = places < num_accepted.unsqueeze(1)
    root = row_start.long().unsqueeze(1)
    # What is not accepted copies the root onto itself, which no accepted row overwrites.
    source = slots[root + torch.where(accepted, path, 0)].flatten()
    target = slots[root + torch.where(accepted, places, 0)].flatten()
    # A CPU runs this, where reading a tensor costs nothing; and the best children are in place.
    moved = source != target
    if not moved.any():
        return
    source, target = source[moved], target[moved]
    source_block, source_token = source // block_size, source % block_size
    target_block, target_token = target // block_size, target % block_size
    for cache in (*caches.keys, *caches.values):
        cache[target_block, :, target_token] = cache[source_block, :, source_token]


@triton.jit
def _compact_kernel(
    # [2, L]: keys', then values' addresses
    addresses_ptr,
    num_layers,
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
    COPIED_AS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a request, key head and layer: rows move one after the other, in ascending order.

    A thread holds the same elements of every row, so no barrier is needed between the rows.
    """
    request = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    address_ptr = addresses_ptr + tl.program_id(2)
    k_cache_ptr = tl.cast(tl.load(address_ptr), tl.pointer_type(COPIED_AS))
    v_cache_ptr = tl.cast(tl.load(address_ptr + num_layers), tl.pointer_type(COPIED_AS))
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
    caches: PagedCaches,
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
    keys, values = caches.keys[0], caches.values[0]
    _, num_kv_heads, block_size, head_dim = keys.shape
    if len(path) == 0:
        return
    _compact_kernel[(len(path), num_kv_heads, len(caches.keys))](
        caches.addresses, len(caches.keys), slots, row_start, path, num_accepted, path.stride(0),
        *keys.stride(), *values.stride(), block_size, head_dim,
        COPIED_AS=COPIED_AS[keys.itemsize], BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip


compact_kv = dispatched(compact_kv_reference, compact_kv_triton)
