"""Attention of draft trees that goes on from another kernel's attention to the prefix.

    out[r] = ( exp(lse[r]) prefix_out[r] + sum_j exp(scale * q[r] . k[j]) v[j] )
             / ( exp(lse[r])             + sum_j exp(scale * q[r] . k[j])      )
    j over the tail keys whose bit is set in row r

The prefix counts as one key with the score `lse` and the value `prefix_out`: so the online softmax
starts there, and nothing is left to merge. The tail lies behind the prefix in the cache. A row
without prefix takes the tail alone, whatever the other kernel has written for it.

Shape letters as in `tree_attention`: T query rows of the batch, B requests, H query heads, H_kv key
heads, D head size.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

import math

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched
from vllm_griffin.kernels.tree_attention import (
    Blocks,
    QuantScales,
    Span,
    TreeContext,
    attend_block,
    load_bits,
    load_cached,
    scale_pointers,
    scale_strides,
)


def tree_tail_reference(
    # [T, H, D], last dimension contiguous
    q: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    context: TreeContext,
    scale: float,
    # [T, H, D], last dimension contiguous
    prefix_out: torch.Tensor,
    # [H, T] float32
    prefix_lse: torch.Tensor,
    # [T, H, D], last dimension contiguous
    out: torch.Tensor,
    scales: QuantScales | None = None,
) -> None:
    """Write the attention of every request's tree rows into ``out``, from that to their prefix.

    Args:
        q: Queries of the batch; ``H`` must be a multiple of ``H_kv``.
        k_cache, v_cache: The paged cache, which holds the tails too (``context.tail_cached``).
        context: Prefixes, and which tail keys each row sees.
        scale: Factor on the scores, usually ``D ** -0.5``.
        prefix_out: Attention of each tree row to its request's prefix alone; may be ``out``.
        prefix_lse: Natural logarithm of that row's sum of exp(score), as FlashAttention returns it.
        out: Result, written in place; its dtype is that of the activations.
        scales: Of a cache of 8-bit floats.
    """
    group = q.shape[1] // k_cache.shape[1]
    k_scale, v_scale, q_scale = (
        None if x is None else x.repeat_interleave(group).view(-1, 1, 1)
        for x in scale_pointers(scales)
    )
    for span in context.spans:
        keys, values = _tail(k_cache, span, group, k_scale), _tail(v_cache, span, group, v_scale)
        rows = q[span.rows].float().transpose(0, 1)
        rows = rows if q_scale is None else rows * q_scale
        scores = rows @ keys.mT * scale + span.mask[:, span.prefix :]
        before, lse = prefix_out[span.rows].float().transpose(0, 1), prefix_lse[:, span.rows]
        if span.prefix == 0:
            before, lse = torch.zeros_like(before), torch.full_like(lse, float("-inf"))
        weights = torch.cat([lse[..., None], scores], -1).softmax(-1)
        if span.blind is not None:
            weights = weights.masked_fill(span.blind, 0.0)
        attended = weights[..., :1] * before + weights[..., 1:] @ values
        out[span.rows] = attended.transpose(0, 1).to(out.dtype)


def _tail(
    cache: torch.Tensor,
    span: Span,
    group: int,
    # [H, 1, 1]
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Keys, or values, of a request's tail: [H, tail, D] float32."""
    size = cache.shape[2]
    places = torch.arange(span.prefix, span.cached, device=cache.device)
    blocks = torch.tensor(span.blocks, device=cache.device)[places // size]
    found = cache[blocks, :, places % size].float().repeat_interleave(group, 1).transpose(0, 1)
    found = found if scale is None else found * scale
    return found if span.unused is None else found.masked_fill(span.unused, 0.0)


@triton.jit
def _tree_tail_kernel(
    # [T, H, D]
    q_ptr,
    # [num_blocks, H_kv, block_size, D]
    k_cache_ptr,
    v_cache_ptr,
    # [T, H, D]
    prefix_out_ptr,
    # [H, T] float32, natural logarithm
    prefix_lse_ptr,
    # [B, max_blocks]
    block_table_ptr,
    # [B]
    prefix_lens_ptr,
    q_start_ptr,
    num_rows_ptr,
    # [B, R, W]
    tail_bits_ptr,
    # [H_kv], each, or None
    k_scale_ptr,
    v_scale_ptr,
    q_scale_ptr,
    # [T, H, D]
    out_ptr,
    scale_log2,
    log2_e,
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    k_dim_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    v_dim_stride,
    prefix_token_stride,
    prefix_head_stride,
    lse_head_stride,
    lse_token_stride,
    block_table_stride,
    bits_request_stride,
    bits_row_stride,
    bits_word_stride,
    out_token_stride,
    out_head_stride,
    k_scale_stride,
    v_scale_stride,
    q_scale_stride,
    head_dim,
    num_tail_keys,
    BLOCK_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a request, block of (row, query head of the key head) and key head."""
    request = tl.program_id(0)
    kv_head = tl.program_id(2).to(tl.int64)
    num_rows = tl.load(num_rows_ptr + request)
    if tl.program_id(1) * BLOCK_M >= num_rows * GROUP:
        return
    prefix_len = tl.load(prefix_lens_ptr + request)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = m // GROUP, kv_head * GROUP + m % GROUP
    is_row = row < num_rows
    d = tl.arange(0, BLOCK_D)
    is_dim = d < head_dim
    mask = is_row[:, None] & is_dim[None, :]
    token = tl.load(q_start_ptr + request).to(tl.int64) + row
    q_offset = (token * q_token_stride + head * q_head_stride)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=mask, other=0.0).to(COMPUTE)
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head * k_scale_stride)
    if q_scale_ptr is not None:
        scale_log2 *= tl.load(q_scale_ptr + kv_head * q_scale_stride)
    value_scale = 1.0
    if v_scale_ptr is not None:
        value_scale = tl.load(v_scale_ptr + kv_head * v_scale_stride)

    # Without prefix the other kernel may have left anything, NaN included.
    known = row < tl.where(prefix_len > 0, num_rows, 0)
    lse_offset = head * lse_head_stride + token * lse_token_stride
    lse = tl.load(prefix_lse_ptr + lse_offset, mask=known, other=float("-inf"))
    top = lse * log2_e
    total = tl.where(known, 1.0, 0.0)
    prefix_offset = (token * prefix_token_stride + head * prefix_head_stride)[:, None] + d[None, :]
    acc = tl.load(prefix_out_ptr + prefix_offset, mask=mask & known[:, None], other=0.0)
    acc = acc.to(tl.float32) / value_scale

    k_base = k_cache_ptr + kv_head * k_head_stride + d[:, None] * k_dim_stride
    v_base = v_cache_ptr + kv_head * v_head_stride + d[None, :] * v_dim_stride
    table_ptr = block_table_ptr + request * block_table_stride
    bits_base = tail_bits_ptr + request * bits_request_stride + row * bits_row_stride
    for start in range(0, num_tail_keys, BLOCK_N):
        visible = load_bits(bits_base, start, is_row, bits_word_stride, BLOCK_N)
        place = start + tl.arange(0, BLOCK_N)
        key, own = prefix_len + place, place < num_rows
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=own, other=0)
        k, v = load_cached(
            k_base, v_base, block, key, own, is_dim,
            k_block_stride, k_token_stride, v_block_stride, v_token_stride, BLOCK_SIZE,
        )  # fmt: skip
        top, total, acc = attend_block(q, k, v, visible, scale_log2, top, total, acc)
    acc = acc * value_scale / tl.where(total == 0.0, 1.0, total)[:, None]
    out_offset = (token * out_token_stride + head * out_head_stride)[:, None] + d[None, :]
    tl.store(out_ptr + out_offset, acc, mask=mask)


def tree_tail_triton(
    # [T, H, D]
    q: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    context: TreeContext,
    scale: float,
    # [T, H, D]
    prefix_out: torch.Tensor,
    # [H, T] float32
    prefix_lse: torch.Tensor,
    # [T, H, D]
    out: torch.Tensor,
    scales: QuantScales | None = None,
) -> None:
    """`tree_tail` in one launch."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    batch, max_rows, words = context.tail_bits.shape
    group = q.shape[1] // num_kv_heads
    if batch == 0 or max_rows == 0:
        return
    blocks = Blocks.of(out.dtype, head_dim, max_rows * group)
    _tree_tail_kernel[(batch, triton.cdiv(max_rows * group, blocks.m), num_kv_heads)](
        q, k_cache, v_cache, prefix_out, prefix_lse, context.block_table, context.prefix_lens,
        context.q_start, context.num_rows, context.tail_bits, *scale_pointers(scales), out,
        scale * math.log2(math.e), math.log2(math.e),
        *q.stride()[:2], *k_cache.stride(), *v_cache.stride(), *prefix_out.stride()[:2],
        *prefix_lse.stride(), context.block_table.stride(0), *context.tail_bits.stride(),
        *out.stride()[:2], *scale_strides(scales), head_dim, 64 * words,
        BLOCK_SIZE=block_size, GROUP=group, **blocks.options(),
    )  # fmt: skip


tree_tail = dispatched(tree_tail_reference, tree_tail_triton)
