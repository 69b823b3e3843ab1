"""Twins of the kernels that shape logits before a token is drawn."""

import torch


def apply_temperature(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    temperature: torch.Tensor,  # [max_num_reqs]
) -> None:
    """Divides each row by its request's temperature, in place; greedy rows stay."""
    divisor = temperature[expanded_idx_mapping].float()
    logits.div_(divisor.masked_fill(divisor == 0.0, 1.0)[:, None])


def apply_min_p(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    min_p: torch.Tensor,  # [max_num_reqs]
) -> None:
    """Masks, in place, tokens less likely than ``min_p`` times the row's most likely one."""
    # log(0) = -inf masks nothing, as it should where min_p is off.
    cut = logits.amax(dim=-1).float() + min_p[expanded_idx_mapping].float().log()
    logits.masked_fill_(logits < cut[:, None], float("-inf"))


def apply_top_k_top_p(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    k: torch.Tensor | None,  # [num_tokens]
    p: torch.Tensor | None,  # [num_tokens]
) -> torch.Tensor:
    """vLLM's own implementation without Triton."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)
