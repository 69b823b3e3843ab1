"""One training step: the losses of all passes over one batch."""

import torch
from torch import Tensor, nn

from vllm_griffin.data.batch import Batch
from vllm_griffin.train.align import Alignment
from vllm_griffin.train.losses import LossVocabulary, feature_loss, head_terms
from vllm_griffin.train.network import Draft
from vllm_griffin.train.passes import multi_pass
from vllm_griffin.train.settings import Objective, Settings

VALIDATION_PASSES = 6  # the depth of the paper's tree
VALIDATION_TOKENS = 8192  # slots at one time


class DraftLoss(nn.Module):
    """A draft with its losses; one forward is one step's work, as data-parallel wrappers want it."""

    def __init__(self, draft: Draft, vocabulary: LossVocabulary, settings: Settings) -> None:
        super().__init__()
        self.draft = draft
        self.vocabulary = vocabulary
        self.settings = settings

    def forward(
        self, batch: Batch, features: Tensor, passes: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of `passes` passes.

        Args:
            batch: T slots.
            features: [T, h] the batch's features with their noise.
            passes: How many.

        Returns:
            The loss, and for each pass n what to show of it: ``token<n>`` and ``feature<n>``, the two parts
            of the loss; where the first has several terms, each under its name in `Objective.terms`, so that
            they add up to it; ``agree<n>``, the share of slots where draft and target have the same best
            token; ``mask<n>``, the share of pass 0's slots that pass n trains on.
        """
        s = self.settings
        objective = s.objective(passes)
        labels = self.vocabulary.rows(batch.labels)
        alignment = Alignment(batch, s.mask, s.align_top_k)
        slots = alignment.mask.sum()
        total = torch.zeros((), device=features.device)
        terms: dict[str, Tensor] = {}
        outputs = multi_pass(
            self.draft,
            features,
            batch.tokens,
            batch.positions,
            batch.starts,
            passes,
            s.attention,
            s.gradient_checkpointing,
        )
        for n, (predict, regress) in enumerate(outputs):
            rows = alignment.ranked.nonzero()[:, 0]
            trained = alignment.mask[rows].float()
            count = trained.sum() + 1e-5
            wanted = batch.wanted[rows]
            head = head_terms(predict[rows], wanted, self.vocabulary.head, labels[rows], objective)
            token = (head.loss * trained).sum() / count
            feature = (feature_loss(regress[rows], wanted) * trained).sum() / count
            total = total + token + s.feature_weight * feature
            terms[f"token{n}"], terms[f"feature{n}"] = token.detach(), feature.detach()
            if len(objective.terms) > 1:
                parts = (head.parts * trained[:, None]).sum(0) / count
                terms |= {f"{name}{n}": x for name, x in zip(objective.terms, parts, strict=True)}
            terms[f"agree{n}"] = (head.agree * trained).sum() / count
            terms[f"mask{n}"] = trained.sum() / slots.clamp_min(1)
            rank = torch.full_like(batch.labels, len(self.vocabulary.head))
            rank[rows] = head.rank
            alignment.advance(rank)
        return total, terms


@torch.no_grad()
def held_out_counts(draft: Draft, vocabulary: LossVocabulary, batch: Batch) -> dict[str, float]:
    """Sums over a batch of what validation averages.

    ``chain`` and ``top3`` are sums over roots of how many first passes have the document's token as their
    best, or among their best three, in a row: what a chain, and about what a tree, accepts of it.
    """
    labels = vocabulary.rows(batch.labels)
    # Roots whose drafted tokens all exist and are the assistant's, so that every pass counts the same roots.
    # A document's last slot has no label, so no root reaches into the next one.
    chain = known = batch.drafted & (batch.labels >= 0)
    for _ in range(1, VALIDATION_PASSES):
        known = torch.cat([known[1:], known.new_zeros(1)])
        chain = chain & known
    top3 = chain
    rows = batch.drafted.nonzero()[:, 0]
    result: dict[str, float] = {
        "roots": int(chain.sum()),
        "slots": len(rows),
        "chain": 0,
        "top3": 0,
    }
    objective = Objective(token=1.0, top=0.0)
    outputs = multi_pass(
        draft, batch.features, batch.tokens, batch.positions, batch.starts, VALIDATION_PASSES
    )
    for n, (predict, regress) in enumerate(outputs):
        head = head_terms(
            predict[rows], batch.wanted[rows], vocabulary.head, labels[rows], objective
        )
        rank = torch.full_like(batch.labels, len(vocabulary.head))
        rank[rows] = head.rank
        chain, top3 = chain & (rank == 0), top3 & (rank < 3)
        result["chain"] += int(chain.sum())
        result["top3"] += int(top3.sum())
        chain, top3 = torch.roll(chain, 1), torch.roll(top3, 1)
        result[f"val_agree{n}"] = head.agree.sum().item()
        result[f"val_token{n}"] = head.loss.sum().item()
        feature = feature_loss(regress[rows], batch.wanted[rows])
        result[f"val_feature{n}"] = feature.sum().item()
    return result
