"""Twins of the kernels that keep the books of a batch, once or more per step and request.

Each is a few loads and stores on a GPU; the interpreter takes a millisecond or two for each. What decodes do
request by request goes through numpy's views, as torch takes several times as long for a single number.
``idx_mapping`` maps a request's row in the batch to its slot in the persistent state; -1 marks a
row without a request.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

_PAD_SLOT = -1


def prepare_prefill_inputs(
    input_ids: torch.Tensor,  # [num_tokens]
    next_prefill_tokens: torch.Tensor,  # [num_lookahead, max_num_reqs]
    idx_mapping: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    prefill_len: torch.Tensor,  # [max_num_reqs]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
) -> None:
    """Fills in the prompt tokens of this step, and those that come right after them."""
    num_lookahead = next_prefill_tokens.shape[0]
    bounds = query_start_loc.tolist()
    for row, slot in enumerate(idx_mapping.tolist()):
        prefill, computed = int(prefill_len[slot]), int(num_computed_tokens[slot])
        if computed >= prefill:
            continue
        start, end = bounds[row], bounds[row + 1]
        tokens = all_token_ids[slot]
        done = computed + end - start
        input_ids[start:end] = tokens[computed:done]
        following = tokens[done : min(done + num_lookahead, prefill)]
        next_prefill_tokens[:, slot] = 0
        next_prefill_tokens[: len(following), slot] = following


def prepare_pos_seq_lens(
    idx_mapping: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    pos: torch.Tensor,  # [num_tokens]
    seq_lens: torch.Tensor,  # [max_num_reqs]
) -> None:
    """Positions of this step's tokens, and the sequence lengths with them."""
    num_reqs = idx_mapping.shape[0]
    start, lengths = _spans(query_start_loc, num_reqs)
    computed = num_computed_tokens.numpy()[idx_mapping.numpy()]
    whole = seq_lens.numpy()
    whole[:num_reqs] = computed + lengths
    whole[num_reqs:] = 0
    shift = np.repeat(computed - start, lengths)
    pos.numpy()[: len(shift)] = shift + np.arange(len(shift))


def combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor,  # [num_tokens]
    idx_mapping: torch.Tensor,  # [num_reqs]
    last_sampled_tokens: torch.Tensor,  # [max_num_reqs, 1]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    seq_lens: torch.Tensor,  # [num_reqs]
    prefill_len: torch.Tensor,  # [max_num_reqs]
    draft_tokens: torch.Tensor,  # [max_num_reqs, num_speculative_steps]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    num_logits: int,
    num_new_sampled_tokens: int = 1,
) -> torch.Tensor:
    """Fills in the last sampled token and the drafts of requests past their prompt.

    Returns:
        ``[num_logits]`` int64 rows of the step that get logits, the last ones of each request.

    """
    assert num_new_sampled_tokens in (0, 1)
    logits_indices = np.empty(num_logits, dtype=np.int64)
    ends, bounds = query_start_loc.tolist(), cu_num_logits.tolist()
    lengths, prefills = seq_lens.tolist(), prefill_len.numpy()
    ids, sampled, drafted = input_ids.numpy(), last_sampled_tokens.numpy(), draft_tokens.numpy()
    for row, slot in enumerate(idx_mapping.tolist()):
        first, end = bounds[row], ends[row + 1]
        rows = bounds[row + 1] - first
        logits_indices[first : first + rows] = np.arange(end - rows, end)
        prefill = prefills[slot]
        if lengths[row] <= prefill:
            continue
        if num_new_sampled_tokens and lengths[row] - rows >= prefill:
            ids[end - rows] = sampled[slot, 0]
        drafts = rows - num_new_sampled_tokens
        if drafts > 0:
            ids[end - drafts : end] = drafted[slot, :drafts]
    return torch.from_numpy(logits_indices)


