"""Twins of the kernels that read a request's own text before a token is drawn.

Row r of a request reads its committed text and, as drafts, the tokens of its rows before r and r's own.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch


def apply_bad_words(
    logits: torch.Tensor,  # [num_tokens, vocab_size], float32
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    bad_word_token_ids: torch.Tensor,  # [max_num_reqs, most]: the words' tokens, one after another
    bad_word_offsets: torch.Tensor,  # [max_num_reqs, most + 1]
    num_bad_words: torch.Tensor,  # [max_num_reqs]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    prompt_len: torch.Tensor,  # [max_num_reqs]
    total_len: torch.Tensor,  # [max_num_reqs]
    input_ids: torch.Tensor,  # [num_tokens]
    expanded_local_pos: torch.Tensor,  # [num_tokens]
    max_num_bad_words: int,
) -> None:
    """Masks, in place, the last token of each bad word whose others end the request's output."""
    asked = num_bad_words.tolist()
    rows = _texts(
        expanded_idx_mapping, expanded_local_pos, input_ids, all_token_ids, total_len, asked
    )
    for row, slot, text in rows:
        output = text[int(prompt_len[slot]) :]
        offsets = bad_word_offsets[slot, : asked[slot] + 1].tolist()
        words = bad_word_token_ids[slot, : offsets[-1]].tolist()
        for start, end in pairwise(offsets):
            if _ends_with(output, words[start : end - 1]):
                logits[row, words[end - 1]] = float("-inf")


def apply_thinking_budget(
    logits: torch.Tensor,  # [num_tokens, vocab_size], float32
    req_ids: torch.Tensor,  # [num_reqs]
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    thinking_token_budget: torch.Tensor,  # [max_num_reqs]; -1 = none
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    total_len: torch.Tensor,  # [max_num_reqs]
    input_ids: torch.Tensor,  # [num_tokens]
    expanded_local_pos: torch.Tensor,  # [num_tokens]
    cached_last_start: torch.Tensor,  # [max_num_reqs]: not needed, every text is read as a whole
    cached_last_end: torch.Tensor,  # [max_num_reqs]: 〃
    cached_scan_pos: torch.Tensor,  # [max_num_reqs]: 〃
    reasoning_start_token_ids: torch.Tensor,
    natural_reasoning_end_token_ids: torch.Tensor,
    reasoning_end_token_ids: torch.Tensor,
) -> None:
    """Forces, in place, the next token of the end marker on rows that think beyond their budget."""
    start, end = reasoning_start_token_ids.tolist(), natural_reasoning_end_token_ids.tolist()
    forced = reasoning_end_token_ids.tolist()
    budgets = thinking_token_budget.tolist()
    asked = [budget + 1 for budget in budgets]
    rows = _texts(
        expanded_idx_mapping, expanded_local_pos, input_ids, all_token_ids, total_len, asked
    )
    for row, slot, text in rows:
        began = _last(text, start)
        if began < 0 or began <= _last(text, end):
            continue
        if len(text) - began - len(start) < budgets[slot]:
            continue
        done = max(n for n in range(len(forced)) if _ends_with(text, forced[:n]))
        logits[row, forced[done]] = 1.0e9


def _texts(
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    input_ids: torch.Tensor,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    asked: Sequence[int],
) -> Iterator[tuple[int, int, list[int]]]:
    """(row, request slot, text up to the row) for the rows of requests with ``asked`` > 0."""
    tokens = input_ids.tolist()
    committed: dict[int, list[int]] = {}
    slots, local = expanded_idx_mapping.tolist(), expanded_local_pos.tolist()
    for row, (slot, place) in enumerate(zip(slots, local, strict=True)):
        if asked[slot] <= 0:
            continue
        if slot not in committed:
            committed[slot] = all_token_ids[slot, : int(total_len[slot])].tolist()
        yield row, slot, committed[slot] + tokens[row - place + 1 : row + 1]


def _ends_with(text: list[int], end: list[int]) -> bool:
    return len(end) <= len(text) and text[len(text) - len(end) :] == end


def _last(text: list[int], part: list[int]) -> int:
    """Where ``part`` begins for the last time; -1 if it does not."""
    begins = range(len(text) - len(part), -1, -1)
    return next((i for i in begins if text[i : i + len(part)] == part), -1)
