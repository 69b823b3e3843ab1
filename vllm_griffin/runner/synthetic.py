"""Acceptance of a given length whatever the target says, for benchmarks.

``rejection_sample_method="synthetic"`` is vLLM's own name for it and means the same here as for its chains.
"""

import torch

from vllm_griffin.kernels.verify import Walk
from vllm_griffin.tree import DraftTrees


class SyntheticVerifier:
    """Accepts so many nodes of each tree that at least d are accepted with probability ``rates[d - 1]``.

    They are the last rows of the tree, so that all of their keys and values have to move, as those of
    a true path have.
    """

    def __init__(self, rates: list[float], trees: DraftTrees, max_path: int) -> None:
        self.rates = torch.tensor(rates, dtype=torch.float32, device=trees.tokens.device)
        self.trees = trees
        self.max_path = max_path
        # Ranks must decide alike, whatever else each of them draws.
        self._generator = torch.Generator(trees.tokens.device).manual_seed(0)

    def walk(
        self,
        # [L] int64: the target's draws
        drawn: torch.Tensor,
        # [B + 1] int32
        cu_num_logits: torch.Tensor,
        # [B] int64
        idx_mapping: torch.Tensor,
    ) -> Walk:
        """A path of the root and as many nodes as the rates ask for."""
        slots, first = idx_mapping.long(), cu_num_logits[:-1].long()
        num_rows = cu_num_logits[1:].long() - first
        nodes = torch.minimum((num_rows - 1).clamp(min=0), self.trees.num_nodes[slots].long())
        chance = torch.rand(len(slots), 1, device=drawn.device, generator=self._generator)
        accepted = torch.minimum((chance < self.rates).sum(1), nodes).unsqueeze(1)
        step = torch.arange(self.max_path, device=drawn.device)
        path = (nodes.unsqueeze(1) - accepted + step).where((step > 0) & (step <= accepted), 0)
        next_row = (nodes.unsqueeze(1) - accepted + step + 1).where(step < accepted, 1)
        drafted = self.trees.tokens[slots].gather(1, next_row - 1)
        bonus_row = (first + path.gather(1, accepted)[:, 0]).clamp(max=len(drawn) - 1)
        bonus = drawn[bonus_row].unsqueeze(1)
        tokens = torch.where(step < accepted, drafted, bonus.where(step == accepted, 0))
        return Walk(path.int(), tokens, (1 + accepted[:, 0]).int() * (num_rows > 0).int())
