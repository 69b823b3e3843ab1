"""What a step's tree rows look like to the attention layers of the target."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class TreeRows:
    """The tree rows of one batch: the last ``num_rows[b]`` query rows of request ``b``.

    A request without a tree in this step (a prefill chunk, a plain decode) has 0 rows and keeps
    vLLM's causal attention.
    """

    # [num_reqs] int32: first tree row (the root) among the batch's query rows
    q_start: torch.Tensor
    # [num_reqs] int32
    num_rows: torch.Tensor
    # [num_reqs] int32: cached keys before the root, which every row of the tree sees
    prefix_lens: torch.Tensor
    # [num_reqs, 1 + N, num_words] int64: bit j of row i = row j is row i or an ancestor of it
    bits: torch.Tensor


def attach_tree(attn_metadata: dict[str, Any], tree: TreeRows | None) -> None:
    """Hands the tree to every layer's metadata; layers of one group share theirs."""
    for metadata in attn_metadata.values():
        metadata.tree = tree


def attached_tree(attn_metadata: Any) -> TreeRows | None:
    """The tree of a layer's metadata; None in passes that have none, as the draft's first one."""
    return getattr(attn_metadata, "tree", None)
