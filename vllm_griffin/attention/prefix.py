"""Verification attention whose prefix is FlashAttention's, and when it is used.

Attention of tree rows has two forms. `split`: our kernel attends prefix and tail, the prefix in parts
(`kernels/tree_attention.py`). `prefix`: FlashAttention attends the prefix, unmasked, and our kernel
goes on from there with the tail (`kernels/tree_tail.py`). Which one is faster depends on machine, model
and batch size, so both are timed at start-up; ``VLLM_GRIFFIN_TREE_ATTENTION`` overrides that.
"""

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from vllm_griffin.kernels.packed_bits import num_words
from vllm_griffin.kernels.tree_attention import TreeContext, tree_attention
from vllm_griffin.kernels.tree_tail import tree_tail

ENV = "VLLM_GRIFFIN_TREE_ATTENTION"
FORMS = ("auto", "split", "prefix")
# Of the timed steps. The cache is far larger than what a GPU caches of it, and small beside its memory.
TIMED_CONTEXT = 4096
TIMED_CACHE_BYTES = 1 << 27


def demanded_form() -> str:
    """One of `FORMS`: what ``VLLM_GRIFFIN_TREE_ATTENTION`` says, "auto" if it is not set.

    Raises:
        ValueError: it has a value that is not known.
    """
    form = os.environ.get(ENV) or "auto"
    if form not in FORMS:
        raise ValueError(f"{ENV}={form!r} is not one of {', '.join(FORMS)}")
    return form


def attend_from_prefix(
    flash: Callable[..., Any],
    # [T, H, D]
    q: torch.Tensor,
    # [num_blocks, H_kv, block_size, D]
    k_cache: torch.Tensor,
    # [num_blocks, H_kv, block_size, D]
    v_cache: torch.Tensor,
    context: TreeContext,
    # [B + 1] int32
    query_start: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    # [T, H, D]
    out: torch.Tensor,
) -> None:
    """`tree_attention` of a tail that is cached, its prefix by FlashAttention.

    All rows of a request are queries; the result is taken of its tree rows alone. A request without
    any should have the prefix 0 in `context`, so that nothing is read for it. Neither lengths nor
    numbers of rows are read on the host.

    Args:
        flash: ``flash_attn_varlen_func`` of the version that the layer uses.
        query_start: First row of each request, and the end of the last one's.
        longest_query, longest_key: Bounds of a request's rows and of its prefix.
    """
    k, v = (canonicalize_singleton_dim_strides(x.transpose(1, 2)) for x in (k_cache, v_cache))
    prefix_out, prefix_lse = flash(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=query_start,
        max_seqlen_q=longest_query,
        seqused_k=context.prefix_lens,
        max_seqlen_k=longest_key,
        softmax_scale=scale,
        causal=False,
        # vLLM's may have rows for requests that pad the batch.
        block_table=context.block_table[: len(context.prefix_lens)],
        return_softmax_lse=True,
    )
    tree_tail(q, k_cache, v_cache, context, scale, prefix_out, prefix_lse, out)


@dataclass(frozen=True)
class Shape:
    """Of the tree rows that one layer attends.

    Attributes:
        rows: Rows of a request, 1 + N.
        context: Most tokens of a request.
        batch: Most requests of a step.
        graph_splits: Parts into which FlashAttention may cut a prefix in steps that vLLM captures.
        graph_rows: Most rows of those steps, 0 for none; in larger ones FlashAttention chooses.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    rows: int
    context: int
    batch: int
    graph_splits: int = 0
    graph_rows: int = 0


class FlashAttentionRefusal(Exception):
    """FlashAttention cannot attend these shapes.

    Attributes:
        error: What it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _or_refusal(flash: Callable[..., Any]) -> Callable[..., Any]:
    """FlashAttention, its errors told from those of our kernels."""

    def attend(**arguments: Any) -> Any:
        try:
            return flash(**arguments)
        except torch.OutOfMemoryError:
            raise
        # Versions differ in what they raise.
        except Exception as error:
            raise FlashAttentionRefusal(error) from error

    return attend


