"""The stored tokens followed down each document's tree: one row of the draft per level.

Legend of shapes: B documents, K top_k, h hidden size, nh heads, d head size.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_griffin.evaluate.drafting import DraftHead, Nodes, ReplayedDocument, best_children
from vllm_griffin.train.network import Draft
from vllm_griffin.tree_shape import TreeShape

# Scores of a path and of a grown tree differ by rounding; less than this apart, neither decides.
MARGIN = 1e-3


@dataclass
class Path:
    """The stored tokens in the draft's eyes, from one root on.

    Attributes:
        scores: Cumulative log-probabilities of the leading stored tokens that are among their parents'
            K best.
        best: So many of them are their parents' very best, as far as the answer goes.
        rival: Score of the spine's first token that differs from the answer; None if the answer or the
            levels end first.
        on_spine: All tokens so far were their parents' very best.
    """

    scores: list[float] = field(default_factory=list)
    best: int = 0
    rival: float | None = None
    on_spine: bool = True

    def descend(
        self, document: ReplayedDocument, depth: int, logprobs: list[float], tokens: list[int]
    ) -> bool:
        """Add the stored token at a depth if it is among the children, best first; False: the path ends."""
        place = document.root + depth
        token = document.tokens[place] if place < len(document.tokens) else None
        above = self.scores[-1] if self.scores else 0.0
        in_answer = place < document.output.end
        if self.on_spine and in_answer and tokens[0] == token:
            self.best = depth
        elif self.on_spine:
            self.on_spine = False
            self.rival = above + min(logprobs[0], 0.0) if in_answer else None
        if token not in tokens:
            return False
        self.scores.append(above + min(logprobs[tokens.index(token)], 0.0))
        return True

    @property
    def questions(self) -> list[tuple[float, int]]:
        """(score, depth) of the nodes of which it must be known whether they are in the tree."""
        path = [(score, depth) for depth, score in enumerate(self.scores, 1)]
        return path + ([] if self.rival is None else [(self.rival, self.best + 1)])

    def is_certain(self, shape: TreeShape) -> bool:
        """Whether all those nodes are in the tree whatever its other nodes are.

        At one depth, fewer than exp(-s) nodes have a score above s, since their probabilities sum to at
        most 1. So a score above -log K is within the frontier, and one above log(D / N) among the N best.
        """
        if not self.scores or shape.top_k == 1:
            # The root's best child is in every tree, and a chain keeps all its nodes.
            return True
        # The rival may be a child of the path's deepest node, which then must be expanded too.
        deep = self.rival is not None and self.best == len(self.scores)
        expanded = self.scores if deep else self.scores[:-1]
        # Every node of the first level is expanded.
        if any(score <= MARGIN - math.log(shape.top_k) for score in expanded[1:]):
            return False
        if shape.nodes >= shape.pool:
            return True
        return min(self.questions)[0] > math.log(shape.levels / shape.nodes) + MARGIN


def follow(
    draft: Draft, head: DraftHead, shape: TreeShape, context: int, live: list[ReplayedDocument]
) -> tuple[list[Path], tuple[Tensor, Tensor]]:
    """The path of each document, all documents level by level, and the roots' best children.

    Returns:
        Paths, and (log-probabilities, tokens) [B, K] of the first level.
    """
    paths = [Path() for _ in live]
    nodes = [Nodes(document) for document in live]
    going = list(range(len(live)))
    first = [document.outputs() for document in live]
    predict = torch.stack([p for p, _ in first])
    features = torch.stack([r for _, r in first])
    children = roots = best_children(predict, head, shape.top_k)
    for depth in range(1, shape.levels + 1):
        logprobs, tokens = (x.tolist() for x in children)
        kept = [
            row
            for row, i in enumerate(going)
            if paths[i].descend(live[i], depth, logprobs[row], tokens[row])
        ]
        if depth == shape.levels or not kept:
            break
        going = [going[row] for row in kept]
        chosen = torch.tensor([live[i].tokens[live[i].root + depth] for i in going])
        positions = torch.tensor([live[i].root - 1 + depth for i in going])
        fused = draft.fuse(features[kept], chosen)
        q, k, v = draft.project(fused, positions.clamp(max=context - 1))
        attended = []
        for row, i in enumerate(going):
            nodes[i].append(k[:, row : row + 1], v[:, row : row + 1])
            attended.append(nodes[i].attend(q[:, row : row + 1]))
        predict, features = draft.finish(fused, torch.cat(attended, dim=1))
        children = best_children(predict, head, shape.top_k)
    return paths, roots
