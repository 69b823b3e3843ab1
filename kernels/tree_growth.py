"""Growing a draft tree by one level.

    score[f, k] = frontier score[f] + min(log-probability[f, k], 0)
    next frontier = the ``width`` best candidates by (score descending, index ascending)

A frontier of the best nodes is expanded level by level, then the best of all candidates are
verified (`kernels/tree_order.py`); both know tokens, parents and scores only. A child's
score never exceeds its parent's; NaN counts as -inf. The method is EAGLE-2's (arXiv 2406.16858,
section 4.1).

Shape letters: B requests, F nodes of the frontier, K children per node, W 64-bit words of bits.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched
from vllm_griffin.kernels.packed_bits import one_hot_bits
from vllm_griffin.kernels.tree_order import count_better, nan_to_minus_inf


class AdvancedFrontier(NamedTuple):
    """All candidates of a level, and the best of them as the next frontier."""

    # [B, F * K] float32: score of every candidate, child k of frontier node f at f * K + k
    scores: torch.Tensor
    # [B, width] int64
    tokens: torch.Tensor
    # [B, width] float32, descending
    next_scores: torch.Tensor
    # [B, width] int32: index into the old frontier
    parents: torch.Tensor
    # [B, width] int32: index into the F * K candidates
    picks: torch.Tensor
    # [B, width, W] int64: ancestors and the node itself, as places in the scratch buffer
    bits: torch.Tensor


def advance_frontier_reference(
    # [B, F, K] float32
    child_logprobs: torch.Tensor,
    # [B, F, K] int64
    child_tokens: torch.Tensor,
    # [B, F] float32
    frontier_scores: torch.Tensor,
    # [B, F, W] int64
    frontier_bits: torch.Tensor,
    first_bit: int,
    width: int,
) -> AdvancedFrontier:
    """Score all children of the frontier and keep the ``width`` best as the next frontier.

    ``score = frontier score + min(log-probability, 0)``, NaN becomes -inf; ties go to the lower
    candidate index. The root's level is a frontier of one node with score 0 and no bits.

    Args:
        child_logprobs: Log-probabilities of each frontier node's candidates.
        child_tokens: Their tokens.
        frontier_scores: Cumulative log-probability of the frontier's nodes.
        frontier_bits: Their own and their ancestors' places in the draft scratch buffer.
        first_bit: Place of the next frontier's first node in that buffer.
        width: Size of the next frontier, at most ``F * K``.
    """
    num_children = child_logprobs.shape[2]
    words = frontier_bits.shape[2]
    scores = frontier_scores.unsqueeze(2) + child_logprobs.clamp(max=0.0)
    scores = nan_to_minus_inf(scores).flatten(1)
    picks = scores.argsort(dim=1, descending=True, stable=True)[:, :width]
    parents = picks // num_children
    own = one_hot_bits(torch.arange(first_bit, first_bit + width, device=picks.device), words)
    inherited = frontier_bits.gather(1, parents.unsqueeze(2).expand(-1, -1, words))
    return AdvancedFrontier(
        scores=scores,
        tokens=child_tokens.flatten(1).gather(1, picks),
        next_scores=scores.gather(1, picks),
        parents=parents.int(),
        picks=picks.int(),
        bits=inherited | own,
    )


@triton.jit
def _candidate_scores(logprobs_ptr, frontier_scores_ptr, index, valid, num_children):
    logprobs = tl.load(logprobs_ptr + index, mask=valid, other=float("-inf"))
    frontier = tl.load(frontier_scores_ptr + index // num_children, mask=valid, other=0.0)
    # A comparison with NaN is false, so that NaN survives this and is seen in the sum.
    scores = frontier + tl.where(logprobs > 0.0, 0.0, logprobs)
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit
def _advance_kernel(
    # [B, F * K]
    logprobs_ptr,
    child_tokens_ptr,
    # [B, F]
    frontier_scores_ptr,
    # [B, F, W]
    frontier_bits_ptr,
    # [B, F * K]
    scores_ptr,
    # [B, width]
    tokens_ptr,
    next_scores_ptr,
    parents_ptr,
    picks_ptr,
    # [B, width, W]
    bits_ptr,
    first_bit,
    width,
    frontier_size,
    num_children,
    num_words,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Each candidate counts the better ones; a rank below ``width`` is its place in the result."""
    request = tl.program_id(0)
    size = frontier_size * num_children
    logprobs_ptr += request * size
    frontier_scores_ptr += request * frontier_size
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = index < size
    scores = _candidate_scores(logprobs_ptr, frontier_scores_ptr, index, valid, num_children)
    tl.store(scores_ptr + request * size + index, scores, mask=valid)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        other_scores = _candidate_scores(
            logprobs_ptr, frontier_scores_ptr, others, others < size, num_children
        )
        rank += count_better(scores, index, other_scores, others)

    keep = valid & (rank < width)
    out = request * width + rank
    parent = index // num_children
    token = tl.load(child_tokens_ptr + request * size + index, mask=keep, other=0)
    tl.store(tokens_ptr + out, token, mask=keep)
    tl.store(next_scores_ptr + out, scores, mask=keep)
    tl.store(parents_ptr + out, parent, mask=keep)
    tl.store(picks_ptr + out, index, mask=keep)

    word = tl.arange(0, WORDS)
    mask = keep[:, None] & (word < num_words)[None, :]
    inherited = (request * frontier_size + parent)[:, None] * num_words + word[None, :]
    bits = tl.load(frontier_bits_ptr + inherited, mask=mask, other=0)
    place = first_bit + rank
    bit = tl.full([BLOCK, WORDS], 1, tl.int64) << (place % 64)[:, None].to(tl.int64)
    bits |= tl.where(word[None, :] == (place // 64)[:, None], bit, 0)
    tl.store(bits_ptr + out[:, None] * num_words + word[None, :], bits, mask=mask)


def advance_frontier_triton(
    # [B, F, K] float32
    child_logprobs: torch.Tensor,
    # [B, F, K] int64
    child_tokens: torch.Tensor,
    # [B, F] float32
    frontier_scores: torch.Tensor,
    # [B, F, W] int64
    frontier_bits: torch.Tensor,
    first_bit: int,
    width: int,
) -> AdvancedFrontier:
    """`advance_frontier` in one launch."""
    batch, frontier_size, num_children = child_logprobs.shape
    words = frontier_bits.shape[2]
    size = frontier_size * num_children
    indices = child_tokens.new_empty(2, batch, width, dtype=torch.int32)
    frontier = AdvancedFrontier(
        scores=child_logprobs.new_empty(batch, size),
        tokens=child_tokens.new_empty(batch, width),
        next_scores=child_logprobs.new_empty(batch, width),
        parents=indices[0],
        picks=indices[1],
        bits=frontier_bits.new_empty(batch, width, words),
    )
    _advance_kernel[(batch, triton.cdiv(size, 64))](
        child_logprobs.contiguous(), child_tokens.contiguous(),
        frontier_scores.contiguous(), frontier_bits.contiguous(), *frontier,
        first_bit, width, frontier_size, num_children, words,
        BLOCK=64, BLOCK_OTHERS=128, WORDS=triton.next_power_of_2(words),
    )  # fmt: skip
    return frontier


advance_frontier = dispatched(advance_frontier_reference, advance_frontier_triton)
