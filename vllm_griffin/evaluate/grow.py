"""Draft trees grown with the training network, as the engine grows them, as far as they matter.

Legend of shapes: B documents, K top_k, D levels, h hidden size, nh heads, d head size, W words of bits.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from vllm_griffin.evaluate.drafting import DraftHead, Nodes, ReplayedDocument, best_children
from vllm_griffin.evaluate.follow import MARGIN
from vllm_griffin.kernels.packed_bits import unpack_bits
from vllm_griffin.train.network import Draft
from vllm_griffin.tree import Frontier, TreeGrower
from vllm_griffin.tree_shape import TreeShape

# Score and depth of a node of which it must be known whether it is in the tree.
Question: TypeAlias = tuple[float, int]


class Questions:
    """Which nodes must be expanded so that it is known whether some nodes are in the tree.

    Only nodes of a higher score bear on a question, so the lowest open one is a floor under which nothing is
    expanded. The answer is no once N better nodes are known. It is yes where the level of the node is known
    and what is still to come cannot make it N: at each depth, at most exp(r - s) descendants of a node with
    score r score s or more, since their probabilities sum to at most the node's.
    """

    def __init__(self, asked: list[list[Question] | None], shape: TreeShape) -> None:
        """What is asked about each document's tree; None: everything, so all nodes are expanded."""
        width = max(1, *(len(questions or []) for questions in asked), 1)
        padded = [[*(q or []), *[(math.inf, 0)] * (width - len(q or []))] for q in asked]
        self._shape = shape
        self._all = torch.tensor([questions is None for questions in asked])
        self._open = torch.tensor([[score for score, _ in q] for q in padded])
        self._depths = torch.tensor([[depth for _, depth in q] for q in padded])
        self._pool = torch.zeros(len(asked), 0)

    def floor(self, depth: int, candidates: Tensor, frontier: Tensor) -> Tensor:
        """[B, 1]: nodes of the frontier are expanded that score above this.

        Args:
            depth: Of the level that was grown last.
            candidates: [B, n] its scores.
            frontier: [B, K] the best of them.
        """
        self._pool = torch.cat([self._pool, candidates], dim=1)
        bound = self._open - MARGIN
        better = (self._pool[:, None] > bound[..., None]).sum(-1)
        surely = (self._pool[:, None] > self._open[..., None] + MARGIN).sum(-1)
        descendants = (frontier[:, None] - bound[..., None]).clamp(max=10.0).exp().floor().sum(-1)
        more = (self._shape.levels - depth) * descendants
        yes = (self._depths <= depth) & (better + more <= self._shape.nodes)
        self._open = self._open.masked_fill(yes | (surely >= self._shape.nodes), math.inf)
        floor = self._open.amin(1, keepdim=True) - MARGIN
        return floor.masked_fill(self._all[:, None], -math.inf)


def grow(
    draft: Draft,
    head: DraftHead,
    shape: TreeShape,
    context: int,
    live: list[ReplayedDocument],
    roots: tuple[Tensor, Tensor],
    asked: list[list[Question] | None],
) -> list[tuple[list[int], list[int]]]:
    """Tokens of rows 1 .. N and parents of rows 0 .. N of each document's tree.

    Args:
        draft, head: The network, and the head that ranks its tokens.
        shape, context: The tree; the longest text in tokens.
        live: The documents.
        roots: Log-probabilities and tokens [B, K] of their roots' best children.
        asked: See `Questions`. Rows of the tree are exact that have a score asked about or a higher one;
            a child that was never computed has the token -1.
    """
    k, size = shape.top_k, len(live)
    grower = TreeGrower(shape.levels, k, torch.device("cpu"))
    frontier = grower.begin(*roots)
    questions, candidates = Questions(asked, shape), roots[0].clamp(max=0.0)
    features = torch.stack([document.outputs()[1] for document in live])
    features = features[:, None].expand(-1, k, -1)
    nodes = [Nodes(document, grower.scratch_size) for document in live]
    starts = torch.tensor([document.root for document in live])[:, None].expand(-1, k)
    for depth in range(1, shape.levels):
        wanted = frontier.scores > questions.floor(depth, candidates, frontier.scores)
        logprobs = torch.full((size, k, k), -math.inf)
        tokens = torch.full((size, k, k), -1)
        regress = torch.zeros(size, k, features.shape[-1])
        if wanted.any():
            fused = draft.fuse(features[wanted], frontier.tokens[wanted])
            positions = (starts[wanted] - 1 + depth).clamp(max=context - 1)
            q, keys, values = draft.project(fused, positions)
            attended = _attend(nodes, wanted, q, keys, values, frontier, depth)
            predict, regress[wanted] = draft.finish(fused, attended)
            logprobs[wanted], tokens[wanted] = best_children(predict, head, k)
        candidates = (frontier.scores[..., None] + logprobs.clamp(max=0.0)).flatten(1)
        frontier = grower.advance(frontier, logprobs, tokens)
        parents = frontier.parents.long()[..., None].expand(-1, -1, features.shape[-1])
        features = regress.gather(1, parents)
    tree = grower.finish(shape.nodes)
    return list(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True))


def _attend(
    nodes: list[Nodes],
    # [B, K] bool: the rows of q, k, v in order
    wanted: Tensor,
    # [nh, rows, d] each
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frontier: Frontier,
    depth: int,
) -> Tensor:
    """Attention [nh, rows, d] of a level's nodes, after their keys and values are put in place."""
    width = wanted.shape[1]
    seen = unpack_bits(frontier.bits)[..., : depth * width]
    attended, row = [], 0
    for i, count in enumerate(wanted.sum(1).tolist()):
        if not count:
            continue
        rows = slice(row, row + count)
        places = (depth - 1) * width + wanted[i].nonzero()[:, 0]
        nodes[i].put(places, k[:, rows], v[:, rows])
        attended.append(nodes[i].attend(q[:, rows], seen[i, wanted[i]]))
        row += count
    return torch.cat(attended, dim=1)
