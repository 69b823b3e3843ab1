"""One number of nodes for a batch of trees, shared out by what the nodes are worth.

Shapes: B requests, N nodes of a tree.
"""

import torch


def share_nodes(
    # [B, N] float32
    worth: torch.Tensor,
    # [B] integer
    most: torch.Tensor,
    total: int,
) -> torch.Tensor:
    """How many of its first nodes each request gets: the ``total`` most worthwhile of all.

    A prefix of a tree's rows is a tree, so that a number says which nodes; where a row is worth no
    more than those before it, as by score, these are the best nodes there are. Equals go to the
    earlier request, and within one to the earlier row. Nothing depends on the number of threads.

    Args:
        worth: Comparable across requests; -inf = nothing, but taken before rows are left over.
        most: Of each request, at most N.
        total: At most the sum of ``most``.

    Returns:
        [B] int64, of the sum ``total``.
    """
    rows = torch.arange(worth.shape[1], device=worth.device)
    worth = worth.clamp(min=torch.finfo(worth.dtype).min)
    worth = worth.where(rows < most.unsqueeze(1), float("-inf"))
    best = worth.flatten().sort(descending=True, stable=True).indices[:total]
    taken = torch.zeros_like(worth, dtype=torch.int64).flatten().index_fill(0, best, 1)
    return taken.view_as(worth).sum(1)
