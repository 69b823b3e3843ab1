"""Twins of the kernels that shape logits before a token is drawn."""

import numpy as np
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


def apply_logit_bias(
    logits: torch.Tensor,  # [num_tokens, vocab_size], float32
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    pos: torch.Tensor,  # [num_tokens]
    num_allowed_token_ids: torch.Tensor,  # [max_num_reqs]; 0 = all are allowed
    allowed_token_ids: torch.Tensor,  # [max_num_reqs, most]
    num_logit_bias: torch.Tensor,  # [max_num_reqs]
    logit_bias_token_ids: torch.Tensor,  # [max_num_reqs, most]
    logit_bias: torch.Tensor,  # [max_num_reqs, most]
    min_lens: torch.Tensor,  # [max_num_reqs]: prompt and output tokens before which nothing may stop
    num_stop_token_ids: torch.Tensor,  # [max_num_reqs]
    restore_when_all_masked: torch.Tensor,  # [max_num_reqs]: a grammar may allow stop tokens only
    stop_token_ids: torch.Tensor,  # [max_num_reqs, most]
    check_all_masked_rows: bool = False,
) -> None:
    """Applies allowed tokens, biases and the minimum length, in place."""
    slots, positions = expanded_idx_mapping.tolist(), pos.tolist()
    for row, slot, position in zip(logits, slots, positions, strict=True):
        if count := int(num_allowed_token_ids[slot]):
            allowed = allowed_token_ids[slot, :count].long()
            kept = row[allowed]
            row.fill_(float("-inf"))
            row[allowed] = kept
        if count := int(num_logit_bias[slot]):
            row[logit_bias_token_ids[slot, :count].long()] += logit_bias[slot, :count]
        count = int(num_stop_token_ids[slot])
        if count and position + 1 < int(min_lens[slot]):
            stops = stop_token_ids[slot, :count].long()
            before = row[stops]
            row[stops] = float("-inf")
            nothing_left = bool((row == float("-inf")).all())
            if check_all_masked_rows and restore_when_all_masked[slot] and nothing_left:
                row[stops] = before.where(before.isfinite(), row[stops])


def apply_penalties(
    logits: torch.Tensor,  # [num_tokens, vocab_size], float32
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    token_ids: torch.Tensor,  # [num_tokens]
    expanded_local_pos: torch.Tensor,  # [num_tokens]
    repetition_penalty: torch.Tensor,  # [max_num_reqs]
    frequency_penalty: torch.Tensor,  # [max_num_reqs]
    presence_penalty: torch.Tensor,  # [max_num_reqs]
    prompt_bin_mask: torch.Tensor,  # [max_num_reqs, ceil(vocab_size / 32)] bits
    output_bin_counts: torch.Tensor,  # [max_num_reqs, vocab_size]
) -> None:
    """Applies the three penalties in place; a draft row counts the drafts before it as output."""
    vocab_size = logits.shape[1]
    bits = torch.arange(32, dtype=torch.int32)
    slots, local = expanded_idx_mapping.tolist(), expanded_local_pos.tolist()
    for row, (slot, pos) in enumerate(zip(slots, local, strict=True)):
        repetition, frequency, presence = (
            penalty[slot].float()
            for penalty in (repetition_penalty, frequency_penalty, presence_penalty)
        )
        if repetition == 1.0 and frequency == 0.0 and presence == 0.0:
            continue
        counts = output_bin_counts[slot, :vocab_size].clone()
        drafts = token_ids[row - pos + 1 : row + 1].long()
        drafts = drafts[drafts >= 0]
        counts.index_add_(0, drafts, torch.ones_like(drafts, dtype=counts.dtype))
        seen = counts > 0
        if repetition != 1.0:
            words = prompt_bin_mask[slot]
            in_prompt = ((words[:, None] >> bits) & 1).flatten()[:vocab_size].bool()
            scale = torch.where(in_prompt | seen, repetition, 1.0)
            logits[row] *= torch.where(logits[row] > 0, 1.0 / scale, scale)
        logits[row] -= frequency * counts
        logits[row] -= presence * seen


def compute_token_logprobs(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    token_ids: torch.Tensor,  # [num_rows, num_tokens]
) -> torch.Tensor:
    """Log-probabilities ``[num_rows, num_tokens]`` of the given tokens, float32."""
    chosen = logits.gather(1, token_ids.long()).float()
    top = logits.amax(dim=-1, keepdim=True).float()
    return chosen - top - (logits.float() - top).exp_().sum(dim=-1, keepdim=True).log()


def _ranks_kernel(
    output_ptr: torch.Tensor,  # [num_rows]
    logits_ptr: torch.Tensor,  # [num_rows, vocab_size]
    logits_stride: int,
    token_ids_ptr: torch.Tensor,  # [num_rows]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Rank of each row's token: how many tokens are at least as likely."""
    chosen = logits_ptr.gather(1, token_ids_ptr.long()[:, None])
    torch.sum(logits_ptr >= chosen, dim=-1, out=output_ptr)


def apply_top_k_top_p(
    logits: torch.Tensor,  # [num_tokens, vocab_size], float32
    k: torch.Tensor | None,  # [num_tokens]
    p: torch.Tensor | None,  # [num_tokens]
) -> torch.Tensor:
    """Masks, in place, all but the k likeliest tokens and then all but the p likeliest mass.

    What vLLM's ``apply_top_k_top_p_pytorch`` does, but only values are sorted, which NumPy does more
    than ten times as fast as ``torch.sort`` sorts values and indices.
    """
    if k is None and p is None:
        return logits
    ordered = torch.from_numpy(np.sort(logits.float().numpy(), axis=-1))
    if k is not None:
        least = ordered.gather(1, ordered.shape[1] - k.long()[:, None])
        ordered.masked_fill_(ordered < least, float("-inf"))
        logits.masked_fill_(logits < least, float("-inf"))
    if p is not None:
        outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p[:, None]
        outside[:, -1] = False  # one token stays
        count = outside.sum(dim=-1, keepdim=True)
        least = ordered.gather(1, count)
        logits.masked_fill_(logits < least, float("-inf"))
        surplus = (count - torch.searchsorted(ordered, least)).squeeze(1)
        for row in surplus.nonzero().view(-1).tolist():
            # Of equal values that straddle the cut the first ones go, whatever else is in the batch.
            equal = (logits[row] == least[row]).nonzero().view(-1)
            logits[row, equal[: surplus[row]]] = float("-inf")
    return logits
