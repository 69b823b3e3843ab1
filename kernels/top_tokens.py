"""The likeliest tokens of a row of logits, and their log-probabilities.

    logprob[r, j] = logits[r, token[r, j]] - log(sum_v exp(logits[r, v])),  descending in j

Each level of a draft tree asks this of a whole vocabulary. Which of equal logits come first is left open;
a row that holds NaN gives NaN, at tokens of the vocabulary.

Shape letters: R rows, V vocabulary, K tokens wanted, P parts of a vocabulary.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched

# Logits of one program: 16 a thread, which it keeps in registers.
PART = 2048
# Below all keys of logits.
LOWEST = tl.constexpr(-0x8000000000000000)


def top_tokens_reference(
    # [R, V] of any float type, rows contiguous
    logits: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` best tokens of each row.

    Args:
        logits: Of the whole vocabulary, or of the part that is drafted from.
        k: At most ``V``.

    Returns:
        Log-probabilities [R, K] float32, tokens [R, K] int64.
    """
    logits = logits.float()
    best = logits.topk(k, dim=-1)
    return best.values - logits.logsumexp(dim=-1, keepdim=True), best.indices


@triton.jit
def _sortable(x, index):
    """Integers in the order of float32 `x`, of equal ones the lower index above; no two are equal."""
    bits = x.to(tl.int32, bitcast=True)
    # Of negative numbers a larger pattern is the smaller number.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def _finite(highest):
    """What exponentials are taken below: the difference of two infinities would be NaN."""
    return tl.where(tl.abs(highest) == float("inf"), 0.0, highest)


@triton.jit
def _top_of_part_kernel(
    # [R, V]
    logits_ptr,
    # [R, P, K]
    keys_ptr,
    # [R, P]
    highest_ptr,
    sum_ptr,
    row_stride,
    vocabulary,
    k,
    PART: tl.constexpr,
):
    """The k best of a part, best first, its highest logit, and the sum of exponentials below that."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * PART + tl.arange(0, PART)
    valid = index < vocabulary
    x = tl.load(logits_ptr + row * row_stride + index, mask=valid, other=float("-inf"))
    x = x.to(tl.float32)
    out = row * tl.num_programs(1) + part
    highest = tl.max(x, axis=0)
    tl.store(highest_ptr + out, highest)
    tl.store(sum_ptr + out, tl.sum(tl.exp(x - _finite(highest)), axis=0))

    keys = tl.where(valid, _sortable(x, index), LOWEST)
    for j in range(k):
        best = tl.max(keys, axis=0)
        tl.store(keys_ptr + out * k + j, best)
        keys = tl.where(keys == best, LOWEST, keys)


@triton.jit
def _join_parts_kernel(
    # [R, P, K]
    keys_ptr,
    # [R, P]
    highest_ptr,
    sum_ptr,
    # [R, K]
    logprobs_ptr,
    tokens_ptr,
    num_parts,
    k,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The k best of all parts of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    here = row * num_parts + part
    highest = tl.load(highest_ptr + here, mask=part < num_parts, other=float("-inf"))
    sums = tl.load(sum_ptr + here, mask=part < num_parts, other=0.0)
    top = _finite(tl.max(highest, axis=0))
    # A part of -inf alone, or none, has a sum of 0, and its factor must not be infinite.
    total = top + tl.log(tl.sum(sums * tl.exp(tl.minimum(_finite(highest) - top, 0.0)), axis=0))

    place = tl.arange(0, KEYS)
    keys = tl.load(keys_ptr + row * num_parts * k + place, mask=place < num_parts * k, other=LOWEST)
    for j in range(k):
        best = tl.max(keys, axis=0)
        tl.store(logprobs_ptr + row * k + j, _value_of(best) - total)
        tl.store(tokens_ptr + row * k + j, _index_of(best))
        keys = tl.where(keys == best, LOWEST, keys)


def top_tokens_triton(
    # [R, V] of any float type, rows contiguous
    logits: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_tokens` in two launches; of equal logits the lower token comes first."""
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, PART)
    logprobs = logits.new_empty(rows, k, dtype=torch.float32)
    tokens = logits.new_empty(rows, k, dtype=torch.int64)
    if rows == 0:
        return logprobs, tokens
    keys = tokens.new_empty(rows, parts, k)
    highest, sums = logprobs.new_empty(2, rows, parts)
    _top_of_part_kernel[(rows, parts)](
        logits, keys, highest, sums, logits.stride(0), vocabulary, k, PART=PART
    )
    block = triton.next_power_of_2(parts * k)
    _join_parts_kernel[(rows,)](
        keys, highest, sums, logprobs, tokens, parts, k,
        KEYS=block, PARTS=triton.next_power_of_2(parts), num_warps=min(max(block // 512, 4), 16),
    )  # fmt: skip
    return logprobs, tokens


top_tokens = dispatched(top_tokens_reference, top_tokens_triton)
