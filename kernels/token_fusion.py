"""What lies between the products of GRIFFIN's token-guided fusion (arXiv 2502.11018, section 4.2).

    a = round(token + feature)
    pair = [ norm(norm(a, w_post), w_in), norm(e, w_in) ]
    norm(x, w) = w * round(x / sqrt(mean(x^2) + eps))

``round`` is to the input's dtype, with all before it in float32, as Hugging Face's Llama does. As
in the published code, and unlike the paper, ``a`` is normed twice and both inputs share ``w_in``.
The norms are written where the next product reads them, side by side, so nothing concatenates.

Shape letters: T tokens, h hidden size.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x_float = x.float()
    x_float = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return weight * x_float.to(x.dtype)


class FusionNorms(NamedTuple):
    """Both results of the op."""

    # [T, h], the fused embedding and feature: what the fusion MLP's output is added to
    fused: torch.Tensor
    # [T, 2h], input of the fusion MLP
    pair: torch.Tensor


def fusion_norms_reference(
    # [T, h]
    token: torch.Tensor,
    # [T, h]
    feature: torch.Tensor,
    # [T, h]
    e: torch.Tensor,
    # [h]
    post_weight: torch.Tensor,
    # [h]
    input_weight: torch.Tensor,
    eps: float,
) -> FusionNorms:
    """Sum and norms between the products of ``fc.fc`` and that of ``fc.mlp.up_proj``.

    Args:
        token: The embedding's part of ``fc.fc``, with its bias; rows contiguous.
        feature: The feature's part of ``fc.fc``; rows contiguous.
        e: Token embedding; rows contiguous.
        post_weight: ``fc.post_attention_layernorm.weight``.
        input_weight: ``fc.mlp.input_layernorm.weight``, shared by both halves.
        eps: ``rms_norm_eps`` of the config.
    """
    a = token + feature
    hidden_size = a.shape[1]
    pair = a.new_empty(len(a), 2 * hidden_size)
    pair[:, :hidden_size] = _rms_norm(_rms_norm(a, post_weight, eps), input_weight, eps)
    pair[:, hidden_size:] = _rms_norm(e, input_weight, eps)
    return FusionNorms(a, pair)


@triton.jit
def _rms_norm_block(x, weight, size, eps, dtype: tl.constexpr):
    """One row in float32, with both roundings to ``dtype``; padding must be 0."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    return (weight * x.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _fusion_norms_kernel(
    # [T, h]
    token_ptr,
    feature_ptr,
    e_ptr,
    # [h]
    post_weight_ptr,
    input_weight_ptr,
    # [T, h]
    fused_ptr,
    # [T, 2h]
    pair_ptr,
    token_stride,
    feature_stride,
    e_stride,
    hidden_size,
    eps,
    BLOCK: tl.constexpr,
):
    """One program a token; the whole row stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    dtype: tl.constexpr = pair_ptr.dtype.element_ty
    token = tl.load(token_ptr + row * token_stride + column, mask=mask, other=0.0).to(tl.float32)
    feature = tl.load(feature_ptr + row * feature_stride + column, mask=mask, other=0.0)
    e = tl.load(e_ptr + row * e_stride + column, mask=mask, other=0.0).to(tl.float32)
    post = tl.load(post_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(input_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)

    a = (token + feature.to(tl.float32)).to(dtype)
    tl.store(fused_ptr + row * hidden_size + column, a, mask=mask)
    a = _rms_norm_block(a.to(tl.float32), post, hidden_size, eps, dtype)
    a = _rms_norm_block(a, shared, hidden_size, eps, dtype)
    e = _rms_norm_block(e, shared, hidden_size, eps, dtype)
    pair = pair_ptr + row * 2 * hidden_size + column
    tl.store(pair, a.to(dtype), mask=mask)
    tl.store(pair + hidden_size, e.to(dtype), mask=mask)


def fusion_norms_triton(
    # [T, h]
    token: torch.Tensor,
    # [T, h]
    feature: torch.Tensor,
    # [T, h]
    e: torch.Tensor,
    # [h]
    post_weight: torch.Tensor,
    # [h]
    input_weight: torch.Tensor,
    eps: float,
) -> FusionNorms:
    """`fusion_norms` in one launch."""
    num_tokens, hidden_size = token.shape
    fused = token.new_empty(num_tokens, hidden_size)
    pair = token.new_empty(num_tokens, 2 * hidden_size)
    if num_tokens > 0:
        block = triton.next_power_of_2(hidden_size)
        _fusion_norms_kernel[(num_tokens,)](
            token, feature, e, post_weight, input_weight, fused, pair,
            token.stride(0), feature.stride(0), e.stride(0), hidden_size, eps,
            BLOCK=block, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return FusionNorms(fused, pair)


fusion_norms = dispatched(fusion_norms_reference, fusion_norms_triton)