def get_num_sampled_and_rejected(
    num_sampled: torch.Tensor,  # [num_reqs]
    seq_lens: torch.Tensor,  # [num_reqs or more]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    idx_mapping: torch.Tensor,  # [num_reqs]
    prefill_len: torch.Tensor,  # [max_num_reqs]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes back, in place, what was sampled before a prompt's end; counts the rejected rows."""
    num_reqs = idx_mapping.shape[0]
    prefilling = seq_lens.numpy()[:num_reqs] < prefill_len.numpy()[idx_mapping.numpy()]
    sampled = num_sampled.numpy()
    sampled[prefilling] = 0
    _, rows = _spans(cu_num_logits, num_reqs)
    rejected = np.where(prefilling, 0, rows - sampled).astype(sampled.dtype)
    return num_sampled, torch.from_numpy(rejected)


def post_update(
    idx_mapping: torch.Tensor,  # [num_reqs]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    last_sampled_tokens: torch.Tensor,  # [max_num_reqs, 1]
    output_bin_counts: torch.Tensor | None,  # [max_num_reqs, vocab_size]
    sampled_tokens: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    num_sampled: torch.Tensor,  # [num_reqs]
    num_rejected: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor | None,  # [num_reqs + 1]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    total_len: torch.Tensor,  # [max_num_reqs]
) -> None:
    """Enters what a step sampled and rejected into the requests' state."""
    slots = idx_mapping.tolist()
    sampled, rejected = num_sampled.tolist(), num_rejected.tolist()
    bounds = [0] * (len(slots) + 1) if query_start_loc is None else query_start_loc.tolist()
    drawn, last, texts = sampled_tokens.numpy(), last_sampled_tokens.numpy(), all_token_ids.numpy()
    lengths, computed = total_len.numpy(), num_computed_tokens.numpy()
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        if sampled[row] > 0:
            tokens = drawn[row, : sampled[row]]
            last[slot, 0] = tokens[-1]
            start = lengths[slot]
            texts[slot, start : start + len(tokens)] = tokens
            lengths[slot] += len(tokens)
            if output_bin_counts is not None:
                np.add.at(output_bin_counts[slot].numpy(), tokens, 1)
        computed[slot] += bounds[row + 1] - bounds[row] - rejected[row]


def expand_idx_mapping(
    idx_mapping: torch.Tensor,  # [num_reqs]
    total_num_logits: int,
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    max_expand_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each logits row's slot, and its number within its request: both ``[total_num_logits]``."""
    start, rows = _spans(cu_num_logits, idx_mapping.shape[0])
    local = np.arange(total_num_logits) - np.repeat(start, rows)
    slots = np.repeat(idx_mapping.numpy(), rows)
    return torch.from_numpy(slots), torch.from_numpy(local.astype(np.int32))


def gather_block_tables(
    self: "BlockTables",
    idx_mapping: torch.Tensor,  # [num_reqs]
    num_reqs_padded: int,
    out: tuple[torch.Tensor, ...] | None = None,
    out_ptrs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Block tables in batch order, per group ``[num_reqs_padded, max_num_blocks]``."""
    tables = tuple(self.input_block_tables) if out is None else out
    slots = idx_mapping.tolist()
    for group, table in enumerate(tables):
        source, num_blocks = (
            self.block_tables[group].gpu.numpy(),
            self.num_blocks.gpu[group].tolist(),
        )
        gathered = table.numpy()
        for row, slot in enumerate(slots):
            gathered[row, : num_blocks[slot]] = source[slot, : num_blocks[slot]]
        gathered[len(slots) : num_reqs_padded] = 0
    return tuple(table[:num_reqs_padded] for table in tables)


def compute_slot_mappings(
    self: "BlockTables",
    idx_mapping: torch.Tensor,  # [num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    positions: torch.Tensor,  # [num_tokens]
    num_tokens_padded: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """KV cache slot of each token: ``[num_kv_cache_groups, num_tokens_padded]``."""
    if self.cp_size != 1:
        from vllm_griffin.cpu.patches import original

        return original(compute_slot_mappings)(
            self, idx_mapping, query_start_loc, positions, num_tokens_padded, out
        )
    slot_mappings = self.slot_mappings if out is None else out
    _, lengths = _spans(query_start_loc, idx_mapping.shape[0])
    slots = np.repeat(idx_mapping.numpy(), lengths)
    num_tokens = len(slots)
    places, mappings = positions.numpy()[:num_tokens], slot_mappings.numpy()
    for group in range(self.num_kv_cache_groups):
        mappings[group, num_tokens:] = _PAD_SLOT
        if not self._slot_mapping_enabled[group]:
            mappings[group, :num_tokens] = _PAD_SLOT
            continue
        table, size = self.block_tables[group].gpu.numpy(), self.block_sizes[group]
        # The kernel reads past a row whose position has no block; here it is the last one's.
        block = table[slots, np.minimum(places // size, table.shape[1] - 1)].astype(np.int64)
        mappings[group, :num_tokens] = np.where(slots < 0, _PAD_SLOT, block * size + places % size)
    return slot_mappings[:, :num_tokens_padded]


def apply_write(self: "StagedWriteTensor") -> None:
    """Writes what was staged, row by row and in order."""
    # Most steps stage nothing.
    if not self._staged_write_indices:
        return
    flat = self.gpu.view(-1)
    stride = self.gpu.stride(0)
    contents = torch.tensor(self._staged_write_contents, dtype=self.dtype)
    begin = 0
    staged: Any = zip(
        self._staged_write_indices,
        self._staged_write_starts,
        self._staged_write_cu_lens,
        strict=True,
    )
    for index, start, end in staged:
        first = index * stride + start
        flat[first : first + end - begin] = contents[begin:end]
        begin = end
    self.clear_staged_writes()


def apply(
    self: "FusedStagedWriter",
    tensors: "Sequence[StagedWriteTensor]",
    output_ptrs: torch.Tensor,
    output_strides: torch.Tensor,
) -> None:
    """Writes what was staged for the block tables of several cache groups."""
    for tensor in tensors:
        apply_write(tensor)


def _spans(cumulative: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each of the first ``count`` spans."""
    bounds = cumulative.numpy()[: count + 1]
    return bounds[:-1], bounds[1:] - bounds[:-1]
