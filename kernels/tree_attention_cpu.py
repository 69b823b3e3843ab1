"""Tree attention of a verification on a CPU: `tree_attention_reference` in few calls.

A tree has few rows, so a call of torch takes longer than what it computes, and each layer of each step
pays for all of them. What the layers of a step share is therefore made once: buffers that every call
writes into, and the masks. Keys and values in float32 are read where they lie in the cache, block by block.

Shape letters as in `tree_attention`; G query heads of a key head, and M = G * R rows of one.
"""

from dataclasses import dataclass

import torch

from vllm_griffin.kernels.tree_attention import QuantScales, Span, TreeContext


@dataclass(frozen=True)
class Piece:
    """The keys of a request in one block of its cache."""

    block: int
    size: int
    # [H_kv, M, size] each
    scores: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Workspace:
    """Buffers for one request's rows, float32."""

    rows: slice
    # One buffer, as queries come and as they are multiplied: [R, H_kv, G, D], [H_kv, M, D]
    query_rows: torch.Tensor
    queries: torch.Tensor
    pieces: list[Piece]
    # [H_kv, M, prefix + R]
    scores: torch.Tensor
    weights: torch.Tensor
    # The scores of the tail, [H_kv, M, R], and what is added to them, [M, R]
    tail_scores: torch.Tensor
    tail_mask: torch.Tensor
    # One buffer, as it is multiplied and as results go: [H_kv, M, D], [R, H_kv, G, D]
    attended: torch.Tensor
    attended_rows: torch.Tensor

    @classmethod
    def of(
        cls,
        span: Span,
        kv_heads: int,
        group: int,
        head_dim: int,
        block_size: int,
        # [2, at least H_kv * M * (prefix + R)] float32
        scratch: torch.Tensor,
    ) -> "Workspace":
        """For one request; `scratch` is that of all requests, which are attended one after the other."""
        rows, keys = span.mask.shape
        shape = (kv_heads, group * rows, keys)
        first, second = (part[: kv_heads * group * rows * keys] for part in scratch)
        starts = range(0, keys, block_size)
        # Pieces of scores are joined in the other half, and then make room for the weights.
        single = len(starts) == 1
        scores, weights = (first, second) if single else (second, first)
        scores, weights = scores.view(shape), weights.view(shape)
        pieces = []
        for block, start in zip(span.blocks, starts, strict=False):
            end = min(start + block_size, keys)
            number = shape[0] * shape[1]
            part = first[number * start : number * end].view(*shape[:2], end - start)
            pieces.append(Piece(block, end - start, part, weights[..., start:end]))
        queries, attended = scratch.new_empty(2, kv_heads, group * rows, head_dim)
        by_row = (kv_heads, group, rows, head_dim)
        return cls(
            span.rows,
            queries.view(by_row).permute(2, 0, 1, 3),
            queries,
            pieces,
            scores,
            weights,
            scores[..., span.prefix :],
            span.mask[:, span.prefix :].repeat(group, 1),
            attended,
            attended.view(by_row).permute(2, 0, 1, 3),
        )


def workspaces(
    context: TreeContext, kv_heads: int, group: int, head_dim: int, block_size: int
) -> list[Workspace]:
    """Those of all requests with tree rows; the same for all layers of a step that have these sizes."""
    sizes = (kv_heads, group, head_dim, block_size)
    made: dict[tuple[int, ...], list[Workspace]] = context.workspaces
    if sizes not in made:
        most = max((span.mask.numel() for span in context.spans), default=0)
        scratch = torch.empty(2, kv_heads * group * most, dtype=torch.float32)
        made[sizes] = [Workspace.of(span, *sizes, scratch) for span in context.spans]
    return made[sizes]


def tree_attention_cpu(
    # [T, H, D]
    q: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D], any strides
    v_cache: torch.Tensor,
    context: TreeContext,
    scale: float,
    # [T, H, D]
    out: torch.Tensor,
    scales: QuantScales | None = None,
) -> None:
    """`tree_attention_reference` where the tail is cached, so that every row sees a key, itself."""
    assert context.tail_cached, "other tails are the reference's"
    _, kv_heads, block_size, head_dim = k_cache.shape
    group = q.shape[1] // kv_heads
    for space in workspaces(context, kv_heads, group, head_dim, block_size):
        by_row = (-1, kv_heads, group, head_dim)
        space.query_rows.copy_(q[space.rows].view(by_row))
        if scales is not None:
            space.queries.mul_(
                (scales.k if scales.q is None else scales.k * scales.q).view(-1, 1, 1)
            )
        for piece in space.pieces:
            keys = _block(k_cache, piece).mT
            # With `beta=0` a product of batches overwrites what the buffer holds.
            piece.scores.baddbmm_(space.queries, keys, beta=0, alpha=scale)
        if len(space.pieces) > 1:
            torch.cat([piece.scores for piece in space.pieces], -1, out=space.scores)
        space.tail_scores.add_(space.tail_mask)
        torch.softmax(space.scores, -1, out=space.weights)
        for i, piece in enumerate(space.pieces):
            space.attended.baddbmm_(piece.weights, _block(v_cache, piece), beta=min(i, 1))
        if scales is not None:
            space.attended.mul_(scales.v.view(-1, 1, 1))
        out[space.rows].view(by_row).copy_(space.attended_rows)


def _block(cache: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Keys, or values, of a piece: [H_kv, n, D] float32. One view: three cost more than the product."""
    _, kv_heads, _, head_dim = cache.shape
    block, head, token, number = cache.stride()
    return cache.as_strided(
        (kv_heads, piece.size, head_dim),
        (head, token, number),
        cache.storage_offset() + piece.block * block,
    ).float()
