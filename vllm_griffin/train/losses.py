"""Losses of a draft against its target: distributions through the LM head, and smooth L1 on features.

Legend of shapes: T slots that count, h hidden size, V vocabulary of the loss (whole, or its most frequent
part: then teacher and draft are both renormalised over it).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_griffin.train.settings import AveragingSet, Objective

CHUNK = 512  # slots whose logits exist at one time


@dataclass
class HeadTerms:
    """What comparing draft and target through the LM head says about each slot.

    `loss` [T] carries gradient; `rank` [T] is how many draft logits lie above that of the true token (V
    where that token is outside the vocabulary: never a hit); `agree` [T] is 1 where draft and target have
    the same best token; `parts` [T, n] is what each of `Objective.terms` adds to the loss.
    """

    loss: Tensor
    rank: Tensor
    agree: Tensor
    parts: Tensor


class _HeadLoss(torch.autograd.Function):
    """The loss of `Objective`, with its gradient for `predict` computed on the way.

    All its terms have the gradient of -sum_v w_v log q_v with constant weights w, for TVD with
    w_v = q_v where q_v is not above p_v (Bebop, arXiv 2606.12370, appendix A). So with logits z,
    dL/dz = q * sum(w) - w and dL/dpredict = dL/dz @ head, chunk by chunk, so that no
    [T, V] tensor outlives its chunk.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        predict: Tensor,
        wanted: Tensor,
        head: Tensor,
        labels: Tensor,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = predict.new_empty(len(predict), len(objective.terms), dtype=torch.float32)
        rank = torch.empty_like(labels)
        agree = torch.empty_like(labels, dtype=torch.bool)
        grad = torch.empty_like(predict)
        for first in range(0, len(predict), CHUNK):
            part = slice(first, first + CHUNK)
            z = (predict[part] @ head.T).float()
            p = (wanted[part] @ head.T).float().softmax(-1)
            agree[part] = z.argmax(-1) == p.argmax(-1)
            rank[part] = _rank_of(z, labels[part])
            z -= z.logsumexp(-1, keepdim=True)
            parts[part], slope = _compare(p, z, objective)
            grad[part] = (slope.to(head.dtype) @ head).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(rank, agree, parts)
        return parts.sum(-1), rank, agree, parts

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, loss_grad: Tensor, _rank: None, _agree: None, _parts: None
    ) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * loss_grad[:, None].to(grad.dtype), None, None, None, None


def _compare(p: Tensor, log_q: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The loss's terms [T, n] and its gradient for the logits [T, V]; `log_q` [T, V] is overwritten."""
    o = objective
    q = log_q.exp() if o.tvd or o.tvd_plus else None
    terms = p.new_empty(len(p), len(o.terms))
    parts = dict(zip(o.terms, terms.unbind(-1), strict=True))
    weights = o.token * p
    if o.token:
        parts["cross_entropy"][:] = -(weights * log_q).sum(-1)
    if o.top:
        best = p.topk(min(10, p.shape[-1]), dim=-1)
        values = o.top * best.values
        parts["top_ten"][:] = -(values * log_q.gather(1, best.indices)).sum(-1)
        weights.scatter_add_(1, best.indices, values)
    if o.tvd:
        assert q is not None
        parts["tvd"][:] = o.tvd * (1 - torch.minimum(p, q).sum(-1))
        weights += o.tvd * q * (q <= p)
    if o.tvd_plus:
        assert q is not None
        advantages = o.tvd_plus * _advantage_weights(p, q, o.tvd_plus_set)
        parts["tvd_plus"][:] = -(advantages * log_q).sum(-1)
        weights += advantages
    q = log_q.exp_() if q is None else q
    slope = q.mul_(weights.sum(-1, keepdim=True)).sub_(weights)
    return terms, slope


def _advantage_weights(p: Tensor, q: Tensor, averaged: AveragingSet) -> Tensor:
    if averaged == "draft":
        reward = (p >= q).float()
        mean = (q * reward).sum(-1, keepdim=True)
        deviation = (q * (reward - mean).square()).sum(-1, keepdim=True).sqrt()
        return q * (reward - mean) / (deviation + 1e-5)
    reward = (p > q).float()
    deviation = reward.std(-1, keepdim=True)
    return (reward - reward.mean(-1, keepdim=True)) / (deviation + 1e-5) / p.shape[-1]


def _rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels.clamp_min(0)[:, None])
    # Of what is not a number, nothing is right.
    above = (~(logits <= own)).sum(-1)
    return torch.where(labels < 0, logits.shape[-1], above)


def head_terms(
    predict: Tensor, wanted: Tensor, head: Tensor, labels: Tensor, objective: Objective
) -> HeadTerms:
    """Compare the draft's next-token distribution with the target's, per slot.

    Args:
        predict: [T, h] draft outputs for the head.
        wanted: [T, h] the target's features one slot later; p = softmax(head @ wanted), without gradient.
        head: [V, h] rows of the target's LM head, frozen.
        labels: [T] true tokens as rows of `head`, -1 where the token is outside it.
        objective: What the loss is made of.
    """
    return HeadTerms(*_HeadLoss.apply(predict, wanted, head, labels, objective))


def feature_loss(regress: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between [T, h] features, mean over h: [T]."""
    return F.smooth_l1_loss(regress, wanted, reduction="none").mean(-1)


class LossVocabulary:
    """The tokens that the losses look at: all, or the `size` most frequent ones of the training data."""

    def __init__(self, head: Tensor, counts: Tensor, size: int | None = None) -> None:
        """`head` [V_all, h] is the target's LM head, `counts` [V_all] how often each token occurs."""
        total = len(head)
        size = total if size is None else min(size, total)
        # The most frequent first, as a draft's `vocabulary.json` lists them.
        self.ranking = counts.argsort(descending=True, stable=True)[:size]
        self.kept = self.ranking.sort().values
        self.head = head[self.kept].contiguous()
        self._row = torch.full((total,), -1, device=head.device)
        self._row[self.kept] = torch.arange(size, device=head.device)

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows of `head` for token ids [T]; -1 for a token outside (or for id -1, no token)."""
        return torch.where(tokens < 0, -1, self._row[tokens.clamp_min(0)])
