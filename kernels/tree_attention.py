"""Attention of the rows of a draft tree: a paged prefix, and the row's ancestors in a tail.

    out[r] = sum_j softmax_j(scale * q[r] . k[j]) v[j]
    j over  {cached keys 0 .. prefix_len - 1}  +  {tail keys whose bit is set in row r}

The prefix is never masked. The tail is a dense run of keys per request; which of them a row sees
is one packed bit each. Verification in the target has its tail in the cache too, behind the prefix;
a level of the draft tree passes the scratch buffer of the levels so far. Scores and sums are float32;
a row that sees no key at all gives zeros.

A cache of 8-bit floats holds k / k_scale and v / v_scale. Its entries are exact in 16 bits, so the
scales are factors of the scores and of the result, and nothing is rounded that the cache has not.

Shape letters: T query rows of the batch, B requests, R most rows of a request, H query heads,
H_kv key heads, D head size, W 64-bit words of tail bits.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN201, ANN202

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched, interpreted
from vllm_griffin.kernels.packed_bits import unpack_bits

# Splitting a prefix pays from so many keys a part on; more parts cost more to merge than they win.
SPLIT_KEYS = 256
MOST_SPLITS = 32
# Keys of a block.
KEYS = 32
# Bytes of queries and of all stages' keys and values: compiled, at most 84 KiB of that are shared memory
# (`python tests/kernels/compile_kernels.py 90` prints them), of which small GPUs have 99 for a program.
SHARED_MEMORY = 112 * 1024
COMPUTED_AS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class TreeContext:
    """What each request's tree rows attend to: the same for all layers of a step.

    Attributes:
        block_table: Cache blocks of each request.
        prefix_lens: Cached keys that every row of the request sees; may be 0.
        q_start: First row of the request in ``q`` and ``out``.
        num_rows: Rows of the request, at most ``R``; 0 leaves its rows of ``out`` untouched.
        tail_start: First row of the request's tail in ``k_tail`` and ``v_tail``.
        tail_bits: Bit ``j`` of row ``i`` (word ``j // 64``, bit ``j % 64``) set: row ``i`` sees tail
            key ``j``. Keys that no row sees are never read.
        tail_cached: The tail is the request's rows themselves, each of which sees itself. Their keys and
            values follow the prefix in the cache, as those of a verification do, and are read there: so
            a row sees what the cache keeps of them.
    """

    # [B, max_blocks] int32
    block_table: torch.Tensor
    # [B] int32
    prefix_lens: torch.Tensor
    # [B] int32
    q_start: torch.Tensor
    # [B] int32
    num_rows: torch.Tensor
    # [B] int32 or int64
    tail_start: torch.Tensor
    # [B, R, W] int64
    tail_bits: torch.Tensor
    tail_cached: bool = False

    @functools.cached_property
    def workspaces(self) -> dict[tuple[int, ...], list[Any]]:
        """By sizes of a layer: what `tree_attention_cpu` makes once for all layers of a step."""
        return {}

    @functools.cached_property
    def spans(self) -> list["Span"]:
        """The requests with tree rows, read on the host: for the reference, which a CPU runs."""
        visible = unpack_bits(self.tail_bits)
        rows = torch.arange(visible.shape[1], device=visible.device)
        visible &= (rows < self.num_rows.unsqueeze(1)).unsqueeze(2)
        used = visible.any(1)
        tail_lens = (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1)
        numbers = (self.q_start, self.num_rows, self.prefix_lens, self.tail_start, tail_lens)
        spans = []
        tables = self.block_table.tolist()
        for b, (first, n, prefix, tail, length) in enumerate(
            zip(*(x.tolist() for x in numbers), strict=True)
        ):
            if n == 0:
                continue
            seen = visible[b, :n, :length]
            mask = torch.zeros(n, prefix + length, device=visible.device)
            mask[:, prefix:].masked_fill_(~seen, float("-inf"))
            unused, blind = ~used[b, :length, None], ~seen.any(1, keepdim=True)
            spans.append(
                Span(
                    slice(first, first + n),
                    prefix,
                    None if self.tail_cached else slice(tail, tail + length),
                    prefix + length if self.tail_cached else prefix,
                    tables[b],
                    mask,
                    unused if bool(unused.any()) else None,
                    blind if prefix == 0 and bool(blind.any()) else None,
                )
            )
        return spans


@dataclass(frozen=True)
class QuantScales:
    """What a cache of 8-bit floats must be multiplied with; it stays on the device.

    Attributes:
        k, v: Of each key head's cached keys and values.
        q: Of the queries of each key head, if they are 8-bit floats too.
    """

    # [H_kv] float32, any stride
    k: torch.Tensor
    # [H_kv] float32, any stride
    v: torch.Tensor
    # [H_kv] float32, any stride
    q: torch.Tensor | None = None


@dataclass(frozen=True)
class Span:
    """One request of a `TreeContext`, its rows and keys as slices."""

    rows: slice
    prefix: int
    # None: cached, behind the prefix
    tail: slice | None
    cached: int
    # [max_blocks]: of which those of the cached keys are meant
    blocks: list[int]
    # [rows, prefix + tail] float32, added to the scores
    mask: torch.Tensor
    # [tail, 1] bool, None: none. Unseen keys may be uninitialised memory, and 0 * NaN is NaN.
    unused: torch.Tensor | None
    # [rows, 1] bool, None: none. Rows that see no key at all.
    blind: torch.Tensor | None

    def pieces(
        self, cache: torch.Tensor, tail: torch.Tensor, scale: torch.Tensor | None
    ) -> Iterator[torch.Tensor]:
        """Keys, or values, block by block where they lie, then the tail; each [H_kv, n, D] float32."""
        size = cache.shape[2]
        for i in range(-(-self.cached // size)):
            piece = cache[self.blocks[i], :, : self.cached - i * size].float()
            yield piece if scale is None else piece * scale.view(-1, 1, 1)
        if self.tail is not None:
            new = tail[self.tail].transpose(0, 1).float()
            yield new if self.unused is None else new.masked_fill(self.unused, 0.0)


def tree_attention_reference(
    # [T, H, D], last dimension contiguous
    q: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    # [num_tail_rows, H_kv, D], last dimension contiguous
    k_tail: torch.Tensor,
    # [num_tail_rows, H_kv, D], last dimension contiguous
    v_tail: torch.Tensor,
    context: TreeContext,
    scale: float,
    # [T, H, D], last dimension contiguous
    out: torch.Tensor,
    scales: QuantScales | None = None,
) -> None:
    """Write the attention of every request's tree rows into ``out``.

    Args:
        q: Queries of the batch; ``H`` must be a multiple of ``H_kv``.
        k_cache, v_cache: The paged cache. Strides are free (CPU keys are stored transposed).
        k_tail, v_tail: Keys and values that the tail bits speak of; not read if the tail is cached.
        context: Which of them each row sees.
        scale: Factor on the scores, usually ``D ** -0.5``.
        out: Result, written in place; its dtype is that of the activations.
        scales: Of a cache of 8-bit floats (``torch.float8_e4m3fn``, ``torch.float8_e5m2``).
    """
    kv_heads = k_cache.shape[1]
    k_scale, v_scale, q_scale = scale_pointers(scales)
    for span in context.spans:
        # [H_kv, group, rows, D], and with a group's rows below each other
        rows = q[span.rows].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        stacked = rows.flatten(1, 2).float()
        if q_scale is not None:
            stacked = stacked * q_scale.view(-1, 1, 1)
        # Joined as a CPU's cache holds them: keys [H_kv, D, n], values [H_kv, n, D].
        keys = _joined([piece.mT for piece in span.pieces(k_cache, k_tail, k_scale)], -1)
        values = _joined(list(span.pieces(v_cache, v_tail, v_scale)), -2)
        mask = span.mask.repeat(rows.shape[1], 1)
        weights = torch.baddbmm(mask, stacked, keys, alpha=scale).softmax(-1)
        if span.blind is not None:
            weights = weights.masked_fill(span.blind.repeat(rows.shape[1], 1), 0.0)
        attended = weights @ values
        into = out[span.rows].unflatten(1, (kv_heads, -1))
        into.copy_(attended.view(rows.shape).permute(2, 0, 1, 3))


def _joined(pieces: list[torch.Tensor], dim: int) -> torch.Tensor:
    """One piece as it lies, several in one tensor."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


@triton.jit
def load_cached(
    # [BLOCK_D, 1]: of a key head, block 0, token 0
    k_base,
    # [1, BLOCK_D]
    v_base,
    # [BLOCK_N]: of each key
    block,
    # [BLOCK_N]: places in the request's text
    key,
    # [BLOCK_N]: which of them to load, the others are 0
    wanted,
    # [BLOCK_D]
    is_dim,
    k_block_stride,
    k_token_stride,
    v_block_stride,
    v_token_stride,
    BLOCK_SIZE: tl.constexpr,
):
    """Keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D] from the paged cache."""
    block = block.to(tl.int64)
    k_offset = block * k_block_stride + (key % BLOCK_SIZE) * k_token_stride
    v_offset = block * v_block_stride + (key % BLOCK_SIZE) * v_token_stride
    k = tl.load(k_base + k_offset[None, :], mask=is_dim[:, None] & wanted[None, :], other=0.0)
    v = tl.load(v_base + v_offset[:, None], mask=wanted[:, None] & is_dim[None, :], other=0.0)
    return k, v


@triton.jit
def attend_block(
    # [BLOCK_M, BLOCK_D]
    q,
    # [BLOCK_D, BLOCK_N]
    k,
    # [BLOCK_N, BLOCK_D]
    v,
    # [BLOCK_M, BLOCK_N]
    visible,
    scale_log2,
    # [BLOCK_M]: highest score so far, base 2
    top,
    # [BLOCK_M]: sum of the weights so far
    total,
    # [BLOCK_M, BLOCK_D]: weighted sum of the values so far
    acc,
):
    """One step of the online softmax, computed in q's dtype; returns the new (top, total, acc)."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = tl.dot(q, k, input_precision="ieee") * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen no key has the top -inf, and -inf - -inf would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def load_bits(
    # [BLOCK_M]: first word of each row
    bits_ptr,
    start,
    # [BLOCK_M]
    is_row,
    word_stride,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N]: whether a row sees tail keys start .. start + BLOCK_N - 1."""
    # A block of keys lies in one half of a word.
    tl.static_assert(BLOCK_N <= 32)
    word = tl.load(bits_ptr + (start // 64) * word_stride, mask=is_row, other=0)
    half = (word >> (start % 64)).to(tl.int32)
    return ((half[:, None] >> tl.arange(0, BLOCK_N)[None, :]) & 1) != 0


@triton.jit
def _tree_attention_kernel(
    # [T, H, D]
    q_ptr,
    # [num_blocks, H_kv, block_size, D]
    k_cache_ptr,
    v_cache_ptr,
    # [num_tail_rows, H_kv, D]
    k_tail_ptr,
    v_tail_ptr,
    # [B, max_blocks]
    block_table_ptr,
    # [B]
    prefix_lens_ptr,
    q_start_ptr,
    num_rows_ptr,
    tail_start_ptr,
    # [B, R, W]
    tail_bits_ptr,
    # [H_kv], each, or None
    k_scale_ptr,
    v_scale_ptr,
    q_scale_ptr,
    # [T, H, D]; split: [SPLITS, B * R, H, D] float32, a part of the result each
    out_ptr,
    # split: [SPLITS, B * R, H] float32, base-2 logarithm of a part's sum of weights
    weight_ptr,
    scale_log2,
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
    k_tail_token_stride,
    k_tail_head_stride,
    v_tail_token_stride,
    v_tail_head_stride,
    block_table_stride,
    bits_request_stride,
    bits_row_stride,
    bits_word_stride,
    out_split_stride,
    out_row_stride,
    out_head_stride,
    weight_split_stride,
    weight_row_stride,
    k_scale_stride,
    v_scale_stride,
    q_scale_stride,
    max_rows,
    head_dim,
    num_tail_keys,
    BLOCK_SIZE: tl.constexpr,
    TAIL_CACHED: tl.constexpr,
    COMPUTE: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a request, block of rows, key head and split of the prefix.

    The query heads of the key head are rows of the block too, so keys are read once a group. The
    last split, never longer than the others, has the tail as well.
    """
    request = tl.program_id(0)
    kv_head = (tl.program_id(2) // SPLITS).to(tl.int64)
    split = tl.program_id(2) % SPLITS
    num_rows = tl.load(num_rows_ptr + request)
    if tl.program_id(1) * BLOCK_M >= num_rows * GROUP:
        return
    prefix_len = tl.load(prefix_lens_ptr + request)
    tail_start = tl.load(tail_start_ptr + request).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = m // GROUP, kv_head * GROUP + m % GROUP
    is_row = row < num_rows
    d = tl.arange(0, BLOCK_D)
    is_dim = d < head_dim
    token = tl.load(q_start_ptr + request).to(tl.int64) + row
    q_offset = (token * q_token_stride + head * q_head_stride)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=is_row[:, None] & is_dim[None, :], other=0.0).to(COMPUTE)
    if q_scale_ptr is not None:
        scale_log2 *= tl.load(q_scale_ptr + kv_head * q_scale_stride)
    cache_scale_log2 = scale_log2
    if k_scale_ptr is not None:
        cache_scale_log2 *= tl.load(k_scale_ptr + kv_head * k_scale_stride)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_base = k_cache_ptr + kv_head * k_head_stride + d[:, None] * k_dim_stride
    v_base = v_cache_ptr + kv_head * v_head_stride + d[None, :] * v_dim_stride
    table_ptr = block_table_ptr + request * block_table_stride
    blocks_per_split = tl.cdiv(tl.cdiv(prefix_len, BLOCK_N), SPLITS)
    first_key = split * blocks_per_split * BLOCK_N
    end_key = tl.minimum(first_key + blocks_per_split * BLOCK_N, prefix_len)
    key = first_key + tl.arange(0, BLOCK_N)
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end_key, other=0)
    for start in range(first_key, end_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        cached = key < prefix_len
        k, v = load_cached(
            k_base, v_base, block, key, cached, is_dim,
            k_block_stride, k_token_stride, v_block_stride, v_token_stride, BLOCK_SIZE,
        )  # fmt: skip
        # An iteration ahead: loads that wait for a load would not overlap with the products.
        following = key + BLOCK_N
        block = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < end_key, other=0)
        top, total, acc = attend_block(q, k, v, cached[None, :], cache_scale_log2, top, total, acc)
    if v_scale_ptr is not None and not TAIL_CACHED:
        acc *= tl.load(v_scale_ptr + kv_head * v_scale_stride)

    bits_base = tail_bits_ptr + request * bits_request_stride + row * bits_row_stride
    k_tail_base = k_tail_ptr + kv_head * k_tail_head_stride + d[:, None]
    v_tail_base = v_tail_ptr + kv_head * v_tail_head_stride + d[None, :]
    for start in range(0, tl.where(split == SPLITS - 1, num_tail_keys, 0), BLOCK_N):
        visible = load_bits(bits_base, start, is_row, bits_word_stride, BLOCK_N)
        place = start + tl.arange(0, BLOCK_N)
        if TAIL_CACHED:
            key, own = prefix_len + place, place < num_rows
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=own, other=0)
            k, v = load_cached(
                k_base, v_base, block, key, own, is_dim,
                k_block_stride, k_token_stride, v_block_stride, v_token_stride, BLOCK_SIZE,
            )  # fmt: skip
            top, total, acc = attend_block(q, k, v, visible, cache_scale_log2, top, total, acc)
        else:
            # Keys that no row sees may lie out of bounds, or in memory nobody has written.
            seen = tl.max(visible.to(tl.int32), axis=0) > 0
            tail_key = tail_start + place
            k_mask = is_dim[:, None] & seen[None, :]
            v_mask = seen[:, None] & is_dim[None, :]
            k = tl.load(
                k_tail_base + (tail_key * k_tail_token_stride)[None, :], mask=k_mask, other=0.0
            )
            v = tl.load(
                v_tail_base + (tail_key * v_tail_token_stride)[:, None], mask=v_mask, other=0.0
            )
            top, total, acc = attend_block(q, k, v, visible, scale_log2, top, total, acc)
    if v_scale_ptr is not None and TAIL_CACHED:
        acc *= tl.load(v_scale_ptr + kv_head * v_scale_stride)

    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if SPLITS > 1:
        token = request.to(tl.int64) * max_rows + row
        weight = weight_ptr + split * weight_split_stride + token * weight_row_stride + head
        tl.store(weight, top + tl.log2(total), mask=is_row)
    out_ptr += split.to(tl.int64) * out_split_stride
    out_offset = (token * out_row_stride + head * out_head_stride)[:, None] + d[None, :]
    tl.store(out_ptr + out_offset, acc, mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _merge_splits_kernel(
    # [SPLITS, B * R, H, D] float32
    part_ptr,
    # [SPLITS, B * R, H] float32
    weight_ptr,
    # [B]
    q_start_ptr,
    num_rows_ptr,
    # [T, H, D]
    out_ptr,
    num_heads,
    head_dim,
    max_rows,
    total_rows,
    out_token_stride,
    out_head_stride,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a request and block of (row, head): the parts, weighted by their sums of weights."""
    request = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = m // num_heads, m % num_heads
    num_rows = tl.load(num_rows_ptr + request)
    if tl.program_id(1) * BLOCK_M >= num_rows * num_heads:
        return
    is_row = row < num_rows
    d = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (d < head_dim)[None, :]
    place = request.to(tl.int64) * max_rows * num_heads + m
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in range(SPLITS):
        weight = tl.load(weight_ptr + place, mask=is_row, other=float("-inf"))
        part = tl.load(part_ptr + place[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, weight)
        # No key in any split so far: -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        grown, shrink = tl.exp2(weight - base), tl.exp2(top - base)
        total = total * shrink + grown
        acc = acc * shrink[:, None] + part * grown[:, None]
        top = new_top
        place += total_rows * num_heads
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token = tl.load(q_start_ptr + request).to(tl.int64) + row
    out_offset = (token * out_token_stride + head * out_head_stride)[:, None] + d[None, :]
    tl.store(out_ptr + out_offset, acc, mask=mask)


def num_splits(programs: int, max_keys: int, multiprocessors: int) -> int:
    """Into how many parts a prefix is split, so that few multiprocessors idle.

    A function of shapes and machine alone, so that a captured graph holds it.

    Args:
        programs: Programs without a split.
        max_keys: Longest prefix that the block table can hold.
    """
    useful = min(multiprocessors // programs, max_keys // SPLIT_KEYS, MOST_SPLITS)
    # A power of two: the kernel is compiled for each number.
    return 1 << (max(useful, 1).bit_length() - 1)


@dataclass(frozen=True)
class Blocks:
    """How a program's rows, keys and head dimension are cut; and in which dtype it multiplies."""

    m: int
    n: int
    d: int
    compute: tl.dtype
    stages: int

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, most_rows: int) -> "Blocks":
        """For activations of `dtype`; queries may be 8-bit floats that stand for them.

        Args:
            most_rows: Rows of a request and key head, those of all its query heads.
        """
        d = max(16, triton.next_power_of_2(head_dim))
        # Larger accumulators than this spill registers, and take minutes to compile in float32.
        largest = 16384 // (d * dtype.itemsize)
        m = max(16, min(64, largest, triton.next_power_of_2(most_rows)))
        queries, keys_and_values = m * d * dtype.itemsize, 2 * KEYS * d * dtype.itemsize
        return cls(
            m=m,
            n=KEYS,
            d=d,
            # The interpreter multiplies bfloat16 as the integers it keeps them in.
            compute=tl.float32 if interpreted() else COMPUTED_AS[dtype],
            # Three: loads run two blocks ahead of the products.
            stages=max(1, min(3, (SHARED_MEMORY - queries) // keys_and_values)),
        )

    def options(self) -> dict[str, Any]:
        """Of the launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_D": self.d,
            "COMPUTE": self.compute,
            "num_stages": self.stages,
        }


def scale_pointers(scales: QuantScales | None) -> tuple[torch.Tensor | None, ...]:
    """k_scale, v_scale and q_scale as a kernel takes them."""
    return (None, None, None) if scales is None else (scales.k, scales.v, scales.q)


def scale_strides(scales: QuantScales | None) -> tuple[int, ...]:
    """Their strides; 0 for one that is not there."""
    return tuple(0 if x is None else x.stride(0) for x in scale_pointers(scales))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """The interpreter runs one program after the other."""
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def tree_attention_triton(
    # [T, H, D]
    q: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    # [num_tail_rows, H_kv, D]
    k_tail: torch.Tensor,
    # [num_tail_rows, H_kv, D]
    v_tail: torch.Tensor,
    context: TreeContext,
    scale: float,
    # [T, H, D]
    out: torch.Tensor,
    scales: QuantScales | None = None,
    splits: int | None = None,
) -> None:
    """`tree_attention` in one launch, or in two with the prefix in `splits` parts.

    Args:
        splits: None: as `num_splits` says.
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    batch, max_rows, words = context.tail_bits.shape
    group = q.shape[1] // num_kv_heads
    blocks = Blocks.of(out.dtype, head_dim, max_rows * group)
    if batch == 0 or max_rows == 0:
        return
    row_blocks = triton.cdiv(max_rows * group, blocks.m)
    if splits is None:
        max_keys = context.block_table.shape[1] * block_size
        programs = batch * row_blocks * num_kv_heads
        splits = num_splits(programs, max_keys, _multiprocessors(q.device))
    part, weight = out.unsqueeze(0), out
    if splits > 1:
        shape = (splits, batch * max_rows, q.shape[1], head_dim)
        part = torch.empty(shape, dtype=torch.float32, device=q.device)
        weight = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    _tree_attention_kernel[(batch, row_blocks, num_kv_heads * splits)](
        q, k_cache, v_cache, k_tail, v_tail, context.block_table, context.prefix_lens,
        context.q_start, context.num_rows, context.tail_start, context.tail_bits,
        *scale_pointers(scales), part, weight, scale * math.log2(math.e),
        *q.stride()[:2], *k_cache.stride(), *v_cache.stride(),
        *k_tail.stride()[:2], *v_tail.stride()[:2],
        context.block_table.stride(0), *context.tail_bits.stride(), *part.stride()[:3],
        *weight.stride()[:2], *scale_strides(scales), max_rows, head_dim, 64 * words,
        BLOCK_SIZE=block_size, TAIL_CACHED=context.tail_cached, SPLITS=splits, GROUP=group,
        **blocks.options(),
    )  # fmt: skip
    if splits > 1:
        merged = 16
        _merge_splits_kernel[(batch, triton.cdiv(max_rows * q.shape[1], merged))](
            part, weight, context.q_start, context.num_rows, out,
            q.shape[1], head_dim, max_rows, batch * max_rows, *out.stride()[:2],
            SPLITS=splits, BLOCK_M=merged, BLOCK_D=blocks.d,
        )  # fmt: skip


tree_attention = dispatched(tree_attention_reference, tree_attention_triton)
