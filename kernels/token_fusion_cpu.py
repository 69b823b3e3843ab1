"""What lies between the products of token-guided fusion, on a CPU: `fusion_norms_reference` in few calls."""

import torch
from vllm import _custom_ops as ops

from vllm_griffin.kernels.token_fusion import FusionNorms


def fusion_norms_cpu(
    # [T, h], contiguous, overwritten
    token: torch.Tensor,
    # [T, h], contiguous, overwritten
    feature: torch.Tensor,
    # [T, h]
    e: torch.Tensor,
    # [h]
    post_weight: torch.Tensor,
    # [h]
    input_weight: torch.Tensor,
    eps: float,
) -> FusionNorms:
    """`fusion_norms` by vLLM's kernels; in 16 bits a norm is rounded once only, after its weight."""
    ops.fused_add_rms_norm(token, feature, post_weight, eps)
    # One norm serves both halves of a row, so a row is normed as two.
    pair = torch.stack([token, e], 1)
    ops.rms_norm(pair, pair, input_weight, eps)
    return FusionNorms(feature, pair.flatten(1))
