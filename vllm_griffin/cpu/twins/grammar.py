"""Twin of the grammar bitmask kernel."""

import torch


def _apply_grammar_bitmask_kernel(
    logits_ptr: torch.Tensor,  # [num_logits, vocab_size]
    logits_stride: int,
    logits_indices_ptr: torch.Tensor,  # [num_masks]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    bitmask_ptr: torch.Tensor,  # [num_masks, vocab_size / 32]
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Sets the logits of tokens whose bit is 0 to -inf, in place.

    Mask i belongs to request ``logits_indices // MASK_STRIDE``, at the row
    ``logits_indices % MASK_STRIDE`` of its rows; a row that the request does not have is skipped.
    """
    requests = logits_indices_ptr.long() // MASK_STRIDE
    offsets = logits_indices_ptr.long() % MASK_STRIDE
    rows = cu_num_logits_ptr[requests] + offsets
    active = rows < cu_num_logits_ptr[requests + 1]
    bits = torch.arange(32, dtype=torch.int32)
    for row, words in zip(rows[active].tolist(), bitmask_ptr[active], strict=True):
        forbidden = ((words[:, None] >> bits) & 1 == 0).flatten()[:vocab_size]
        logits_ptr[row].masked_fill_(forbidden, float("-inf"))