@functools.cache
def faster_forms(shape: Shape, fa_version: int, device: torch.device) -> dict[int, bool]:
    """Whether `prefix` is the faster form, by number of requests 1, 4, 16 .. `shape.batch`.

    Synthetic trees of full size behind equal prefixes; called while no graph is being captured.

    Raises:
        FlashAttentionRefusal: there is no form `prefix` of this shape.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    sizes = [1]
    while sizes[-1] * 4 <= shape.batch:
        sizes.append(sizes[-1] * 4)
    found = {}
    for batch in sizes:
        captured = batch * shape.rows <= shape.graph_rows
        splits = shape.graph_splits if captured else 0
        flash = _or_refusal(functools.partial(flash_attention(fa_version), num_splits=splits))
        split, prefix = both_forms(shape, batch, flash, device)
        if device.type == "cuda":
            # Graphs are timed on a stream of their own, which would not wait for these inputs.
            torch.cuda.synchronize(device)
        # Launched one by one, what is short would be timed by how long the host takes to launch it.
        bench = do_bench_cudagraph if captured else do_bench
        found[batch] = bench(prefix, return_mode="median") < bench(split, return_mode="median")
    return found


def both_forms(
    shape: Shape, batch: int, flash: Callable[..., Any], device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The forms `split` and `prefix` of one synthetic step, to be timed."""
    length = max(1, min(shape.context - shape.rows, TIMED_CONTEXT))
    per_request = -(-(length + shape.rows) // shape.block_size)
    width = 2 * shape.kv_heads * shape.block_size * shape.head_dim
    # On a CPU, where nothing is timed, as few as hold two steps.
    fitting = TIMED_CACHE_BYTES // (width * shape.dtype.itemsize)
    blocks = fitting if device.type == "cuda" else min(fitting, 2 * batch * per_request)
    layout = (blocks, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
    cache = torch.randn(layout, dtype=shape.dtype, device=device)
    k_cache, v_cache = cache.split(shape.head_dim, dim=-1)
    # As wide as the engine's, by which our kernel tells into how many parts it splits a prefix; a context
    # shorter than a tree still has one here.
    columns = max(per_request, -(-shape.context // shape.block_size))
    # One call after another reads other blocks, as the layers of a step do. Where even one has no room
    # for all requests, they share blocks.
    calls = max(1, blocks // (batch * per_request))
    order = torch.randperm(blocks, device=device).int()
    order = order.repeat(-(-batch * per_request // blocks))[: calls * batch * per_request]
    tables = torch.zeros(calls, batch, columns, dtype=torch.int32, device=device)
    tables[:, :, :per_request] = order.view(calls, batch, per_request)
    query_start = torch.arange(batch + 1, dtype=torch.int32, device=device) * shape.rows
    starts, words = query_start[:-1], num_words(shape.rows)
    # Both forms read a tail's keys whatever share of them a row sees: here half.
    bits = torch.randint(1 << 62, (batch, shape.rows, words), device=device)
    last = torch.arange(words, device=device) * 64 + 64 > shape.rows
    bits = torch.where(last, bits & ((1 << (shape.rows % 64)) - 1), bits)
    rows, lengths = torch.full_like(starts, shape.rows), torch.full_like(starts, length)
    contexts = [
        TreeContext(table, lengths, starts, rows, starts, bits, tail_cached=True)
        for table in tables
    ]
    of_split, of_prefix = itertools.cycle(contexts), itertools.cycle(contexts)
    q = torch.randn(
        batch * shape.rows, shape.heads, shape.head_dim, dtype=shape.dtype, device=device
    )
    tail = q[:, : shape.kv_heads]
    out, scale = torch.empty_like(q), shape.head_dim**-0.5
    longest = shape.rows, length

    def split() -> None:
        tree_attention(q, k_cache, v_cache, tail, tail, next(of_split), scale, out)

    def prefix() -> None:
        attend_from_prefix(
            flash, q, k_cache, v_cache, next(of_prefix), query_start, *longest, scale, out
        )

    return split, prefix


@functools.cache
def flash_attention(fa_version: int) -> Callable[..., Any]:
    """vLLM's FlashAttention of that version."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return functools.partial(flash_attn_varlen_func, fa_version=fa_version)
