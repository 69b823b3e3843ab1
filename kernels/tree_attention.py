"""Attention of the rows of a draft tree: a paged prefix, and the row's ancestors in a tail.

    out[r] = sum_j softmax_j(scale * q[r] . k[j]) v[j]
    j over  {cached keys 0 .. prefix_len - 1}  +  {tail keys whose bit is set in row r}

The prefix is never masked. The tail is a dense run of keys per request; which of them a row sees
is one packed bit each. Verification in the target passes the keys of the scheduled rows themselves
as the tail, a level of the draft tree passes the scratch buffer of the levels so far. Scores and
sums are float32; a row that sees no key at all gives zeros.

Shape letters: T query rows of the batch, B requests, R most rows of a request, H query heads,
H_kv key heads, D head size, W 64-bit words of tail bits.
"""

import torch


def unpack_bits(
    # [..., W] int64
    bits: torch.Tensor,
) -> torch.Tensor:
    """Packed bits as booleans ``[..., 64 * W]``: ``j`` is bit ``j % 64`` of word ``j // 64``."""
    shifts = torch.arange(64, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def tree_attention_reference(
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
    # [B, max_blocks] int32
    block_table: torch.Tensor,
    # [B] int32
    prefix_lens: torch.Tensor,
    # [B] int32
    q_start: torch.Tensor,
    # [B] int32
    num_rows: torch.Tensor,
    # [B] int32 or int64
    tail_start: torch.Tensor,
    # [B, R, W] int64
    tail_bits: torch.Tensor,
    scale: float,
    # [T, H, D]
    out: torch.Tensor,
) -> None:
    """The formula above with torch, request by request; arguments as in `tree_attention`."""
    block_size = k_cache.shape[2]
    visible = unpack_bits(tail_bits)
    rows = torch.arange(visible.shape[1], device=visible.device)
    visible &= (rows < num_rows.unsqueeze(1)).unsqueeze(2)
    used = visible.any(1)
    places = torch.arange(1, used.shape[1] + 1, device=used.device)
    tail_lens = (used * places).amax(1)

    sizes = (q_start, num_rows, prefix_lens, tail_start, tail_lens)
    for b, (first, n, prefix, tail, tail_len) in enumerate(
        zip(*(s.tolist() for s in sizes), strict=True)
    ):
        if n == 0:
            continue
        blocks = block_table[b, : -(-prefix // block_size)]
        k_prefix = _gather_blocks(k_cache, blocks)[:, :prefix]
        v_prefix = _gather_blocks(v_cache, blocks)[:, :prefix]
        seen = used[b, :tail_len, None]
        # Unseen keys may be uninitialised memory, and 0 * NaN is NaN.
        k_new = k_tail[tail : tail + tail_len].transpose(0, 1).float()
        v_new = v_tail[tail : tail + tail_len].transpose(0, 1).float().masked_fill(~seen, 0.0)
        out[first : first + n] = _attend(
            q[first : first + n], k_prefix, v_prefix, k_new, v_new, visible[b, :n, :tail_len], scale
        )


def _gather_blocks(
    # [num_blocks, H_kv, block_size, D]
    cache: torch.Tensor,
    # [n]
    blocks: torch.Tensor,
) -> torch.Tensor:
    """The keys or values of ``blocks`` in order, float32 ``[H_kv, n * block_size, D]``."""
    return cache[blocks].transpose(0, 1).flatten(1, 2).float()


def _attend(
    # [n, H, D]
    q: torch.Tensor,
    # [H_kv, prefix, D]
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    # [H_kv, tail, D]
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    # [n, tail] bool
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one request, ``[n, H, D]`` float32."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, prefix, _ = k_prefix.shape
    group = num_heads // num_kv_heads
    # The query heads of a key head become rows of one matrix: keys are read once per group.
    rows = q.float().view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(num_kv_heads, group * num_rows, head_dim) * scale
    hidden = ~visible.repeat(group, 1)
    tail_scores = (rows @ k_new.mT).masked_fill_(hidden, float("-inf"))
    weights = torch.cat([rows @ k_prefix.mT, tail_scores], dim=-1).softmax(-1)
    if prefix == 0:
        weights.masked_fill_(hidden.all(-1, keepdim=True), 0.0)
    values = weights[..., :prefix] @ v_prefix + weights[..., prefix:] @ v_new
    values = values.view(num_kv_heads, group, num_rows, head_dim).permute(2, 0, 1, 3)
    return values.reshape(num_rows, num_heads, head_dim)


def tree_attention(
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
    # [B, max_blocks] int32
    block_table: torch.Tensor,
    # [B] int32
    prefix_lens: torch.Tensor,
    # [B] int32
    q_start: torch.Tensor,
    # [B] int32
    num_rows: torch.Tensor,
    # [B] int32 or int64
    tail_start: torch.Tensor,
    # [B, R, W] int64
    tail_bits: torch.Tensor,
    scale: float,
    # [T, H, D], last dimension contiguous
    out: torch.Tensor,
) -> None:
    """Write the attention of every request's tree rows into ``out``.

    Args:
        q: Queries of the batch; ``H`` must be a multiple of ``H_kv``.
        k_cache, v_cache: The paged cache. Strides are free (CPU keys are stored transposed).
        k_tail, v_tail: Keys and values that the tail bits speak of.
        block_table: Cache blocks of each request.
        prefix_lens: Cached keys that every row of the request sees; may be 0.
        q_start: First row of the request in ``q`` and ``out``.
        num_rows: Rows of the request, at most ``R``; 0 leaves its rows of ``out`` untouched.
        tail_start: First row of the request's tail in ``k_tail`` and ``v_tail``.
        tail_bits: Bit ``j`` of row ``i`` (word ``j // 64``, bit ``j % 64``) set: row ``i`` sees
            tail key ``j``. Keys that no row sees are never read.
        scale: Factor on the scores, usually ``D ** -0.5``.
        out: Result, written in place.
    """
    tree_attention_reference(
        q, k_cache, v_cache, k_tail, v_tail, block_table, prefix_lens,
        q_start, num_rows, tail_start, tail_bits, scale, out,
    )  # fmt: skip
