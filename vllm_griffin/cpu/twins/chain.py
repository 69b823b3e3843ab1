"""Twins of the bookkeeping around a chain of drafts, so that vLLM's EAGLE is a fair baseline."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers


def prepare_prefill_inputs(
    last_token_indices: torch.Tensor,  # [max_num_reqs]
    current_draft_step: torch.Tensor,  # scalar
    input_buffers: "InputBuffers",
    input_batch: "InputBatch",
    num_sampled: torch.Tensor,  # [num_reqs]
    num_rejected: torch.Tensor,  # [num_reqs]
    last_sampled: torch.Tensor,  # [max_num_reqs, 1]
    next_prefill_tokens: torch.Tensor,  # [max_num_reqs]
    max_num_reqs: int,
) -> torch.Tensor:
    """The draft's first pass: the target's tokens without the rejected ones, shifted by one."""
    num_reqs = input_batch.num_reqs
    bounds = input_batch.query_start_loc.tolist()
    sampled, rejected = num_sampled.tolist(), num_rejected.tolist()
    for row, slot in enumerate(input_batch.idx_mapping.tolist()):
        start, last = bounds[row], bounds[row + 1] - rejected[row] - 1
        following = last_sampled.view(-1) if sampled[row] > 0 else next_prefill_tokens
        input_buffers.input_ids[start:last] = input_batch.input_ids[start + 1 : last + 1]
        input_buffers.input_ids[last] = following[slot]
        input_buffers.positions[start : last + 1] = input_batch.positions[start : last + 1]
        last_token_indices[row] = last
    input_buffers.query_start_loc[:num_reqs] = input_batch.query_start_loc[:num_reqs]
    input_buffers.query_start_loc[num_reqs : max_num_reqs + 1] = bounds[num_reqs]
    input_buffers.seq_lens[:num_reqs] = input_batch.seq_lens[:num_reqs]
    input_buffers.seq_lens[num_reqs:max_num_reqs] = 0
    last_token_indices[num_reqs:max_num_reqs] = 0
    current_draft_step.zero_()
    return last_token_indices


def prepare_decode_inputs(
    draft_tokens: torch.Tensor,  # [num_reqs]
    target_seq_lens: torch.Tensor,  # [num_reqs or more]
    num_rejected: torch.Tensor,  # [num_reqs or more]
    input_buffers: "InputBuffers",
    sample_src_positions: torch.Tensor,  # [max_num_reqs]
    max_model_len: int,
    max_num_reqs: int,
    advance_draft_positions: bool = True,
) -> None:
    """The draft's second pass: one row per request."""
    num_reqs = draft_tokens.shape[0]
    rows = torch.arange(max_num_reqs + 1, dtype=input_buffers.query_start_loc.dtype)
    input_buffers.query_start_loc[: max_num_reqs + 1] = rows.clamp_(max=num_reqs)
    input_buffers.input_ids[:num_reqs] = draft_tokens
    sample_src_positions[:num_reqs] += 1
    input_buffers.seq_lens[:num_reqs] = target_seq_lens[:num_reqs] - num_rejected[:num_reqs]
    input_buffers.seq_lens[num_reqs:max_num_reqs] = 0
    if advance_draft_positions:
        _advance(input_buffers, num_reqs, max_model_len)


def update_draft_inputs(
    draft_tokens: torch.Tensor,  # [num_reqs]
    current_draft_step: torch.Tensor,  # scalar
    hidden_states: torch.Tensor,  # [num_reqs or more, hidden_size]
    output_draft_tokens: torch.Tensor,  # [max_num_reqs, num_speculative_steps]
    next_input_hidden_states: torch.Tensor,  # [max_num_tokens, hidden_size]
    input_buffers: "InputBuffers",
    sample_src_positions: torch.Tensor,  # [max_num_reqs]
    num_reqs: int,
    max_model_len: int,
    num_speculative_steps: int,
    advance_draft_positions: bool = True,
) -> None:
    """Keeps the drafted tokens and, but for the last step, feeds them to the next one."""
    step = int(current_draft_step)
    output_draft_tokens[:num_reqs, step] = draft_tokens[:num_reqs]
    if step >= num_speculative_steps - 1:
        return
    sample_src_positions[:num_reqs] += 1
    input_buffers.input_ids[:num_reqs] = draft_tokens[:num_reqs]
    next_input_hidden_states[:num_reqs] = hidden_states[:num_reqs]
    if advance_draft_positions:
        _advance(input_buffers, num_reqs, max_model_len)


def _advance(input_buffers: "InputBuffers", num_reqs: int, max_model_len: int) -> None:
    for values, most in (
        (input_buffers.positions, max_model_len - 1),
        (input_buffers.seq_lens, max_model_len),
    ):
        values[:num_reqs] = (values[:num_reqs] + 1).clamp_(max=most)


def gather_draft_sampled(
    input_ids: torch.Tensor,  # [num_tokens]
    positions: torch.Tensor,  # [num_tokens]
    logits_indices: torch.Tensor,  # [num_logits]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    expanded_local_pos: torch.Tensor,  # [num_logits]
    prefill_len: torch.Tensor,  # [max_num_reqs]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and position ``[num_logits]`` of each logits row; -1 for drafts before a prompt's end."""
    tokens, pos = input_ids[logits_indices], positions[logits_indices]
    early = pos - expanded_local_pos < prefill_len[expanded_idx_mapping]
    return tokens.masked_fill_(early & (expanded_local_pos > 0), -1), pos
