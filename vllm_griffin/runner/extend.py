"""The layout of the draft's extend pass: which rows, at which positions, fed by what.

`plan_extend` lays out any batch. A batch of decodes can have the same rows in every step, P a request,
which a captured graph needs: `decode_rows`.

Shapes: B requests of the batch, R rows of the pass, P rows of the longest path, h hidden size.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_griffin.kernels.verify import Walk


@dataclass
class ExtendBatch:
    """Rows of the extend pass: one per token whose target hidden state is now known.

    A request with T - 1 drafts scheduled has prompt rows before its root, taken as they are; of the T
    tree rows the pass has min(T, P), of which those beyond the accepted path are padding: their cache
    slots lie past the text and are overwritten in time. Of the scheduled rows the step may have had
    fewer (`vllm_griffin.runner.budget`); padding past those has no cache slot.
    """

    # [B + 1] host int32
    query_start_np: np.ndarray
    # [R] int64: token, position, row of the target's hidden state, row whose cache slot to fill, -1
    # for none
    input_ids: torch.Tensor
    positions: torch.Tensor
    hidden_rows: torch.Tensor
    slot_rows: torch.Tensor
    # [B] int64: row of the last token of the text
    last_rows: torch.Tensor
    # [B] int32: draft keys in the paged cache once the pass is done, padding not counted
    prefix_lens: torch.Tensor
    # [B] int32: the same, padding counted
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class DecodeRows:
    """Rows of the extend pass over a batch of decodes, P of each request.

    Those beyond the accepted path are padding, as in `ExtendBatch`.
    """

    # [B, P] int64
    tokens: torch.Tensor
    # [B, P, h]: of the target, at the token before
    features: torch.Tensor
    # [B] int64: position of the first row
    positions: torch.Tensor
    # [B, P] int64: cache slots, PAD_SLOT_ID for rows that the step did not have
    slots: torch.Tensor
    # [B] int64: rows of the accepted path
    accepted: torch.Tensor

    def of(self, num_reqs: int) -> "DecodeRows":
        """The first requests."""
        return DecodeRows(*(getattr(self, field.name)[:num_reqs] for field in fields(self)))

    def copy_(self, other: "DecodeRows") -> None:
        """Takes another's values."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    @classmethod
    def padding(
        cls, num_reqs: int, max_path: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> "DecodeRows":
        """Rows of requests without text, which write nothing."""
        shape = (num_reqs, max_path)
        return cls(
            tokens=torch.zeros(shape, dtype=torch.int64, device=device),
            features=torch.zeros(*shape, hidden, dtype=dtype, device=device),
            positions=torch.zeros(num_reqs, dtype=torch.int64, device=device),
            slots=torch.full(shape, PAD_SLOT_ID, dtype=torch.int64, device=device),
            accepted=torch.ones(num_reqs, dtype=torch.int64, device=device),
        )


def decode_rows(
    batch: InputBatch,
    walk: Walk,
    # [B]
    num_sampled: torch.Tensor,
    # [num_tokens]: of the draft's cache
    slot_mapping: torch.Tensor,
    # [num_tokens, h]
    hidden_states: torch.Tensor,
) -> DecodeRows | None:
    """Rows of a batch in which every row has logits; None for others, which the host can tell."""
    if (batch.num_scheduled_tokens != _host_logits_rows(batch)).any():
        return None
    starts = batch.query_start_loc[: batch.num_reqs + 1].long()
    root, num_rows = starts[:-1, None], starts.diff()
    local = torch.arange(walk.path.shape[1], device=starts.device)
    last = len(hidden_states) - 1
    return DecodeRows(
        tokens=walk.tokens,
        features=hidden_states[(root + walk.path).clamp(max=last)],
        positions=batch.seq_lens[: batch.num_reqs].long() - num_rows,
        slots=slot_mapping[(root + local).clamp(max=last)].where(
            local < num_rows[:, None], PAD_SLOT_ID
        ),
        accepted=num_sampled.long().clamp(min=1),
    )


def _host_logits_rows(batch: InputBatch) -> np.ndarray:
    """[B] int32: rows with logits of each request that the host has scheduled."""
    rows = np.ones(batch.num_reqs, dtype=np.int32)
    if batch.num_draft_tokens_per_req is not None:
        rows += batch.num_draft_tokens_per_req
    return rows


def plan_extend(
    batch: InputBatch,
    walk: Walk,
    # [B]
    num_sampled: torch.Tensor,
    max_path: int,
) -> ExtendBatch:
    """Lays out the pass; its shape follows from what was scheduled, which the host knows."""
    device = batch.input_ids.device
    num_logits_np = _host_logits_rows(batch)
    prompt_np = batch.num_scheduled_tokens - num_logits_np
    counts_np = prompt_np + np.minimum(num_logits_np, max_path)
    starts_np = np.concatenate([[0], np.cumsum(counts_np)]).astype(np.int32)
    request_np = np.repeat(np.arange(batch.num_reqs), counts_np)
    local_np = np.arange(starts_np[-1]) - starts_np[request_np]
    per_row = np.stack([request_np, local_np, local_np - prompt_np[request_np]])
    per_request = np.stack([prompt_np, starts_np[:-1], counts_np])
    # Local index of a row among its request's rows; index in its tree, negative before the root.
    request, local, tree_row = async_tensor_h2d(per_row.astype(np.int64), device=device)
    prompt, start, count = async_tensor_h2d(per_request.astype(np.int64), device=device)

    query_start = batch.query_start_loc[: batch.num_reqs].long()
    num_scheduled = batch.query_start_loc[1 : batch.num_reqs + 1].long() - query_start
    first_position = batch.seq_lens[: batch.num_reqs].long() - num_scheduled
    in_tree = tree_row >= 0
    path_row = tree_row.clamp(min=0)
    slot_rows = query_start[request] + local
    root_row = query_start[request] + prompt[request]
    # A prompt's row pairs the target's feature with the prompt's next token, a row of the path
    # with what the target drew there.
    next_row = (slot_rows + 1).clamp(max=batch.input_ids.shape[0] - 1)
    prompt_next = batch.input_ids[next_row].long()
    accepted = num_sampled.long().clamp(min=1)
    return ExtendBatch(
        query_start_np=starts_np,
        input_ids=torch.where(in_tree, walk.tokens[request, path_row], prompt_next),
        positions=first_position[request] + local,
        hidden_rows=torch.where(in_tree, root_row + walk.path[request, path_row], slot_rows),
        slot_rows=torch.where(local < num_scheduled[request], slot_rows, -1),
        last_rows=start + prompt + accepted - 1,
        prefix_lens=(first_position + prompt + accepted).to(torch.int32),
        seq_lens=(first_position + count).to(torch.int32),
    )
