"""Losses of a draft against its target: soft cross-entropy through the LM head, and smooth L1 on features.

Legend of shapes: T slots that count, h hidden size, V vocabulary of the loss (whole, or its most frequent
part: then teacher and draft are both renormalised over it).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # slots whose logits exist at one time


@dataclass
class HeadTerms:
    """What comparing draft and target through the LM head says about each slot.

    `token_loss` [T] carries gradient; `rank` [T] is how many draft logits lie above that of the true
    token (V where that token is outside the vocabulary: never a hit); `agree` [T] is 1 where draft and
    target have the same best token.
    """

    token_loss: Tensor
    rank: Tensor
    agree: Tensor


class _HeadLoss(torch.autograd.Function):
    """-sum_v w_v log q_v per slot, w = token_weight * p + top_weight * (p on its top 10).

    The gradient for `predict` is computed together with the loss, chunk by chunk, so that no [T, V] tensor
    outlives its chunk: dL/dz = q * sum(w) - w, dL/dpredict = dL/dz @ head.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        predict: Tensor,
        wanted: Tensor,
        head: Tensor,
        labels: Tensor,
        token_weight: float,
        top_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = predict.new_empty(len(predict))
        rank = torch.empty_like(labels)
        agree = torch.empty_like(labels, dtype=torch.bool)
        grad = torch.empty_like(predict)
        for rows in torch.arange(len(predict)).split(CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            z = predict[part] @ head.T
            w = (wanted[part] @ head.T).softmax(-1)
            agree[part] = z.argmax(-1) == w.argmax(-1)
            rank[part] = _rank_of(z, labels[part])
            if top_weight:
                best = w.topk(min(10, w.shape[-1]), dim=-1)
                w = (token_weight * w).scatter_add_(1, best.indices, top_weight * best.values)
            elif token_weight != 1.0:
                w *= token_weight
            total = w.sum(-1)
            normaliser = z.logsumexp(-1)
            loss[part] = total * normaliser - (w * z).sum(-1)
            q = z.sub_(normaliser[:, None]).exp_().mul_(total[:, None])
            grad[part] = q.sub_(w) @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(rank, agree)
        return loss, rank, agree

    @staticmethod
    def backward(
        ctx: Any, loss_grad: Tensor, _rank: None, _agree: None
    ) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * loss_grad[:, None], None, None, None, None, None


def _rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels.clamp_min(0)[:, None])
    above = (logits > own).sum(-1)
    return torch.where(labels < 0, logits.shape[-1], above)


def head_terms(
    predict: Tensor,
    wanted: Tensor,
    head: Tensor,
    labels: Tensor,
    token_weight: float = 1.0,
    top_weight: float = 0.0,
) -> HeadTerms:
    """Soft cross-entropy of the draft's next-token distribution against the target's, per slot.

    Args:
        predict: [T, h] draft outputs for the head.
        wanted: [T, h] the target's features one slot later; the teacher is softmax(head @ wanted).
        head: [V, h] rows of the target's LM head, frozen.
        labels: [T] true tokens as rows of `head`, -1 where the token is outside it.
        token_weight: Weight of the cross-entropy over V.
        top_weight: Weight of HASS's top-10 term: the teacher's ten best tokens alone, not renormalised.
    """
    return HeadTerms(*_HeadLoss.apply(predict, wanted, head, labels, token_weight, top_weight))


def feature_loss(regress: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between [T, h] features, mean over h: [T]."""
    return F.smooth_l1_loss(regress, wanted, reduction="none").mean(-1)


class LossVocabulary:
    """The tokens that the losses look at: all, or the `size` most frequent ones of the training data."""

    def __init__(self, head: Tensor, counts: Tensor, size: int | None = None) -> None:
        """`head` [V_all, h] is the target's LM head, `counts` [V_all] how often each token occurs."""
        total = len(head)
        size = total if size is None else min(size, total)
        self.kept = counts.argsort(descending=True, stable=True)[:size].sort().values
        self.head = head[self.kept].contiguous()
        self._row = torch.full((total,), -1, device=head.device)
        self._row[self.kept] = torch.arange(size, device=head.device)

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows of `head` for token ids [T]; -1 for a token outside (or for id -1, no token)."""
        return torch.where(tokens < 0, -1, self._row[tokens.clamp_min(0)])
