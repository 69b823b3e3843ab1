"""Random trees that hold the right continuation at a random place, instead of a draft's own.

A random draft is never right, so what it drafts tests rejection only. With these trees a random
model accepts several tokens a step, over siblings of any rank.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from vllm_griffin.kernels.tree_order import OrderedTree, order_tree
from vllm_griffin.runner.graphs import TreeStart
from vllm_griffin.runner.speculator import TreeSpeculator
from vllm_griffin.runner.trace import client_request_id
from vllm_griffin.tree import TreeGrower


@contextlib.contextmanager
def oracle_trees(texts: dict[str, list[int]], vocab_size: int, seed: int = 0) -> Iterator[None]:
    """Replaces the draft's trees; ``texts``: request name -> prompt and the right output."""
    generator = torch.Generator().manual_seed(seed)
    grow, propose = TreeSpeculator._grow, TreeSpeculator.propose
    batches: list[Any] = []

    def remember(self: TreeSpeculator, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        batches[:] = [input_batch]
        return propose(self, input_batch, *args, **kwargs)

    def random_trees(self: TreeSpeculator, start: TreeStart, size: int) -> OrderedTree:
        grow(self, start, size)  # the draft runs all the same
        grower = self.growers[size]
        names = [client_request_id(r) for r in batches[0].req_ids]
        pools = [
            _pool(grower, texts[name][position + 1 :], vocab_size, generator)
            for name, position in zip(names, start.prefix_lens.tolist(), strict=True)
        ]
        tokens, scores, parents = (torch.stack(part) for part in zip(*pools, strict=True))
        return order_tree(
            tokens, scores, parents, grower.pool_depths, size, grower.levels, start.spine_first
        )

    with (
        mock.patch.object(TreeSpeculator, "propose", remember),
        mock.patch.object(TreeSpeculator, "_grow", random_trees),
    ):
        yield


def _pool(
    grower: TreeGrower, right: list[int], vocab_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One request's candidates: random siblings, the right token among them on one path."""
    k, levels = grower.top_k, grower.levels
    tokens: list[int] = []
    scores: list[float] = []
    parents: list[int] = []
    frontier, on_path = [-1], -1
    for level in range(levels):
        first = len(tokens)
        path_child = -1
        for parent in frontier:
            children = torch.randperm(vocab_size, generator=generator)[:k].tolist()
            if parent == on_path and level < len(right):
                place = int(torch.randint(k, (1,), generator=generator))
                if right[level] in children:
                    children.remove(right[level])
                    children.append(-1)
                children[place] = right[level]
                children = [c for c in children if c >= 0]
                while len(children) < k:
                    children.append((children[-1] + 1) % vocab_size)
                path_child = len(tokens) + children.index(right[level])
            above = scores[parent] if parent >= 0 else 0.0
            drops = torch.rand(k, generator=generator).mul(3).tolist()
            tokens += children
            scores += [above - drop for drop in drops]
            parents += [parent] * k
        if path_child >= 0:
            # Near the top, so that it is often kept, and rarely first among its siblings.
            above = scores[on_path] if on_path >= 0 else 0.0
            scores[path_child] = above - 0.6 * float(torch.rand((), generator=generator))
        candidates = range(first, len(tokens))
        frontier = sorted(candidates, key=lambda i: (-scores[i], i))[:k]
        on_path = path_child if path_child in frontier else -2
    return (
        torch.tensor(tokens),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(parents, dtype=torch.int32),
    )
