"""One budget of nodes for all trees of a step, spread over its requests on the device.

vLLM's runner can trim drafts after they were scheduled, for a method of its own (dspark): it asks an
`AdaptiveVerificationManager` how many rows the step has, which the host must know, and where on the
device each request's begin, which it need not. `NodeBudget` answers in its place: the step has N rows
of drafts a request on average, and a request has as many of them as its nodes are worth. All that
follows (positions, cache slots, sampler, grammar bitmasks) goes by vLLM's own tensors.

Shapes: B requests of the step.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_griffin.tree import DraftTrees, share_nodes


class NodeBudget:
    """Stands in the place of vLLM's ``AdaptiveVerificationManager``, method by method.

    Args:
        nodes: N, nodes a request on average.
        trees: Whose nodes they are; rows by score, so that a prefix is the best tree of its size.
        query_start_loc: [max_num_reqs + 1] int32, vLLM's persistent buffer.
        max_rows: Rows with logits that are verified at once. Only so many are spread: for several
            chunks the host must know where a request begins.
    """

    def __init__(
        self, nodes: int, trees: DraftTrees, query_start_loc: torch.Tensor, max_rows: int
    ) -> None:
        self.nodes = nodes
        self.trees = trees
        self.query_start_loc = query_start_loc
        self.max_rows = max_rows

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """Rows of the step: each request's share is N of its drafts, or all if it has fewer."""
        drafts = [len(draft_tokens.get(name, ())) for name in num_tokens_per_req]
        return sum(num_tokens_per_req.values()) - sum(max(n - self.nodes, 0) for n in drafts)

    def compact_batch(
        self,
        # [B]
        num_draft_tokens_per_req: np.ndarray,
        # [B]
        num_scheduled_tokens: np.ndarray,
        # [B + 1]
        cu_num_logits_np: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each request [B] and where its logits begin [B + 1], as the host counts them."""
        self._drafts = num_draft_tokens_per_req
        self._others = num_scheduled_tokens - num_draft_tokens_per_req
        self._shares = np.minimum(self._drafts, self.nodes)
        self._cu_num_logits = np.zeros_like(cu_num_logits_np)
        np.cumsum(1 + self._shares, out=self._cu_num_logits[1:])
        return self._others + self._shares, self._cu_num_logits

    def reallocate_drafts(
        self, req_ids: list[str], idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Where logits [B + 1] and rows [max_num_reqs + 1] begin on the device; rows of drafts."""
        total = int(self._shares.sum())
        device = idx_mapping.device
        if not self._spreads():
            cu_num_logits = async_tensor_h2d(self._cu_num_logits, device=device)
            return cu_num_logits, self.query_start_loc, total
        most, others = async_tensor_h2d(np.stack([self._drafts, self._others]), device=device)
        nodes = share_nodes(self.trees.worth(idx_mapping), most, total)
        cu_num_logits = pad((1 + nodes).cumsum(0), (1, 0)).to(torch.int32)
        self.query_start_loc[1 : 1 + len(nodes)] = (others + nodes).cumsum(0)
        return cu_num_logits, self.query_start_loc, total

    def _spreads(self) -> bool:
        """Whether there is a choice, and the host needs to know nothing of it.

        It does where rows of a prompt come before drafts (log-probabilities of prompts go by the host's
        numbers): each request then has its own share. A prompt without drafts stands behind all trees.
        """
        drafted = self._drafts > 0
        return bool(
            (self._drafts > self._shares).any()
            and (self._others[drafted] == 1).all()
            and drafted[: drafted.sum()].all()
            and self._cu_num_logits[-1] <= self.max_rows
        )

    def add_request(self, req_idx: int) -> None:
        """Nothing: the model state forgets the slot's tree."""

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: Any) -> None:
        """Nothing: the trees' scores are there."""

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """None: the budget is a number of the config."""
        return iter(())

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        """Nothing was timed."""
