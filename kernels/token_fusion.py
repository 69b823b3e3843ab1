"""The norms and the concatenation of GRIFFIN's token-guided fusion (arXiv 2502.11018, section 4.2).

    out = concat[ norm(norm(a, w_post), w_in), norm(e, w_in) ]
    norm(x, w) = w * round(x / sqrt(mean(x^2) + eps))

``round`` is to the input's dtype, with all before it in float32, as Hugging Face's Llama does. As
in the published code, and unlike the paper, ``a`` is normed twice and both inputs share ``w_in``.

Shape letters: T tokens, h hidden size.
"""

import torch


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
    """`fusion_norms` with torch."""
    fused = _rms_norm(_rms_norm(a, post_weight, eps), input_weight, eps)
    return torch.cat([fused, _rms_norm(e, input_weight, eps)], dim=-1)


def fusion_norms(
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
        a: Output of ``fc.fc``, the fused token embedding and feature.
        e: Token embedding.
        post_weight: ``fc.post_attention_layernorm.weight``.
        input_weight: ``fc.mlp.input_layernorm.weight``, shared by both halves.
        eps: ``rms_norm_eps`` of the config.
    """
    return fusion_norms_reference(a, e, post_weight, input_weight, eps)
