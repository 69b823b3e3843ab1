"""The norms and the concatenation of GRIFFIN's token-guided fusion (arXiv 2502.11018, section 4.2).

    out = concat[ norm(norm(a, w_post), w_in), norm(e, w_in) ]
    norm(x, w) = w * round(x / sqrt(mean(x^2) + eps))

``round`` is to the input's dtype, with all before it in float32, as Hugging Face's Llama does. As
in the published code, and unlike the paper, ``a`` is normed twice and both inputs share ``w_in``.

Shape letters: T tokens, h hidden size.
"""

# A Triton kernel annotates its constexpr arguments only.
# ruff: noqa: ANN001, ANN202

import torch
import triton
import triton.language as tl

from vllm_griffin.kernels.backend import dispatched


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x_float = x.float()
    x_float = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return weight * x_float.to(x.dtype)


def fusion_norms_reference(
    # [T, h]
    a: torch.Tensor,
    # [T, h]
    e: torch.Tensor,
    # [h]
    post_weight: torch.Tensor,
    # [h]
    input_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Input ``[T, 2h]`` of the fusion MLP.

    Args:
        a: Output of ``fc.fc``, the fused token embedding and feature; rows contiguous.
        e: Token embedding; rows contiguous.
        post_weight: ``fc.post_attention_layernorm.weight``.
        input_weight: ``fc.mlp.input_layernorm.weight``, shared by both halves.
        eps: ``rms_norm_eps`` of the config.
    """
    fused = _rms_norm(_rms_norm(a, post_weight, eps), input_weight, eps)
    return torch.cat([fused, _rms_norm(e, input_weight, eps)], dim=-1)


@triton.jit
def _rms_norm_block(x, weight, size, eps, dtype: tl.constexpr):
    """One row in float32, with both roundings to ``dtype``; padding must be 0."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    return (weight * x.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _fusion_norms_kernel(
    # [T, h]
    a_ptr,
    e_ptr,
    # [h]
    post_weight_ptr,
    input_weight_ptr,
    # [T, 2h]
    out_ptr,
    a_stride,
    e_stride,
    hidden_size,
    eps,
    BLOCK: tl.constexpr,
):
    """One program a token; the whole row stays in registers."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    a = tl.load(a_ptr + token * a_stride + column, mask=mask, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + token * e_stride + column, mask=mask, other=0.0).to(tl.float32)
    post = tl.load(post_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(input_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)

    a = _rms_norm_block(a, post, hidden_size, eps, dtype)
    a = _rms_norm_block(a, shared, hidden_size, eps, dtype)
    e = _rms_norm_block(e, shared, hidden_size, eps, dtype)
    out = out_ptr + token * 2 * hidden_size + column
    tl.store(out, a.to(dtype), mask=mask)
    tl.store(out + hidden_size, e.to(dtype), mask=mask)


def fusion_norms_triton(
    # [T, h]
    a: torch.Tensor,
    # [T, h]
    e: torch.Tensor,
    # [h]
    post_weight: torch.Tensor,
    # [h]
    input_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`fusion_norms` in one launch."""
    num_tokens, hidden_size = a.shape
    out = a.new_empty(num_tokens, 2 * hidden_size)
    if num_tokens == 0:
        return out
    block = triton.next_power_of_2(hidden_size)
    _fusion_norms_kernel[(num_tokens,)](
        a, e, post_weight, input_weight, out, a.stride(0), e.stride(0), hidden_size, eps,
        BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out


fusion_norms = dispatched(fusion_norms_reference, fusion_norms_triton)
